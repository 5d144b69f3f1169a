"""A quantized checkpoint as the plain one that its numbers stand for, each layer decoded when it is asked for.

It is what a quantizer takes for the original of a model that is there only quantized, and compares its result with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.kernels.hadamard.reference import hadamard
from octavo.quant.checkpoint import QUANTIZATION_KEYS, Checkpoint
from octavo.quant.derived_file import Derived, DerivedFile
from octavo.quant.formats.format import FormatError, QuantFormat
from octavo.quant.formats.reading import FLOATS
from octavo.quant.model_files import CheckpointError
from octavo.quant.model_layout import NO_LAYOUTS, Layouts
from octavo.quant.safetensors_file import TensorSpec
from octavo.quant.tensor_file import TensorFile


def open_dequantized(directory: Path, layouts: Layouts = NO_LAYOUTS) -> Checkpoint:
    """`Checkpoint.open`, with a plain `{layer}.weight` in place of each quantized layer's tensors, and experts split.

    Its numbers are of the type that most of the checkpoint's plain numbers have; a GGUF file's are float16 or float32
    where all matrices are, else bfloat16. Scales of inputs and of a KV cache are left out, transforms of inputs are
    taken out of the weights, and `source` says what the layers were. Raises CheckpointError.
    """
    checkpoint = Checkpoint.open(directory, layouts, as_original=True, takes_transforms=True)
    if checkpoint.quantization is None:
        return checkpoint
    dtype = _plain_dtype(checkpoint)
    formats = _formats(checkpoint)
    hidden = {f"{module}.{suffix}" for module in formats for suffix in checkpoint.suffixes(module)}
    hidden |= set(checkpoint.kv_scale_names)
    hidden |= {name for name in checkpoint.names if checkpoint.transforms.is_stored(name)}
    rotated = _rotated(checkpoint, formats)
    hidden |= rotated
    missing = set(formats)
    files: dict[str, TensorFile] = {}
    for shard, file in checkpoint.files.items():
        begun = missing & {name.rpartition(".")[0] for name in file.specs}  # the rest may lie in another shard
        missing -= begun
        layers = {f"{module}.weight": _layer(checkpoint, module, formats[module], dtype) for module in sorted(begun)}
        layers |= {name: _plain(checkpoint, name) for name in sorted(rotated & file.specs.keys())}
        files[shard] = DerivedFile(file, layers, hidden)
    config = without_quantization(checkpoint.config)
    schemes = dict.fromkeys(str(format_.scheme) for format_ in formats.values())
    source = f"{checkpoint.quantization.name} ({', '.join(schemes)})" if schemes else checkpoint.source
    return Checkpoint(directory, config, files, None, checkpoint.layout, source=source)


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without the keys that tell of quantization."""
    plain = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
    if isinstance(text := plain.get("text_config"), dict):
        plain["text_config"] = {key: value for key, value in text.items() if key not in QUANTIZATION_KEYS}
    return plain


def _formats(checkpoint: Checkpoint) -> dict[str, QuantFormat]:
    """The format of each layer that is quantized."""
    found = {module: checkpoint.format_of(module) for module in checkpoint.quantized}
    return {module: format_ for module, format_ in found.items() if format_ is not None}


def _rotated(checkpoint: Checkpoint, formats: Mapping[str, QuantFormat]) -> set[str]:
    """The names of plain weights whose inputs are transformed while serving."""
    if not checkpoint.transforms:
        return set()
    found = {name for name in checkpoint.names if name.endswith(".weight") and len(checkpoint.spec(name).shape) == 2}
    found = {name for name in found if name.removesuffix(".weight") not in formats}
    transforms = checkpoint.transforms
    return {n for n in found if transforms.block_of(n.removesuffix(".weight"), checkpoint.spec(n).shape[1]) is not None}


def _plain(checkpoint: Checkpoint, name: str) -> Derived:
    spec = checkpoint.spec(name)
    return Derived(spec, _decoder(checkpoint, name.removesuffix(".weight"), spec.dtype))


def _plain_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The type of most numbers that aren't quantized; scales aside, which some writers have in another."""
    numbers: Counter[torch.dtype] = Counter()
    for name in checkpoint.names:
        spec = checkpoint.spec(name)
        if name.endswith(".weight") and spec.dtype in FLOATS:
            numbers[spec.dtype] += spec.numel
    return numbers.most_common(1)[0][0] if numbers else torch.bfloat16


def _layer(checkpoint: Checkpoint, module: str, format_: QuantFormat, dtype: torch.dtype) -> Derived:
    tensors = {suffix: checkpoint.tensor(f"{module}.{suffix}") for suffix in checkpoint.suffixes(module)}
    try:
        shape = format_.shape(tensors)
    except FormatError as e:
        raise CheckpointError(f"{module}: {e}") from e
    return Derived(TensorSpec(dtype, shape), _decoder(checkpoint, module, dtype))


def _decoder(checkpoint: Checkpoint, module: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    def decode() -> Tensor:
        weight = checkpoint.linear(module)
        block = checkpoint.transforms.block_of(module, weight.shape[1])
        if block is not None:
            weight = hadamard(weight.float() if isinstance(weight, Tensor) else weight.dequantize(), block)
        return weight.to(dtype) if isinstance(weight, Tensor) else weight.dequantize(dtype)

    return decode
