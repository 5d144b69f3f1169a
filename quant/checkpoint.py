"""A Hugging Face checkpoint on disk: its config, and its tensors by name, mapped and strictly accounted for.

It knows files and formats, not models: the caller asks for the layers that it needs, and `unread` returns the tensors
that nobody asked for. Weights must be safetensors files; pickles can run code and are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.quant.decoded_embeddings import decode_embeddings
from octavo.quant.decoded_layers import decode_layers
from octavo.quant.formats.compressed_tensors_config import CompressedTensorsConfig
from octavo.quant.formats.format import FormatError, QuantFormat, QuantizationConfig
from octavo.quant.formats.reading import DTYPES
from octavo.quant.formats.select import SUFFIXES, parse_quantization
from octavo.quant.formats.torchao import read_metadata
from octavo.quant.formats.transforms import NO_TRANSFORMS, Transforms, check_matrix
from octavo.quant.fused_experts import divide_experts
from octavo.quant.gguf.file import GGUF, open_gguf
from octavo.quant.model_files import CheckpointError, read_object
from octavo.quant.model_layout import NO_LAYOUTS, UNKNOWN, Layouts, ModelLayout
from octavo.quant.printable import shown, some
from octavo.quant.qparams import QuantizedWeight
from octavo.quant.safetensors_file import MAX_TENSORS, SafetensorsError, SafetensorsFile, TensorSpec
from octavo.quant.split_experts import split_experts
from octavo.quant.tensor_file import TensorFile

# The files where old GPTQ and AWQ writers, and ModelOpt, keep the quantization config.
SIDE_CONFIGS = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
KV_SCALES = (
    ("k_scale", "v_scale"),  # compressed-tensors
    ("attn.k_scale", "attn.v_scale"),  # vLLM's own names
    ("k_proj.k_scale", "v_proj.v_scale"),  # ModelOpt
    ("qkv_proj.k_scale", "qkv_proj.v_scale"),
    ("k_proj.output_scale", "v_proj.output_scale"),  # older compressed-tensors
    ("kv_scale", "kv_scale"),  # AutoFP8: one for both
    ("attn.kv_scale", "attn.kv_scale"),
)
KV_ENDINGS = tuple(f".{name}" for pair in KV_SCALES for name in pair)
MARKS = frozenset(("weight_scale", "weight_scale_inv", "weight_packed", "qweight", "blocks", "SCB", "_weight_qdata"))
"""Of a linear layer's tensors those that only quantized ones have; each format has one of them."""
QUANTIZATION_KEYS = ("quantization_config", "compression_config")  # of config.json; the second is older
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG_TYPES = {
    "model_type": str,
    "architectures": list,
    "text_config": dict,
    "quantization_config": dict,
    "compression_config": dict,
}
KINDS = {str: "a string", list: "an array", dict: "an object"}


