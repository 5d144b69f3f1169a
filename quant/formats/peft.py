"""LoRA adapters as PEFT writes them: adapter_config.json and adapter_model.safetensors.

Both files may be anybody's. What an adapter asks for is honored exactly, or refused by name: a key of the config that
changes what the adapter computes, and a tensor that nothing reads, are errors. Pickles are never opened. Facts of the
format: PEFT 0.21, `LoraConfig` and `check_target_module_exists`.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from octavo.quant.adapter_files import CONFIG, TENSORS, AdapterError, regular
from octavo.quant.formats.format import FormatError
from octavo.quant.formats.patterns import Regexes
from octavo.quant.model_files import read_object
from octavo.quant.printable import printable, shown, some
from octavo.quant.safetensors_file import SafetensorsError, SafetensorsFile, TensorSpec

ALL_LINEAR = "all-linear"
MAX_RANK = 1 << 16
MAX_NUMBERS = 100_000  # of layers, and of patterns

Bias = Literal["none", "all", "lora_only"]

# What changes nothing about an adapter that has been trained.
_NO_MATTER = (
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode",
    "lora_dropout", "lora_ga_config", "loftq_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type", "velora_config",
)  # fmt: skip
_READ = (
    "alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "lora_alpha", "peft_type", "r", "rank_pattern", "target_modules", "target_parameters", "use_dora", "use_rslora",
)  # fmt: skip
# Initializations that take what they put into A and B out of the base's own weights.
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+?)\."
    r"(?:(?P<low>lora_A|lora_B)\.weight|(?P<table>lora_embedding_A|lora_embedding_B)|base_layer\.(?P<own>weight)"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.weight)?|(?:base_layer\.)?(?P<bias>bias))"
)


@dataclass(frozen=True)
class LoraConfig:
    """What adapter_config.json says. `where` names the file.

    target_modules  names, or endings of names behind a dot; a regex; "all-linear"
    target_parameters  names, or endings, of parameters that are no linear layer's: a mixture's experts in one tensor
    layers          None: all of them
    """

    where: str
    r: int
    lora_alpha: float
    use_rslora: bool = False
    use_dora: bool = False
    bias: Bias = "none"
    target_modules: tuple[str, ...] | str = ()
    target_parameters: tuple[str, ...] = ()
    exclude_modules: tuple[str, ...] | str = ()
    layers: frozenset[int] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def selects(self, module: str) -> bool:
        """Whether PEFT puts an adapter beside this linear layer, or embedding."""
        if _is_among(module, self.exclude_modules, f"{self.where}: exclude_modules"):
            return False
        if self.target_modules == ALL_LINEAR:
            return module.rpartition(".")[2] not in ("lm_head", "embed_tokens")
        if not _is_among(module, self.target_modules, f"{self.where}: target_modules"):
            return False
        if self.layers is None or isinstance(self.target_modules, str) or module in self.target_modules:
            return True
        layer = re.match(r".*?\.[^.]*\.(\d+)\.", module)
        return layer is not None and int(layer[1]) in self.layers

    def selects_parameter(self, name: str) -> bool:
        """Whether PEFT puts an adapter beside this parameter."""
        return any(name == one or name.endswith(f".{one}") for one in self.target_parameters)

    def rank(self, module: str) -> int:
        """The rank of a module's A and B."""
        return self.rank_pattern.get(self._key_of(module, self.rank_pattern, "rank_pattern"), self.r)

    def scale(self, module: str) -> float:
        """What x A^T B^T is multiplied by."""
        alpha = self.alpha_pattern.get(self._key_of(module, self.alpha_pattern, "alpha_pattern"), self.lora_alpha)
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def _key_of(self, module: str, patterns: Mapping[str, object], key: str) -> str:
        """The first pattern that is a regex of the module's name, or of what is behind a dot in it."""
        where = f"{self.where}: {key}"
        return next((p for p in patterns if _regex(rf"(.*\.)?({p})$", where).match(module)), module)


def _is_among(module: str, names: tuple[str, ...] | str, where: str) -> bool:
    if isinstance(names, str):
        if names.startswith(("(?=", "(?!", "^(?=", "^(?!")):
            return _regex(rf"{names}\z", where).match(module)
        return _regex(rf"(?:{names})\z", where).match(module)
    return any(module == name or module.endswith(f".{name}") for name in names)


@lru_cache(maxsize=4096)
def _regex(pattern: str, where: str) -> Regexes:
    file, _, key = where.rpartition(": ")
    try:
        return Regexes([pattern], key, file)
    except FormatError as error:
        raise AdapterError(str(error)) from None


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter's directory, read as far as to check it: tensors are read when they are asked for.

    modules  of each module, by its name in transformers' model: its tensors by what they are: lora_A, lora_B,
             lora_embedding_A, lora_embedding_B, lora_magnitude_vector, bias, and weight, a copy of the base's own
    """

    directory: Path
    config: LoraConfig
    modules: Mapping[str, Mapping[str, str]]
    file: SafetensorsFile

    def spec(self, module: str, kind: str) -> TensorSpec | None:
        """The type and shape of a module's tensor; None where there is none."""
        name = self.modules[module].get(kind)
        return None if name is None else self.file.specs[name]

    def read(self, module: str, kind: str) -> Tensor:
        """A tensor, all of it finite. Raises AdapterError."""
        name = self.modules[module][kind]
        tensor = self.file.read(name)
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{self.directory / TENSORS}: {printable(name, 200)} has numbers that are not finite")
        return tensor


