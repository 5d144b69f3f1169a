"""Tiny models, EAGLE-3 heads for them in the files of those who train some, and what these heads say, in float64.

The formulas are EAGLE-3's (arXiv 2503.01840), written down once more: nothing of octavo is used.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hf_oracle import SIZES, make_hf, save
from safetensors.torch import save_file
from torch import Tensor

HIDDEN = SIZES["hidden_size"]
INNER = 80
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 16
VOCAB = SIZES["vocab_size"]
EPS = 1e-5
THETA = 700.0
LAYER = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCAB,
    "rms_norm_eps": EPS,
    "rope_theta": THETA,
    "max_position_embeddings": 16,  # less than the model has
    "tie_word_embeddings": False,
}


def make_target(directory: Path, seed: int = 0) -> Any:
    """A Llama of four layers, which transformers computes in float64; its checkpoint is float32."""
    model = make_hf("Llama", {"rope_theta": 500.0, "max_position_embeddings": 256}, seed)
    save(model, directory)
    return model.double()


@dataclass
class Made:
    """A head. ids: what it reads, as transformers counts hidden states; tokens: of its own vocabulary."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    ids: tuple[int, ...]
    tokens: list[int] | None = None
    layer: str = "midlayer"
    flags: frozenset[str] = field(default_factory=frozenset)

    def write(self, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.config))
        save_file(self.tensors, directory / "model.safetensors")
        return directory


def random_tensors(
    layer: str, num_states: int, draft_vocab: int, seed: int, sizes: dict[str, Any] = LAYER
) -> dict[str, Tensor]:
    """Of a head, by the names in its file: matrices that keep a vector's size, norms near 1."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    width, kv_width = (sizes[f"num_{kind}_heads"] * sizes["head_dim"] for kind in ("attention", "key_value"))

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * (1.5 * columns**-0.5)

    def norm(size: int) -> Tensor:
        return 1 + 0.3 * torch.randn(size, generator=generator)

    return {
        "fc.weight": matrix(hidden, num_states * hidden),
        f"{layer}.hidden_norm.weight": norm(hidden),
        f"{layer}.input_layernorm.weight": norm(hidden),
        f"{layer}.post_attention_layernorm.weight": norm(hidden),
        f"{layer}.self_attn.q_proj.weight": matrix(width, 2 * hidden),
        f"{layer}.self_attn.k_proj.weight": matrix(kv_width, 2 * hidden),
        f"{layer}.self_attn.v_proj.weight": matrix(kv_width, 2 * hidden),
        f"{layer}.self_attn.o_proj.weight": matrix(hidden, width),
        f"{layer}.mlp.gate_proj.weight": matrix(inner, hidden),
        f"{layer}.mlp.up_proj.weight": matrix(inner, hidden),
        f"{layer}.mlp.down_proj.weight": matrix(hidden, inner),
        "norm.weight": norm(hidden),
        "lm_head.weight": matrix(draft_vocab, hidden),
    }


def of_eagle(seed: int = 1) -> Made:
    """As EAGLE and SpecForge write it: its own vocabulary, the model's embedding, layers by their numbers."""
    tokens = sorted(torch.randperm(VOCAB, generator=torch.Generator().manual_seed(seed))[:40].tolist())
    tensors = random_tensors("midlayer", 3, len(tokens), seed)
    tensors["d2t"] = torch.tensor(tokens) - torch.arange(len(tokens))
    tensors["t2d"] = torch.tensor([token in tokens for token in range(VOCAB)])
    eagle = {"eagle_aux_hidden_state_layer_ids": [0, 1, 2], "use_aux_hidden_state": True}
    config = LAYER | {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 40, "eagle_config": eagle}
    return Made(config, tensors, (1, 2, 3), tokens)


def for_checkpoint(directory: Path) -> Made:
    """As EAGLE writes it, for a Llama in this directory: random, with all of its vocabulary."""
    sizes = json.loads((directory / "config.json").read_text()) | {"num_hidden_layers": 1}
    tensors = random_tensors("midlayer", 2, sizes["vocab_size"], 3, sizes)
    eagle = {"eagle_aux_hidden_state_layer_ids": [0, 1], "use_aux_hidden_state": True}
    return Made(sizes | {"architectures": ["LlamaForCausalLMEagle3"], "eagle_config": eagle}, tensors, (1, 2))


def of_speculators(*flags: str, seed: int = 2, num_states: int = 3) -> Made:
    """As speculators writes it: a Qwen3 layer, an embedding of its own, and these keys on."""
    generator = torch.Generator().manual_seed(seed)
    tensors = random_tensors("layers.0", num_states, VOCAB, seed)
    for name in ("q_norm", "k_norm"):
        tensors[f"layers.0.self_attn.{name}.weight"] = 1 + 0.3 * torch.randn(HEAD_DIM, generator=generator)
    tensors["embed_tokens.weight"] = torch.randn(VOCAB, HIDDEN, generator=generator)
    if "norm_before_fc" in flags:
        tensors["input_norm.weight"] = 1 + 0.3 * torch.randn(num_states * HIDDEN, generator=generator)
    for i in range(num_states if "fc_norm" in flags else 0):
        tensors[f"fc_norm.{i}.weight"] = 1 + 0.3 * torch.randn(HIDDEN, generator=generator)
    ids = (1, 3, 4, 2)[:num_states]  # the last layer's among them
    config = {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": VOCAB,
        "eagle_aux_hidden_state_layer_ids": list(ids),
        "transformer_layer_config": LAYER | {"model_type": "qwen3"},
        "speculators_config": {"algorithm": "eagle3", "default_proposal_method": "greedy"},
        "speculators_version": "0.4.0",
    }
    return Made(config | dict.fromkeys(flags, True), tensors, ids, layer="layers.0", flags=frozenset(flags))