class Checkpoint:
    """An open checkpoint. Tensors are views of mapped files: cheap to get; copy what you keep.

    config    config.json as stored
    layout    what its model type says about its files
    names     every tensor's name
    files     the shards, by name
    notes     findings while reading that a person should know
    source    what its plain weights were decoded from: a format's name, or all of a quantized checkpoint that
              `open_dequantized` decodes, 'gptq (int4/g32)'; else empty
    transforms  of the inputs of linear layers, which are done while serving
    """

    def __init__(
        self,
        directory: Path,
        config: dict[str, Any],
        files: Mapping[str, TensorFile],
        quantization: QuantizationConfig | None,
        layout: ModelLayout = UNKNOWN,
        *,
        source: str = "",
        transforms: Transforms = NO_TRANSFORMS,
    ) -> None:
        self.directory = directory
        self.config = config
        self.files = files
        self.quantization = quantization
        self.layout = layout
        self.source = source
        self.transforms = transforms
        self.notes: list[str] = []
        self._file_of = {name: file for file in files.values() for name in file.specs}
        self.names = frozenset(self._file_of)
        self._unread = set(self.names)
        self._suffixes: dict[str, list[str]] = {}
        for name in self._file_of:
            module, _, suffix = name.rpartition(".")
            if suffix in SUFFIXES:
                self._suffixes.setdefault(module, []).append(suffix)

    @classmethod
    def open(
        cls,
        directory: Path,
        layouts: Layouts = NO_LAYOUTS,
        *,
        as_original: bool = False,
        takes_transforms: bool = False,
    ) -> Checkpoint:
        """Read the config and all shards' headers, but no tensor. Raises CheckpointError.

        layouts: of the model types that are known. Fused experts of other types stay one tensor.
        as_original: as a quantizer takes it: all numbers of a GGUF file of the type that the config says, and experts
        of a type that `split_experts` knows one by one, even if layouts doesn't know it.
        takes_transforms: whoever opens it does what its `transforms` say, or needn't. Others are refused a checkpoint
        that has some, whose weights alone are another model.
        """
        if not directory.is_dir():
            raise CheckpointError(f"{directory} is not a directory")
        config, quantization_file = _read_configs(directory)
        files: Mapping[str, TensorFile]
        if (directory / GGUF).exists():
            _check_alone(directory)
            dtype = DTYPES.get(str(config.get("dtype")), torch.bfloat16) if as_original else None
            parts = open_gguf(directory / GGUF, dtype)
            kinds = {module: kind for part in parts.values() for module, kind in part.kinds.items()}
            files = parts
            config = config | {
                "quantization_config": None if as_original else {"quant_method": "gguf", "layers": kinds}
            }
        else:
            shards = _open_shards(directory, _find_shards(directory))
            config = _with_metadata(config, shards)
            files = shards
        layout = layouts.get(str(config.get("model_type")), UNKNOWN)
        try:
            if as_original or layout.experts is not None:
                files = split_experts(files, config)
            if layout.experts is not None:
                divide_experts(list(files.values()), layout.experts)
            files, decoded = decode_layers(files)
            quantization = _parse_quantization(config)
            files, of_embeddings = (files, []) if quantization is None else decode_embeddings(files, quantization)
            transforms = _taken(transforms_of(quantization), takes_transforms)
            checkpoint = cls(directory, config, files, quantization, layout, source=decoded, transforms=transforms)
            if decoded:
                checkpoint.notes.append(f"layers in {decoded}'s format are decoded while they are loaded")
            checkpoint.notes += [*of_embeddings, *transforms.notes]
            checkpoint._check_formats()
            checkpoint._check_matrices()
        except SafetensorsError as e:
            raise CheckpointError(f"{directory.name}: {e}") from e
        except FormatError as e:
            raise CheckpointError(f"{quantization_file}: {e}") from e
        return checkpoint

    def has(self, name: str) -> bool:
        return name in self._file_of

    def spec(self, name: str) -> TensorSpec:
        """Type and shape of a tensor, without reading it."""
        return self._file(name).specs[name]

    def tensor(self, name: str) -> Tensor:
        """A tensor as stored, as a view of the file. It counts as read from now on."""
        view = self._file(name).view(name)
        self._unread.discard(name)
        return view

    def unmap(self) -> None:
        """Forget what is mapped of the files; views that somebody has stay."""
        for file in set(self._file_of.values()):
            file.unmap()

    def leave(self, module: str) -> None:
        """Count a linear layer's tensors as read: they are somebody else's."""
        self._unread.difference_update(f"{module}.{suffix}" for suffix in (*self.suffixes(module), "bias"))

    def leave_all(self, beginnings: tuple[str, ...]) -> None:
        """Count tensors whose names begin so as read: they are somebody else's."""
        self._unread = {name for name in self._unread if not name.startswith(beginnings)}

    def linear(self, module: str) -> QuantizedWeight | Tensor:
        """The weight [N, K] of a linear layer, such as 'model.layers.0.self_attn.q_proj', quantized or plain."""
        format_ = self.format_of(module)
        if format_ is None:
            return self.tensor(f"{module}.weight")
        tensors = {s: self.tensor(f"{module}.{s}") for s in self.suffixes(module)}
        if not tensors:
            raise CheckpointError(f"{module}: the checkpoint has no weight for it")
        try:
            weight = format_.read(tensors)
        except FormatError as e:
            raise CheckpointError(f"{module}: {e}") from e
        if weight.note and weight.note not in self.notes:
            self.notes.append(weight.note)
        return weight

    def suffixes(self, module: str) -> list[str]:
        """The names of a linear layer's tensors in any format, without its bias: ['weight', 'weight_scale']."""
        return sorted(self._suffixes.get(module, ()), key=SUFFIXES.index)

    def format_of(self, module: str) -> QuantFormat | None:
        """The format of a linear layer; None if it isn't quantized. Raises FormatError for one that isn't supported."""
        return self.quantization.format_of(module, self.suffixes(module)) if self.quantization else None

    def stored_format_of(self, module: str) -> QuantFormat | None:
        """As `format_of`; None for a module without a quantized layer's tensors, such as a norm that patterns match."""
        return None if MARKS.isdisjoint(self.suffixes(module)) else self.format_of(module)

    @property
    def quantized(self) -> list[str]:
        """The linear layers whose tensors are those of quantized ones, sorted; what they mean the config says."""
        return sorted(module for module, suffixes in self._suffixes.items() if not MARKS.isdisjoint(suffixes))

    @property
    def kv_cache_dtype(self) -> str | None:
        """'fp8_e4m3' or 'int8' if the checkpoint has scales for a quantized KV cache, else None."""
        return self.quantization.kv_cache if self.quantization else None

    @property
    def kv_scale_names(self) -> list[str]:
        """The names of all scales of keys and values, sorted."""
        return sorted(name for name in self.names if name.endswith(KV_ENDINGS))

    def kv_scales(self, attention: str) -> tuple[Tensor | None, Tensor] | None:
        """The scales of an attention layer's keys and values, [1] or [num_kv_heads] float32; None if there are none.

        The keys' scale is None if only values are quantized. `attention` is the module's name, such as
        'model.layers.0.self_attn'; KV_SCALES lists the scales' names in it. Raises CheckpointError if only keys have
        a scale.
        """
        for key, value in KV_SCALES:
            names = [f"{attention}.{name}" for name in (key, value)]
            if not any(self.has(name) for name in names):
                continue
            if not self.has(names[1]):
                raise CheckpointError(f"{attention} has {key}, but no {value}")
            found = [self.tensor(name).float().flatten() if self.has(name) else None for name in names]
            assert found[1] is not None
            return found[0], found[1]
        return None

    def unread(self) -> list[str]:
        """The names of the tensors that nobody has asked for yet, sorted."""
        return sorted(self._unread)

    def _file(self, name: str) -> TensorFile:
        try:
            return self._file_of[name]
        except KeyError:
            raise CheckpointError(f"{self.directory.name} has no tensor {name}{self._hint(name)}") from None

    def _hint(self, name: str) -> str:
        """A likely reason why a tensor is missing."""
        module, _, suffix = name.rpartition(".")
        others = self.suffixes(module)
        if suffix == "weight" and others:
            return f", but {', '.join(others)}: its quantization_config doesn't say that {module} is quantized"
        return ""

    def _check_formats(self) -> None:
        """Refuse an unsupported scheme before anything is loaded, naming the layer that has it."""
        if self.quantization is not None:
            for module in self.quantized:
                self.format_of(module)

    def _check_matrices(self) -> None:
        """Refuse stored matrices of transforms that aren't the ones that are served; nobody reads them after that."""
        for name in [name for name in self.names if self.transforms.is_stored(name)]:
            check_matrix(name, self.tensor(name))


