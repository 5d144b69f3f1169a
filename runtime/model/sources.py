"""Where a decoder's weights come from: a checkpoint on disk, or a random generator (--load-format dummy).

Both answer the same questions by the tensor names that Hugging Face uses, and check each answer's shape.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from octavo.quant.checkpoint import Checkpoint, quantization_dict, transforms_of
from octavo.quant.formats.select import parse_quantization
from octavo.quant.formats.transforms import Transforms
from octavo.quant.qparams import QuantizedWeight, Weight, quantize_weight
from octavo.quant.scheme import QuantScheme

# The last is of a model without a head.
PREFIXES = ("model.", "language_model.model.", "model.language_model.", "model.text_model.", "backbone.", "")
EMBEDDINGS = ("embed_tokens", "embeddings")  # by either name

# Tensors that some writers store and no decoder here needs. Anything else that is left unread is an error.
UNUSED_SUFFIXES = (
    ".rotary_emb.inv_freq",
    ".self_attn.q_scale",
    ".self_attn.attn.q_scale",
    ".embeddings.position_ids",
)
_TOWERS = (
    "vision_tower.",
    "vision_model.",
    "visual.",
    "multi_modal_projector.",
    "connector.",
    "image_newline",
    "embed_vision.",
)
_SOUNDS = ("audio_tower.", "embed_audio.")
SOUND_PREFIXES = (*_SOUNDS, *(f"model.{tower}" for tower in _SOUNDS))
TOWER_PREFIXES = (*_TOWERS, *(f"model.{tower}" for tower in _TOWERS), *SOUND_PREFIXES)


class LoadError(ValueError):
    """Weights that don't make the model that the config describes; the message names them."""


class Source(Protocol):
    """The weights of one model, by name; `prefix` stands before layer and embedding names."""

    prefix: str

    def has(self, module: str) -> bool:
        """Whether there is any tensor of a module."""
        ...

    def linear(self, module: str, out_features: int, in_features: int) -> Weight:
        """The weight of a linear layer, in memory of its own."""
        ...

    def leave(self, module: str, out_features: int, in_features: int) -> None:
        """Instead of `linear` and `bias`: another rank has this layer, and nothing of it is read."""
        ...

    def is_quantized(self, module: str) -> bool:
        """Whether there are codes of a linear layer, and not only a plain weight or nothing."""
        ...

    def bias(self, module: str, out_features: int, *, expected: bool) -> Tensor | None:
        """A layer's bias, where the architecture has one."""
        ...

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A plain tensor, in memory of its own or a view of the file: to be copied by who keeps it."""
        ...

    @property
    def transforms(self) -> Transforms:
        """Of the inputs of linear layers, which are done while serving."""
        ...


class CheckpointSource:
    """Weights out of an open checkpoint, each asked for once."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        found = (p for p in PREFIXES if any(checkpoint.has(f"{p}{name}.weight") for name in EMBEDDINGS))
        self.prefix = next(found, PREFIXES[0])
        self._modules = frozenset(name.rpartition(".")[0] for name in checkpoint.names)

    @property
    def transforms(self) -> Transforms:
        return self.checkpoint.transforms

    def has(self, module: str) -> bool:
        return module in self._modules

    def linear(self, module: str, out_features: int, in_features: int) -> Weight:
        weight = self.checkpoint.linear(module)
        check_shape(f"{module}.weight", weight.shape, (out_features, in_features))
        if isinstance(weight, Tensor):
            _check_float(f"{module}.weight", weight)
            return weight.clone()
        return dataclasses.replace(weight, codes=weight.codes.clone(), scale=weight.scale.clone())

    def dense(self, module: str, out_features: int, in_features: int) -> tuple[Tensor, Tensor | None]:
        """The float32 weight of a linear layer, quantized or not, and its bias where the checkpoint has one."""
        weight = self.linear(module, out_features, in_features)
        if isinstance(weight, QuantizedWeight):
            weight = weight.dequantize()
        has_bias = self.checkpoint.has(f"{module}.bias")
        bias = self.bias(module, out_features, expected=True) if has_bias else None
        return weight.float(), None if bias is None else bias.float()

    def leave(self, module: str, out_features: int, in_features: int) -> None:  # noqa: ARG002
        self.checkpoint.leave(module)

    def is_quantized(self, module: str) -> bool:
        return any(suffix != "weight" for suffix in self.checkpoint.suffixes(module))

    def scheme(self, module: str) -> QuantScheme | None:
        """The scheme of a linear layer by config and names alone; None: its weight isn't quantized."""
        format_ = self.checkpoint.stored_format_of(module)
        return None if format_ is None else format_.scheme

    def bias(self, module: str, out_features: int, *, expected: bool) -> Tensor | None:
        name = f"{module}.bias"
        if not expected and not self.checkpoint.has(name):
            return None
        bias = self.tensor(name, (out_features,))
        if expected:
            return bias.clone()
        if bias.any():
            raise LoadError(f"{name} isn't zero, but this architecture has no bias there")
        return None  # AutoGPTQ writes zeros for layers without a bias

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self.checkpoint.tensor(name)
        check_shape(name, tensor.shape, shape)
        _check_float(name, tensor)
        return tensor

    def require(self, modules: Iterable[str]) -> None:
        """Raise LoadError with the names of all modules of which the checkpoint has no tensor."""
        if missing := [module for module in modules if not self.has(module)]:
            raise LoadError(f"the checkpoint has no weights for {some(missing)}")

    def leave_layers(self, first: int, count: int) -> list[str]:
        """Count the tensors of so many layers as read; the names of those layers of which there are any."""
        layer = re.compile(rf"{re.escape(self.prefix)}layers\.(\d{{1,10}})\.")
        indexes = sorted({int(match[1]) for module in self._modules if (match := layer.match(module))})
        found = [f"{self.prefix}layers.{index}" for index in indexes if first <= index < first + count]
        self.checkpoint.leave_all(tuple(f"{name}." for name in found))
        return found

    def leave_modules(self, modules: Iterable[str]) -> list[str]:
        """Count the tensors of these as read; returns those of which there are any."""
        found = [module for module in modules if self.has(module)]
        for module in found:
            self.checkpoint.leave(module)
        return found

    def leave_named(self, begins: tuple[str, ...]) -> list[str]:
        """Count tensors whose names begin so as read; those of the beginnings of which there are any."""
        found = [begin for begin in begins if any(name.startswith(begin) for name in self.checkpoint.names)]
        self.checkpoint.leave_all(tuple(found))
        return found

    def check_complete(self, *, tied: bool, towers: tuple[str, ...] = (), has_mtp: bool = False) -> list[str]:
        """Raise LoadError with the names of tensors that nothing read; return those of towers that were skipped.

        towers: how the names begin of those that aren't loaded. has_mtp: there is a head among them, which is loaded by
        who drafts with it (runtime/speculation).
        """
        unread = self.checkpoint.unread()
        skipped = [name for name in unread if name.startswith(towers)]
        harmless = {name for name in unread if name.endswith(UNUSED_SUFFIXES)} | set(skipped)
        if has_mtp:
            harmless |= {name for name in unread if name.startswith(f"{self.prefix}mtp_layers.")}
        if tied:
            harmless |= {"lm_head.weight", "language_model.lm_head.weight"}  # the embedding serves instead
        if left := [name for name in unread if name not in harmless]:
            raise LoadError(f"the checkpoint has tensors that this architecture doesn't: {some(left)}")
        return skipped


