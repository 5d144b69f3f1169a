"""What sentence-transformers keeps beside a checkpoint: modules.json, and the config of each module it names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from octavo.quant.model_files import read_json, read_object, read_object_if_any
from octavo.quant.safetensors_file import SafetensorsFile
from octavo.runtime.model.pooling import PROJECTION_ACTIVATIONS, PoolingKind, Projection
from octavo.runtime.model.sources import LoadError

MODULES = "modules.json"
DENSE_NEUTRAL: dict[str, tuple[object, ...]] = {  # keys of a Dense module, and the values that change nothing
    "use_residual": (None, False),
    "module_input_name": (None, "sentence_embedding"),
    "module_output_name": (None, "sentence_embedding"),
}
_MODES: dict[str, PoolingKind] = {  # in the order in which sentence-transformers puts vectors side by side
    "cls": "cls",
    "cls_token": "cls",
    "max": "max",
    "max_tokens": "max",
    "mean": "mean",
    "mean_tokens": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "weightedmean_tokens": "weighted_mean",
    "lasttoken": "last",
}


@dataclass(frozen=True)
class SentenceModules:
    """What modules.json says follows the model.

    kinds        of its pooling; (): there is none, and vectors are a cross-encoder's
    projections  of its Dense modules
    normalizes   it ends in Normalize
    max_length   the longest text, of sentence_bert_config.json; None: the model's own
    """

    kinds: tuple[PoolingKind, ...]
    projections: tuple[Projection, ...]
    normalizes: bool
    max_length: int | None


def read_modules(directory: Path) -> SentenceModules | None:
    """Read what there is; None without a modules.json. Raises LoadError for a module that isn't known here."""
    file = directory / MODULES
    if not file.exists():
        return None
    listed = read_json(file)
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise LoadError(f"{file} is no list of modules")
    kinds: tuple[PoolingKind, ...] = ()
    projections: list[Projection] = []
    normalizes = False
    length = None
    for module in listed:
        kind = str(module.get("type")).rpartition(".")[2]
        place = directory / str(module.get("path", ""))
        match kind:
            case "Transformer":
                length = _max_length(place)
            case "Pooling":
                kinds = _kinds(place / "config.json")
            case "Dense":
                projections.append(_dense(place))
            case "Normalize":
                normalizes = True
            case _:
                raise LoadError(f"{file}: module {kind} is unknown; known are Transformer, Pooling, Dense, Normalize")
    return SentenceModules(kinds, tuple(projections), normalizes, length)


def _max_length(directory: Path) -> int | None:
    """Of any of the names that the file has had."""
    for name in ("bert", "roberta", "distilbert", "camembert", "xlm-roberta", "xlnet"):
        config = read_object_if_any(directory / f"sentence_{name}_config.json")
        length = config.get("max_seq_length")
        if isinstance(length, int) and length > 0:
            return length
    return None


def _kinds(file: Path) -> tuple[PoolingKind, ...]:
    config = read_object(file)
    named = config.get("pooling_mode")
    modes = [named] if isinstance(named, str) else named or []
    modes += [mode for mode in _MODES if config.get(f"pooling_mode_{mode}")]
    if config.get("include_prompt") is False:
        raise LoadError(
            f"{file}: include_prompt false leaves a prompt's tokens out of the mean, which is not supported"
        )
    if unknown := [mode for mode in modes if mode not in _MODES]:
        raise LoadError(f"{file}: pooling mode {unknown[0]!r} is unknown; known are {', '.join(_MODES)}")
    kinds = tuple(dict.fromkeys(_MODES[mode] for mode in modes))
    if not kinds:
        raise LoadError(f"{file} names no way of pooling")
    return kinds


def _dense(directory: Path) -> Projection:
    config = read_object(directory / "config.json")
    for key, neutral in DENSE_NEUTRAL.items():
        if config.get(key) not in neutral:
            raise LoadError(f"{directory / 'config.json'}: {key} {config[key]!r} is not supported")
    file = directory / "model.safetensors"
    if not file.exists():
        raise LoadError(f"{file} is missing: a Dense module's weights are read from safetensors alone")
    tensors = SafetensorsFile(file)
    weight = tensors.view("linear.weight").to(torch.float32, copy=True)
    bias = tensors.view("linear.bias").to(torch.float32, copy=True) if "linear.bias" in tensors.specs else None
    return Projection(weight, bias, activation_name(config, file))


def activation_name(config: Mapping[str, Any], file: Path) -> str:
    """The activation of a Dense module, which its config calls by the class's full name."""
    name = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2].lower()
    if name not in PROJECTION_ACTIVATIONS:
        raise LoadError(
            f"{file}: activation_function {name!r} is unknown; known are {', '.join(PROJECTION_ACTIVATIONS)}"
        )
    return name
