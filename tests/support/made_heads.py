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
from safetensors.torch import load_file, save_file
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


def mtp_tensors(layer: str, seed: int, *, biases: bool) -> dict[str, Tensor]:
    """Of an MTP head."""
    generator = torch.Generator().manual_seed(seed)
    tensors = random_tensors(layer, 2, VOCAB, seed)
    tensors[f"{layer}.input_proj.weight"] = tensors.pop("fc.weight")
    tensors[f"{layer}.final_layernorm.weight"] = tensors.pop("norm.weight")
    tensors[f"{layer}.hidden_layernorm.weight"] = tensors.pop(f"{layer}.hidden_norm.weight")
    tensors[f"{layer}.token_layernorm.weight"] = 1 + 0.3 * torch.randn(HIDDEN, generator=generator)
    del tensors["lm_head.weight"]
    for kind in "qkv":
        name = f"{layer}.self_attn.{kind}_proj"
        size = HIDDEN if kind == "q" else KV_HEADS * HEAD_DIM
        tensors[f"{name}.weight"] = torch.randn(size, HIDDEN, generator=generator) * (1.5 * HIDDEN**-0.5)
        if biases:
            tensors[f"{name}.bias"] = 0.3 * torch.randn(size, generator=generator)
    return tensors


def mtp_of_speculators() -> Made:
    """As speculators writes it, for Qwen3."""
    tensors = mtp_tensors("mtp_layers.0", 5, biases=False)
    for name in ("q_norm", "k_norm"):
        tensors[f"mtp_layers.0.self_attn.{name}.weight"] = torch.linspace(0.5, 1.5, HEAD_DIM)
    config = {
        "architectures": ["MTPDraftModel"],
        "speculators_model_type": "mtp",
        "num_nextn_predict_layers": 1,
        "transformer_layer_config": LAYER | {"model_type": "qwen3", "num_hidden_layers": 4},
        "speculators_config": {"algorithm": "mtp"},
    }
    return Made(config, tensors, (), layer="mtp_layers.0", flags=frozenset({"token_first"}))


