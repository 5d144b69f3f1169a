"""Every model type that octavo serves, with how its tiny random checkpoint is made and what its own code says of it.

A case of `hf_oracle.CASES`, `encoder_oracle.CASES`, `tiny_encdec.CASES` or `tiny_vision.MAKERS` that is named by its
model type is found here by itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import encoder_oracle
import hf_oracle
import tiny_encdec
import tiny_vision
import tiny_whisper
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Kind = Literal["decoder", "images", "encoder", "encoder-decoder", "speech"]
Truth = Callable[[list[int]], Tensor]  # token ids [T] -> logits [T, vocab], or an encoder's hidden states [T, H]

ALIASES = {
    "mimo": ("qwen2", "MiMoForCausalLM"),
    "kimi_k2": ("deepseek_v3", "DeepseekV3ForCausalLM"),
    "camembert": ("roberta", "CamembertModel"),
    "new": ("gte", "NewModel"),
}
"""Model types with the one that is the same but for its name, and their class."""
HALVES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
"""Model types that see whose text half is a type found in their checkpoints alone: proved with prompts of text."""
SIZES = ("moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp", "q_lora_rank")
SIZES += ("head_dim", "global_head_dim", "hidden_size_per_layer_input", "laurel_rank", "intermediate_size")
SIZES += ("shared_intermediate_size", "linear_value_head_dim", "moe_shared_expert_intermediate_size")
RECORDING = tiny_whisper.tones(0.9, seed=1)
"""What Whisper hears: it ends before the second that the model reads."""
GROUP = 32
"""Of a group of weights. These sizes are multiples of it here, so that nothing is refused for being tiny."""
DEPTHS = {"qwen3_next": 2}
"""Layers of models whose random weights make so much of noise that four bits leave nothing of four layers: transformers
with noise of eight bits' size in its weights is a tenth of the logits' variance off."""


@dataclass(frozen=True)
class TinyModel:
    """A model type's tiny checkpoint.

    write: into a directory that isn't there; returns what transformers computes with it: a Truth, or a TinyVision.
    """

    model_type: str
    kind: Kind
    write: Callable[[Path], Any]

    @property
    def is_decoder(self) -> bool:
        """Whether it can be calibrated, and has what decoders have."""
        return self.kind in ("decoder", "images")


def _write_decoder(name: str, directory: Path) -> Truth:
    family, overrides = hf_oracle.CASES[name]
    grouped = {key: _grouped(overrides[key]) for key in SIZES if overrides.get(key)}
    depth = {"num_hidden_layers": DEPTHS[name]} if name in DEPTHS else {}
    model = hf_oracle.make_hf(family, overrides | grouped | depth)
    hf_oracle.save(model, directory)
    return partial(_logits, model)


def _grouped(size: Any) -> Any:
    """The next multiple; of one number, or of one for each layer."""
    return [_grouped(each) for each in size] if isinstance(size, list) else -(-size // GROUP) * GROUP


@torch.inference_mode()
def _logits(model: Any, ids: list[int]) -> Tensor:
    found: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0]
    return found


def _write_alias(model_type: str, directory: Path) -> Truth:
    name, architecture = ALIASES[model_type]
    truth = (_write_encoder if name in encoder_oracle.CASES else _write_decoder)(name, directory)
    file = directory / "config.json"
    renamed = {"model_type": model_type, "architectures": [architecture]}
    file.write_text(json.dumps(json.loads(file.read_text()) | renamed))
    return truth


def _write_encoder(name: str, directory: Path) -> Truth:
    family, keys = encoder_oracle.CASES[name]
    model = encoder_oracle.made(family, keys, "Model", directory)
    return lambda ids: encoder_oracle.expected(model, ids).last_hidden_state[0]


def _write_encoder_decoder(name: str, directory: Path) -> Truth:
    """Logits of what the decoder reads; the encoder has read the first of `tiny_encdec.texts`."""
    directory.mkdir()
    model = tiny_encdec.make(name, directory)
    return lambda ids: tiny_encdec.logits(model, tiny_encdec.texts(1)[0], ids)


def _write_half(outer: str, directory: Path) -> Truth:
    return partial(_logits, tiny_vision.make_tiny_vision(outer, directory).model)


def _write_whisper(directory: Path) -> Truth:
    """Logits of what the decoder reads; the encoder has heard `RECORDING`."""
    directory.mkdir()
    model = tiny_whisper.make_whisper(directory)
    return lambda ids: tiny_whisper.logits(model, tiny_whisper.heard(RECORDING), ids)


def _write_gemma3n(directory: Path) -> Truth:
    """As the Hub has it, without its towers, which transformers has no code of its own for."""
    truth = _write_decoder("gemma3n_text", directory)
    weights, config = directory / "model.safetensors", directory / "config.json"
    tensors = load_file(weights)
    save_file({name.replace("model.", "model.language_model.", 1): x for name, x in tensors.items()}, weights)
    outer = {"model_type": "gemma3n", "architectures": ["Gemma3nForConditionalGeneration"]}
    config.write_text(json.dumps(outer | {"text_config": json.loads(config.read_text())}))
    return truth


def _all() -> dict[str, TinyModel]:
    decoders = {name: partial(_write_decoder, name) for name in hf_oracle.CASES if "-" not in name}
    encoders = {name: partial(_write_encoder, name) for name in encoder_oracle.CASES if "," not in name}
    halves = {f"{outer}_text": partial(_write_half, outer) for outer in HALVES}
    for name, (same, _) in ALIASES.items():
        (encoders if same in encoders else decoders)[name] = partial(_write_alias, name)
    writers: dict[Kind, dict[str, Callable[[Path], Any]]] = {
        "decoder": decoders | halves | {"gemma3n": _write_gemma3n},
        "images": {name: partial(tiny_vision.make_tiny_vision, name) for name in tiny_vision.MAKERS if "-" not in name},
        "encoder": encoders,
        "encoder-decoder": {name: partial(_write_encoder_decoder, name) for name in tiny_encdec.NAMES},
        "speech": {"whisper": _write_whisper},
    }
    return {name: TinyModel(name, kind, write) for kind in writers for name, write in sorted(writers[kind].items())}


MODEL_TYPES = _all()