def seeing(layer: str = "layers.0") -> Made:
    """A head that says of a token what a model says which knows that token alone: `make_blind`."""
    made = of_speculators("norm_before_residual", num_states=1)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in made.tensors.items()}
    eye = torch.eye(HIDDEN)
    tensors = zeros | {name: torch.ones_like(it) for name, it in made.tensors.items() if "norm" in name}
    tensors[f"{layer}.self_attn.v_proj.weight"] = torch.cat([eye, torch.zeros_like(eye)], dim=1)
    tensors[f"{layer}.self_attn.o_proj.weight"] = eye
    tensors[f"{layer}.self_attn.k_proj.weight"] = torch.zeros(HIDDEN, 2 * HIDDEN)
    tensors[f"{layer}.hidden_norm.weight"] = torch.zeros(HIDDEN)
    del tensors["embed_tokens.weight"], tensors["lm_head.weight"]  # the model's own
    inner = LAYER | {"model_type": "qwen3", "num_key_value_heads": HEADS, "use_sliding_window": True}
    inner |= {"sliding_window": 1, "layer_types": ["sliding_attention"], "max_window_layers": 0}
    config = made.config | {"transformer_layer_config": inner, "eagle_aux_hidden_state_layer_ids": [2]}
    return Made(config, tensors, (2,), layer=layer)


def make_blind(directory: Path) -> Path:
    """A model whose next token depends on the last one alone."""
    model = make_hf("Llama", {"max_position_embeddings": 256})
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    model.model.norm.weight.data.fill_(1.0)
    return save(model, directory)


class Reference:
    """What a head says, in float64, one position after another, and of the model what transformers says."""

    def __init__(self, made: Made, model: Any) -> None:
        self.made = made
        self.model = model
        self.w = {name: tensor.double() for name, tensor in made.tensors.items() if tensor.is_floating_point()}

    @torch.no_grad()
    def logits(self, tokens: list[int], drafts: list[int]) -> Tensor:
        """[its vocabulary], about the token behind all of these; `drafts` are the head's own."""
        states = self.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        said = torch.cat([states[i][0, :-1] for i in self.made.ids], dim=-1)
        if len(states) - 1 in self.made.ids:  # transformers norms the last one
            said = torch.cat([self._state(states, i, tokens) for i in self.made.ids], dim=-1)
        hidden = list(self._entered(said))
        behind = [*tokens[1:], *drafts]
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for position, token in enumerate(behind):
            h = hidden[position]
            g = self._layer(h, token, position, keys, values)
            normed = self._norm(g, "norm")
            if position >= len(tokens) - 2:
                hidden.append(normed if "norm_output" in self.made.flags else g)
        table = self.w.get("lm_head.weight", self.model.lm_head.weight)
        return table @ normed

    def _state(self, states: Any, index: int, tokens: list[int]) -> Tensor:
        if index < len(states) - 1:
            return states[index][0, :-1]
        seen: list[Tensor] = []
        handle = self.model.model.layers[-1].register_forward_hook(
            lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        self.model(torch.tensor([tokens]))
        handle.remove()
        return seen[0].reshape(len(tokens), -1)[:-1]

    def _entered(self, said: Tensor) -> Tensor:
        if "norm_before_fc" in self.made.flags:
            said = self._norm(said, "input_norm")
        if "fc_norm" in self.made.flags:
            parts = said.chunk(len(self.made.ids), dim=-1)
            said = torch.cat([self._norm(part, f"fc_norm.{i}") for i, part in enumerate(parts)], dim=-1)
        return said @ self.w["fc.weight"].T

    def _layer(self, h: Tensor, token: int, position: int, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        name = self.made.layer
        table = self.w.get("embed_tokens.weight", self.model.model.embed_tokens.weight)
        normed = self._norm(h, f"{name}.hidden_norm")
        x = torch.cat([self._norm(table[token], f"{name}.input_layernorm"), normed])
        q, k, v = (self.w[f"{name}.self_attn.{kind}_proj.weight"] @ x for kind in "qkv")
        q, k, v = q.view(HEADS, -1), k.view(KV_HEADS, -1), v.view(KV_HEADS, -1)
        if f"{name}.self_attn.q_norm.weight" in self.w:
            q, k = self._norm(q, f"{name}.self_attn.q_norm"), self._norm(k, f"{name}.self_attn.k_norm")
        keys.append(rotated(k, position))
        values.append(v)
        group = HEADS // KV_HEADS
        k_all = torch.stack(keys, dim=1).repeat_interleave(group, 0)
        v_all = torch.stack(values, dim=1).repeat_interleave(group, 0)
        scores = (rotated(q, position)[:, None] * k_all).sum(-1) * HEAD_DIM**-0.5
        attended = (scores.softmax(-1)[:, :, None] * v_all).sum(1).flatten()
        residual = normed if "norm_before_residual" in self.made.flags else h
        y = residual + self.w[f"{name}.self_attn.o_proj.weight"] @ attended
        z = self._norm(y, f"{name}.post_attention_layernorm")
        gate, up, down = (self.w[f"{name}.mlp.{kind}_proj.weight"] for kind in ("gate", "up", "down"))
        return y + down @ (torch.nn.functional.silu(gate @ z) * (up @ z))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * self.w[f"{name}.weight"]


def rotated(x: Tensor, position: int) -> Tensor:
    """[heads, HEAD_DIM] at this position, halves paired."""
    half = HEAD_DIM // 2
    angles = position * THETA ** (-torch.arange(half, dtype=torch.float64) / half)
    one, other = x[:, :half], x[:, half:]
    return torch.cat([one * angles.cos() - other * angles.sin(), other * angles.cos() + one * angles.sin()], dim=-1)