def make_mimo(directory: Path) -> tuple[Made, Any]:
    """A MiMo, which is a Qwen2 with one more layer: (that layer, the model in transformers, in float64)."""
    model = make_hf("Qwen2", {"max_position_embeddings": 256, "rope_theta": 500.0, "intermediate_size": INNER})
    save(model, directory)
    layer = "model.mtp_layers.0"
    file = directory / "config.json"
    config = json.loads(file.read_text())
    config = {key: it for key, it in config.items() if key not in ("rope_parameters", "layer_types", "architectures")}
    config |= {"model_type": "mimo", "architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    config |= {"rope_theta": 500.0, "head_dim": HEAD_DIM, "attention_bias": True, "use_mrope": False}
    file.write_text(json.dumps(config))
    tensors = mtp_tensors(layer, 4, biases=True)
    save_file(load_file(directory / "model.safetensors") | tensors, directory / "model.safetensors", {"format": "pt"})
    return Made(config, tensors, (), layer=layer), model.double()


def seeing() -> Made:
    """A head that says of a token what a model says which knows that token alone: `make_blind`."""
    made = of_speculators("norm_before_residual", num_states=1)
    layer = made.layer
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

    def __init__(self, made: Made, model: Any, window: int | None = None) -> None:
        """window: of the latest positions, how many it sees; None: all."""
        self.window = window
        self.made = made
        self.model = model
        self.w = {name: tensor.double() for name, tensor in made.tensors.items() if tensor.is_floating_point()}
        inner = made.config.get("transformer_layer_config", made.config)
        self.eps = inner["rms_norm_eps"]
        self.theta = inner["rope_theta"]

    @torch.no_grad()
    def logits(self, tokens: list[int], drafts: list[int]) -> Tensor:
        """[its vocabulary], about the token behind all of these; `drafts` are the head's own."""
        hidden = list(self._entered(tokens))
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for position, token in enumerate([*tokens[1:], *drafts]):
            normed, following = self._said(hidden[position], token, keys, values)
            if position >= len(tokens) - 2:
                hidden.append(following)
        table = self.w.get("lm_head.weight", self.model.lm_head.weight)
        return table @ normed

    def _entered(self, tokens: list[int]) -> Tensor:
        """What it reads of all tokens but the last."""
        said = torch.cat([self._state(tokens, index) for index in self.made.ids], dim=-1)
        if "norm_before_fc" in self.made.flags:
            said = self._norm(said, "input_norm")
        if "fc_norm" in self.made.flags:
            parts = said.chunk(len(self.made.ids), dim=-1)
            said = torch.cat([self._norm(part, f"fc_norm.{i}") for i, part in enumerate(parts)], dim=-1)
        return said @ self.w["fc.weight"].T

    def _state(self, tokens: list[int], index: int) -> Tensor:
        """Behind the model's layer index - 1; transformers' last hidden state is normed."""
        seen: list[Any] = []
        handle = self.model.model.layers[index - 1].register_forward_hook(lambda _m, _a, out: seen.append(out))
        self.model(torch.tensor([tokens]))
        handle.remove()
        [found] = seen
        return (found[0] if isinstance(found, tuple) else found).reshape(len(tokens), -1)[:-1]

    def _said(self, h: Tensor, token: int, keys: list[Tensor], values: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(what logits are of, what the next position reads)."""
        name = self.made.layer
        table = self.w.get("embed_tokens.weight", self.model.model.embed_tokens.weight)
        normed = self._norm(h, f"{name}.hidden_norm")
        x = torch.cat([self._norm(table[token], f"{name}.input_layernorm"), normed])
        residual = normed if "norm_before_residual" in self.made.flags else h
        g = self._through(x, residual, keys, values)
        out = self._norm(g, "norm")
        return out, out if "norm_output" in self.made.flags else g

    def _through(self, x: Tensor, residual: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        """Attention and the MLP of the layer, at the next position."""
        name = self.made.layer
        q, k, v = (self._linear(f"{name}.self_attn.{kind}_proj", x) for kind in "qkv")
        q, k, v = q.view(HEADS, -1), k.view(KV_HEADS, -1), v.view(KV_HEADS, -1)
        if f"{name}.self_attn.q_norm.weight" in self.w:
            q, k = self._norm(q, f"{name}.self_attn.q_norm"), self._norm(k, f"{name}.self_attn.k_norm")
        q, k = (self._rotated(it, len(keys)) for it in (q, k))
        keys.append(k)
        values.append(v)
        group = HEADS // KV_HEADS
        seen = slice(None) if self.window is None else slice(-self.window, None)
        k_all = torch.stack(keys[seen], dim=1).repeat_interleave(group, 0)
        v_all = torch.stack(values[seen], dim=1).repeat_interleave(group, 0)
        scores = (q[:, None] * k_all).sum(-1) * HEAD_DIM**-0.5
        attended = (scores.softmax(-1)[:, :, None] * v_all).sum(1).flatten()
        y = residual + self._linear(f"{name}.self_attn.o_proj", attended)
        z = self._norm(y, f"{name}.post_attention_layernorm")
        gate, up = (self._linear(f"{name}.mlp.{kind}_proj", z) for kind in ("gate", "up"))
        return y + self._linear(f"{name}.mlp.down_proj", torch.nn.functional.silu(gate) * up)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return self.w[f"{name}.weight"] @ x + self.w.get(f"{name}.bias", 0)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.w[f"{name}.weight"]

    def _rotated(self, x: Tensor, position: int) -> Tensor:
        """[heads, HEAD_DIM] at this position, halves paired."""
        half = HEAD_DIM // 2
        angles = position * self.theta ** (-torch.arange(half, dtype=torch.float64) / half)
        one, other = x[:, :half], x[:, half:]
        return torch.cat([one * angles.cos() - other * angles.sin(), other * angles.cos() + one * angles.sin()], dim=-1)


class MtpReference(Reference):
    """Of an MTP head, as MiMo's and speculators' modelling code has it."""

    def _entered(self, tokens: list[int]) -> Tensor:
        return self.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1][0, :-1]

    def _said(self, h: Tensor, token: int, keys: list[Tensor], values: list[Tensor]) -> tuple[Tensor, Tensor]:
        name = self.made.layer
        embedded = self._norm(self.model.model.embed_tokens.weight[token], f"{name}.token_layernorm")
        halves = [self._norm(h, f"{name}.hidden_layernorm"), embedded]
        x = self._linear(f"{name}.input_proj", torch.cat(halves[::-1] if "token_first" in self.made.flags else halves))
        g = self._through(self._norm(x, f"{name}.input_layernorm"), x, keys, values)
        out = self._norm(g, f"{name}.final_layernorm")
        return out, out