class DummySource:
    """Random weights in the shapes, and the quantization, that a config asks for: for measuring speed, not quality.

    They are generated on the device: for 70B one core would take minutes.
    """

    prefix = PREFIXES[0]

    def __init__(self, config: dict[str, Any], dtype: torch.dtype, device: torch.device, seed: int) -> None:
        quantization = quantization_dict(config)
        self._quantization = parse_quantization(quantization) if quantization is not None else None
        self.transforms = transforms_of(self._quantization)
        self._dtype = dtype
        self._device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def has(self, module: str) -> bool:  # noqa: ARG002
        return False

    def linear(self, module: str, out_features: int, in_features: int) -> Weight:
        weight = self.tensor(module, (out_features, in_features))
        scheme = self.scheme(module)
        if scheme is None:
            return weight
        activation = scheme.activation
        static = activation is not None and activation.has_stored_scale
        quantized = quantize_weight(weight, scheme, "absmax")
        input_scale = torch.ones((), device=self._device) if static else None
        return dataclasses.replace(quantized, input_scale=input_scale)

    def leave(self, module: str, out_features: int, in_features: int) -> None:
        """Draws the numbers all the same: what is drawn next must be the same on every rank."""
        self.tensor(module, (out_features, in_features))

    def is_quantized(self, module: str) -> bool:  # noqa: ARG002
        return False

    def scheme(self, module: str) -> QuantScheme | None:
        """As the config has it."""
        format_ = self._quantization.format_of(module) if self._quantization else None
        return None if format_ is None else format_.scheme

    def bias(self, module: str, out_features: int, *, expected: bool) -> Tensor | None:
        return self.tensor(module, (out_features,)) if expected else None

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:  # noqa: ARG002
        empty = torch.empty(shape, dtype=self._dtype, device=self._device)
        return empty.normal_(0.0, 0.02, generator=self._generator)


def check_shape(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if tuple(shape) != wanted:
        raise LoadError(f"{name} is {list(shape)} in the checkpoint; config.json makes it {list(wanted)}")


def _check_float(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that isn't a float: codes without a scheme mean nothing."""
    if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise LoadError(f"{name} is {tensor.dtype}, and config.json doesn't say that it is quantized")


def some(names: list[str], most: int = 8) -> str:
    """The first few of many names."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