def open_adapter(directory: Path) -> AdapterFiles:
    """Read an adapter's config and the header of its tensors. Raises AdapterError."""
    config = read_config(directory)
    path = regular(directory / TENSORS)
    try:
        file = SafetensorsFile(path)
    except SafetensorsError as error:
        raise AdapterError(f"{directory}: {error}") from None
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    for name, spec in file.specs.items():
        match = _KEY.fullmatch(name)
        if match is None:
            raise AdapterError(f"{path}: {_unknown(name)}")
        kind = match["low"] or match["table"] or match["own"] or match["magnitude"] or match["bias"]
        if kind in modules[match["module"]]:
            raise AdapterError(f"{path}: {printable(name, 200)} is there twice, under two names")
        if spec.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise AdapterError(
                f"{path}: {printable(name, 200)} is {spec.dtype}; float32, bfloat16 and float16 are read"
            )
        modules[match["module"]][kind] = name
    if not modules:
        raise AdapterError(f"{path} has no tensors")
    return AdapterFiles(directory, config, dict(modules), file)


def _unknown(name: str) -> str:
    said = printable(name, 200)
    if "lora_B.bias" in name:
        return f"{said}: a bias of lora_B (lora_bias) is not served"
    if ".modules_to_save" in name or name.endswith(("embed_tokens.weight", "lm_head.weight")):
        return f"{said}: whole modules beside the adapter (modules_to_save) are not served"
    return f"{said} is no tensor of a LoRA adapter that is known here"


def read_config(directory: Path) -> LoraConfig:
    """adapter_config.json. Raises AdapterError for what can't be honored, by the key's name."""
    path = regular(directory / CONFIG)
    values = read_object(path)
    where = str(path)
    kind = values.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{where}: peft_type is {shown(kind)}; LORA is served")
    unknown = [key for key, value in values.items() if key not in (*_READ, *_NO_MATTER) and value]
    if unknown:
        key = unknown[0]
        raise AdapterError(f"{where}: {printable(key, 100)} is {shown(values[key])}, which is not served")
    init = values.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGE_BASE):
        raise AdapterError(
            f"{where}: init_lora_weights is {shown(init)}, whose adapters change the base's weights too; save it as a "
            "plain one (PEFT's path_initial_model_for_weight_conversion)"
        )
    if values.get("layers_pattern") not in (None, "", [], "layers", ["layers"]):
        raise AdapterError(f"{where}: layers_pattern is {shown(values['layers_pattern'])}; 'layers' works")
    bias = values.get("bias", "none")
    if bias not in get_args(Bias):
        raise AdapterError(f"{where}: bias is {shown(bias)}; {', '.join(get_args(Bias))} are known")
    targets = _names(values, "target_modules", where)
    parameters = _names(values, "target_parameters", where)
    if isinstance(parameters, str):
        raise AdapterError(f"{where}: target_parameters is {shown(parameters)}; it must be a list of names")
    if not targets and not parameters:
        raise AdapterError(f"{where}: target_modules names nothing")
    return LoraConfig(
        where,
        r=_rank(values.get("r"), "r", where),
        lora_alpha=_number(values.get("lora_alpha"), "lora_alpha", where),
        use_rslora=_truth(values, "use_rslora", where),
        use_dora=_truth(values, "use_dora", where),
        bias=bias,
        target_modules=targets,
        target_parameters=parameters,
        exclude_modules=_names(values, "exclude_modules", where),
        layers=_layers(values.get("layers_to_transform"), where),
        rank_pattern={
            k: _rank(v, f"rank_pattern of {shown(k)}", where) for k, v in _object(values, "rank_pattern", where)
        },
        alpha_pattern={
            k: _number(v, f"alpha_pattern of {shown(k)}", where) for k, v in _object(values, "alpha_pattern", where)
        },
    )


def _rank(value: Any, key: str, where: str) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise AdapterError(f"{where}: {key} is {shown(value)}; it must be an integer from 1 to {MAX_RANK}")
    return value


def _number(value: Any, key: str, where: str) -> float:
    if type(value) not in (int, float) or not abs(value) <= 1e30:  # NaN is not
        raise AdapterError(f"{where}: {key} is {shown(value)}; it must be a finite number")
    return float(value)


def _truth(values: Mapping[str, Any], key: str, where: str) -> bool:
    value = values.get(key)
    if value not in (None, True, False):
        raise AdapterError(f"{where}: {key} is {shown(value)}; it must be true or false")
    return bool(value)


def _object(values: Mapping[str, Any], key: str, where: str) -> list[tuple[str, Any]]:
    value = values.get(key) or {}
    if not isinstance(value, dict) or len(value) > MAX_NUMBERS:
        raise AdapterError(f"{where}: {key} is {shown(value)}; it must be an object of patterns")
    return list(value.items())


def _names(values: Mapping[str, Any], key: str, where: str) -> tuple[str, ...] | str:
    value = values.get(key) or ()
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise AdapterError(f"{where}: {key} is {shown(value)}; it must be a list of names, or a regex")
    return tuple(value)


def _layers(value: Any, where: str) -> frozenset[int] | None:
    if value is None or value == []:
        return None
    listed = value if isinstance(value, list) else [value]
    if len(listed) > MAX_NUMBERS or not all(type(number) is int and number >= 0 for number in listed):
        raise AdapterError(f"{where}: layers_to_transform is {shown(value)}; it must be numbers of layers")
    return frozenset(listed)


def missing(files: AdapterFiles, modules: list[str]) -> str:
    """The modules, of these, that the config selects and that have no tensors, for a message; "" for none."""
    absent = [name for name in modules if "lora_A" not in files.modules.get(name, {}) and files.config.selects(name)]
    return some(absent) if absent else ""