def transforms_of(quantization: QuantizationConfig | None) -> Transforms:
    """Those of a checkpoint's quantization config."""
    return quantization.transforms if isinstance(quantization, CompressedTensorsConfig) else NO_TRANSFORMS


def _taken(transforms: Transforms, are_taken: bool) -> Transforms:
    if transforms and not are_taken:
        raise FormatError(
            f"transform_config: {transforms.names} is done while serving; octavo serve, eval and quantize know that of "
            "decoders, and this doesn't"
        )
    return transforms


def read_config(directory: Path) -> dict[str, Any]:
    """config.json as a dict, with the quantization_config that some writers keep in a file beside it.

    Raises CheckpointError.
    """
    return _read_configs(directory)[0]


def _read_configs(directory: Path) -> tuple[dict[str, Any], Path]:
    """The dict of `read_config`, and the file that its quantization_config comes from."""
    path = directory / "config.json"
    try:
        config = read_object(path)
    except FileNotFoundError:
        raise CheckpointError(f"{directory} has no config.json: not a Hugging Face checkpoint") from None
    _check_types(config, path, "")
    _check_types(config.get("text_config") or {}, path, "text_config.")
    if quantization_dict(config) is None:
        for name, method in SIDE_CONFIGS.items():
            side = directory / name
            if side.exists():
                return config | {"quantization_config": {"quant_method": method} | read_object(side)}, side
    return config, path


def _check_types(owner: dict[str, Any], path: Path, prefix: str) -> None:
    for key, kind in CONFIG_TYPES.items():
        if not isinstance(owner.get(key), kind | None):
            raise CheckpointError(f"{path}: {prefix}{key} is {shown(owner[key])}; {KINDS[kind]} or null is needed")


def quantization_dict(config: dict[str, Any]) -> dict[str, Any] | None:
    """The quantization config, wherever config.json keeps it."""
    for owner in (config, config.get("text_config") or {}):
        for key in QUANTIZATION_KEYS:
            if owner.get(key) is not None:
                found: dict[str, Any] = owner[key]
                return found
    return None


def _parse_quantization(config: dict[str, Any]) -> QuantizationConfig | None:
    raw = quantization_dict(config)
    return None if raw is None else parse_quantization(raw)


def _with_metadata(config: dict[str, Any], shards: Mapping[str, SafetensorsFile]) -> dict[str, Any]:
    """The config with what torchao keeps in its files' metadata."""
    raw = quantization_dict(config)
    if raw is None or raw.get("quant_method") != "torchao":
        return config
    return config | {"quantization_config": read_metadata(raw, shards)}


def _find_shards(directory: Path) -> dict[str, list[str] | None]:
    """The shards' file names, each with the tensors that the index lists for it (None without an index)."""
    if (directory / SINGLE).is_file():
        return {SINGLE: None}
    if (directory / INDEX).is_file():
        return _read_index(directory)
    present = sorted(path.name for path in directory.iterdir() if path.is_file())
    safetensors = [name for name in present if name.endswith(".safetensors")]
    if len(safetensors) == 1:
        return {safetensors[0]: None}
    if safetensors:
        raise CheckpointError(f"{directory} has {some(safetensors)} but neither {SINGLE} nor {INDEX}")
    pickles = [name for name in present if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        raise CheckpointError(
            f"{directory} has its weights in pickle files ({some(pickles)}), which can run code when they are "
            "loaded and are not read; convert them with transformers' save_pretrained"
        )
    raise CheckpointError(f"{directory} has no safetensors file")


def _check_alone(directory: Path) -> None:
    """A GGUF file is a model by itself: which of two is meant can't be known."""
    others = sorted(path.name for path in directory.iterdir() if path.name.endswith((".safetensors", INDEX)))
    if others:
        raise CheckpointError(
            f"{directory} has {GGUF} and {some(others)}: two models; name {directory / GGUF} itself, or remove one"
        )


def _read_index(directory: Path) -> dict[str, list[str] | None]:
    path = directory / INDEX
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{path} has no weight_map from tensors' names to files' names, as an index has")
    shards: dict[str, list[str] | None] = {}
    for name, file in sorted(weight_map.items(), key=lambda item: (item[1], item[0])):
        if file != Path(file).name or not file.endswith(".safetensors") or "\0" in file:
            raise CheckpointError(f"{path} names {shown(file)}, which is not a safetensors file beside it")
        listed = shards.setdefault(file, [])
        assert listed is not None
        listed.append(name)
    missing = [file for file in shards if not (directory / file).is_file()]
    if missing:
        raise CheckpointError(f"{INDEX} names {some(missing)}, not in {directory}: the download is incomplete")
    return shards


def _open_shards(directory: Path, shards: dict[str, list[str] | None]) -> dict[str, SafetensorsFile]:
    files: dict[str, SafetensorsFile] = {}
    seen: dict[str, str] = {}
    for name, listed in shards.items():
        try:
            file = SafetensorsFile(directory / name)
        except (SafetensorsError, OSError) as e:
            raise CheckpointError(f"{directory.name}: {e}") from e
        absent = [tensor for tensor in listed or () if tensor not in file.specs]
        if absent:
            raise CheckpointError(f"{name} lacks {some(absent)}, which {INDEX} says it has")
        twice = [tensor for tensor in file.specs if tensor in seen]
        if twice:
            raise CheckpointError(f"{name} and {seen[twice[0]]} both have {some(twice)}")
        seen.update(dict.fromkeys(file.specs, name))
        if len(seen) > MAX_TENSORS:
            raise CheckpointError(
                f"{directory}: the shards as far as {name} have {len(seen):,} tensors; {MAX_TENSORS:,} are the most "
                "that a checkpoint may have"
            )
        files[name] = file
    if not seen:
        raise CheckpointError(f"{directory} has safetensors files or an index, but no tensor is in them")
    return files
