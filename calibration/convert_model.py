"""A quantized checkpoint in, the same integers and scales in another format out, or a refusal that says why not.

Nothing is rounded. Before anything is written, each layer is written and read back in memory and compared with what the
source says, so what a format can't carry (an order of columns, a zero point, a scale beyond its type) is found at once
and not in the middle. Of the source one layer is held at a time; the result is made in a directory beside its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.calibration.auxiliary_files import copy_files, other_files, without_paths, write_json
from octavo.calibration.choices import Format
from octavo.calibration.gguf_output import FILE_TYPES
from octavo.calibration.layers import EMBEDDING, QuantizeError
from octavo.calibration.prepare import SMALL_FILES
from octavo.calibration.progress import Progress, silent
from octavo.calibration.workspace import MakeWriter, Workspace, check_output, check_space, recover, workspace
from octavo.quant.checkpoint import INDEX, SINGLE, Checkpoint
from octavo.quant.dequantized import without_quantization
from octavo.quant.formats.awq import AWQFormat, write_awq_config
from octavo.quant.formats.compressed_tensors import format_for, write_config
from octavo.quant.formats.format import FormatError, QuantFormat
from octavo.quant.formats.fp8 import Fp8Format, write_fp8_config
from octavo.quant.formats.gguf import GGUFFormat, kind_of
from octavo.quant.formats.gptq import GPTQFormat, write_gptq_config
from octavo.quant.formats.reading import FLOATS
from octavo.quant.gguf.file import GGUF
from octavo.quant.gguf.layout import make_layout
from octavo.quant.gguf.writer import GGUFLayout, GGUFWriter
from octavo.quant.model_files import CheckpointError
from octavo.quant.model_layout import NO_LAYOUTS, Layouts
from octavo.quant.qparams import QuantizedWeight
from octavo.quant.safetensors_file import PlacedWriter, SafetensorsWriter, TensorSpec
from octavo.quant.scheme import KVScheme, QuantScheme
from octavo.quant.shard import regroup

GGUF_GROUP = 32  # columns that share a scale of Q4_0 and Q8_0

NO_INTEGERS = "the model has no quantized layer whose integers could be converted: octavo quantize makes them"


@dataclass(frozen=True)
class Converted:
    """The result of a conversion."""

    source_format: str
    schemes: Mapping[str, QuantScheme]
    bytes_before: int
    bytes_after: int
    notes: list[str]


@dataclass(frozen=True)
class _Found:
    """A quantized layer of the source, its tensors looked at and forgotten."""

    scheme: QuantScheme
    shape: tuple[int, int]
    scale_dtype: torch.dtype
    in_order: bool
    symmetric: bool  # or asymmetric by its scheme with all zero points 0, as AWQ's of a symmetric model are


@dataclass(frozen=True)
class _Piece:
    """The output for a tensor of the source: a copy or, for a layer's first tensor, the layer in its new format."""

    name: str
    specs: Mapping[str, TensorSpec]
    format: QuantFormat | None = None


def convert_model(
    source: Path,
    out: Path,
    target: Format,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
    layouts: Layouts = NO_LAYOUTS,
) -> Converted:
    """Write the quantized checkpoint in `source` to `out` in another format; layouts as of `Checkpoint.open`.

    Raises QuantizeError with the layer and the reason when the format can't carry it exactly, CheckpointError or
    OSError, and leaves nothing behind then.
    """
    recover(out)
    check_output(source, out, overwrite, resume=False)
    checkpoint = Checkpoint.open(source, layouts)
    if checkpoint.quantization is None:
        raise QuantizeError(NO_INTEGERS)
    other = other_files(source)
    found = _look_at_all(checkpoint, target, progress)
    formats = _formats(found, target)
    config = _config(checkpoint, {module: f.scheme for module, f in formats.items()}, found, target)
    shards = _shards(checkpoint, found, formats)
    after = sum(spec.nbytes for pieces in shards.values() for piece in pieces for spec in piece.specs.values())
    make_writer: MakeWriter = SafetensorsWriter
    if target == "gguf":
        shards = {GGUF: [piece for pieces in shards.values() for piece in pieces]}
        layout = _layout(checkpoint, found, formats)
        make_writer = partial(_gguf_writer, layout)
        after = sum(spec.nbytes for spec in layout.specs.values())
    specs = {shard: {n: s for piece in pieces for n, s in piece.specs.items()} for shard, pieces in shards.items()}
    parent = out.resolve().parent
    parent.mkdir(parents=True, exist_ok=True)
    check_space({parent: int(after * 1.01) + SMALL_FILES})
    job = {"source": source.name, "format": target}
    with workspace(out, specs, job, resume=False, overwrite=overwrite, keep=False, make_writer=make_writer) as work:
        copy_files(other, work.directory)
        done = len(found)
        for shard, pieces in shards.items():
            for piece in pieces:
                _write_piece(checkpoint, work, piece, target)
                done += piece.format is not None
                progress(done, 2 * len(found), piece.name)
            work.finish(shard, {}, {})
        if len(shards) > 1:
            names = {name: shard for shard, names in specs.items() for name in names}
            index = {"metadata": {"total_size": after}, "weight_map": dict(sorted(names.items()))}
            write_json(work.directory / INDEX, index)
        write_json(work.directory / "config.json", config)
    before = sum(checkpoint.spec(name).nbytes for name in checkpoint.names)
    schemes = {module: format_.scheme for module, format_ in formats.items()}
    return Converted(checkpoint.quantization.name, schemes, before, after, checkpoint.notes)


def _look_at_all(checkpoint: Checkpoint, target: Format, progress: Progress) -> dict[str, _Found]:
    """Every quantized layer, after the proof that the format carries it."""
    modules = checkpoint.quantized
    found: dict[str, _Found] = {}
    for module in modules:
        weight = checkpoint.linear(module)
        if not isinstance(weight, QuantizedWeight):
            continue
        if weight.scheme.weight.minima and target != "gguf":
            raise QuantizeError(
                f"{module} can't be written as {target}: its integers lie over minima that are no zero points; octavo "
                "quantize rounds its numbers anew"
            )
        weight = _as_held(weight, target)
        entry = _Found(
            weight.scheme,
            weight.shape,
            weight.scale.dtype,
            in_order=weight.g_idx is None,
            symmetric=weight.zero_point is None or not bool(weight.zero_point.any()),
        )
        try:
            _check_exact(weight, _format(entry, target, desc_act=not entry.in_order))
        except FormatError as e:
            raise QuantizeError(f"{module} can't be written as {target}: {e}") from e
        found[module] = entry
        progress(len(found), 2 * len(modules), module)
    if not found:
        raise QuantizeError(NO_INTEGERS)
    return found


def _as_held(weight: QuantizedWeight, target: Format) -> QuantizedWeight:
    """The same numbers as a format has them: in groups of 32 in GGUF files, where alone integers have 5 and 6 bits, and
    scales lie in super-blocks.
    """
    scheme = weight.scheme
    if target == "gguf":
        size = scheme.weight.granularity.group_size
        is_wider = size is not None and size > GGUF_GROUP and size % GGUF_GROUP == 0
        return regroup(weight, GGUF_GROUP) if is_wider and weight.g_idx is None else weight
    dtype = "int8" if scheme.weight.dtype in ("int5", "int6") else scheme.weight.dtype
    scales = "float" if scheme.weight.scales == "super" else scheme.weight.scales
    return replace(weight, scheme=replace(scheme, weight=replace(scheme.weight, dtype=dtype, scales=scales)))


def _formats(found: Mapping[str, _Found], target: Format) -> dict[str, QuantFormat]:
    """Each layer's new format. Where all layers are symmetric in fact they become so by their schemes."""
    symmetric = all(entry.symmetric for entry in found.values())
    desc_act = any(not entry.in_order for entry in found.values())
    formats = {}
    for module, entry in found.items():
        weight = replace(entry.scheme.weight, symmetric=symmetric or entry.scheme.weight.symmetric)
        made = replace(entry, scheme=replace(entry.scheme, weight=weight))
        formats[module] = _format(made, target, desc_act)
    return formats


def _format(found: _Found, target: Format, desc_act: bool) -> QuantFormat:
    """The format of a layer. Raises FormatError for a scheme that it doesn't have."""
    scheme = found.scheme
    match target:
        case "compressed-tensors":
            return format_for(scheme, found.scale_dtype)
        case "gptq":
            return GPTQFormat(scheme, 1, desc_act)
        case "gptq_v2":
            return GPTQFormat(scheme, 2, desc_act)
        case "awq":
            return AWQFormat(scheme)
        case "fp8":
            return Fp8Format(scheme)
        case "gguf":
            return GGUFFormat(kind_of(scheme))


def _check_exact(weight: QuantizedWeight, format_: QuantFormat) -> None:
    """Raise FormatError unless what the format writes is read back as the very same numbers."""
    written = format_.write(weight)
    specs = format_.tensors(*weight.shape)
    if {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in written.items()} != specs:
        raise FormatError("it has no input scale, which its scheme needs")
    again = format_.read(written)
    for what in ("codes", "scale", "zero_point", "g_idx", "input_scale", "global_scale"):
        if not _same_numbers(getattr(weight, what), getattr(again, what)):
            raise FormatError(f"its {what.replace('_', ' ')} would change")


def _same_numbers(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.dtype == b.dtype:
        return torch.equal(a.view(torch.uint8), b.view(torch.uint8)) if a.ndim else torch.equal(a, b)
    return torch.equal(a.double(), b.double())


def _shards(
    checkpoint: Checkpoint, found: Mapping[str, _Found], formats: Mapping[str, QuantFormat]
) -> dict[str, list[_Piece]]:
    """A file for each of the source's; a layer goes where its first tensor was."""
    owner = {f"{module}.{suffix}": module for module in found for suffix in checkpoint.suffixes(module)}
    seen: set[str] = set()
    files: list[list[_Piece]] = []
    for file in checkpoint.files.values():
        pieces = []
        for name, spec in file.specs.items():
            module = owner.get(name)
            if module is None:
                pieces.append(_Piece(name, {name: spec}))
            elif module not in seen:
                seen.add(module)
                specs = formats[module].tensors(*found[module].shape)
                pieces.append(_Piece(module, {f"{module}.{s}": spec for s, spec in specs.items()}, formats[module]))
        if pieces:
            files.append(pieces)
    if len(files) == 1:
        return {SINGLE: files[0]}
    return {f"model-{i + 1:05d}-of-{len(files):05d}.safetensors": pieces for i, pieces in enumerate(files)}


def _layout(checkpoint: Checkpoint, found: Mapping[str, _Found], formats: Mapping[str, QuantFormat]) -> GGUFLayout:
    """Of a GGUF file whose other tensors stay what they are."""
    kinds = {module: kind_of(format_.scheme) for module, format_ in formats.items()}
    owned = {f"{module}.{suffix}" for module in found for suffix in checkpoint.suffixes(module)}
    plain = {name: checkpoint.spec(name) for name in sorted(checkpoint.names) if name not in owned}
    linears = {module: (kind, found[module].shape) for module, kind in kinds.items()}
    usual = Counter(kinds.values()).most_common(1)[0][0]
    config = without_quantization(checkpoint.config)
    try:
        return make_layout(checkpoint.directory, config, plain, {}, linears, FILE_TYPES[usual])
    except CheckpointError as e:
        raise QuantizeError(f"{checkpoint.directory.name} can't be written as gguf: {e}") from e


def _gguf_writer(layout: GGUFLayout, path: Path, specs: Mapping[str, TensorSpec], *, again: bool) -> PlacedWriter:  # noqa: ARG001
    return GGUFWriter(path, layout, again=again)


def _write_piece(checkpoint: Checkpoint, work: Workspace, piece: _Piece, target: Format) -> None:
    if piece.format is None:
        work.copy(piece.name, _bytes(checkpoint, piece.name))
        return
    weight = checkpoint.linear(piece.name)
    assert isinstance(weight, QuantizedWeight)
    weight = _as_held(weight, target)
    if piece.format.scheme.weight.symmetric:
        weight = replace(weight, zero_point=None)
    for suffix, tensor in piece.format.write(replace(weight, scheme=piece.format.scheme)).items():
        work.write(f"{piece.name}.{suffix}", tensor)


def _bytes(checkpoint: Checkpoint, name: str) -> Iterator[Tensor]:
    return next(file.chunks(name) for file in checkpoint.files.values() if name in file.specs)


def _config(
    checkpoint: Checkpoint, schemes: Mapping[str, QuantScheme], found: Mapping[str, _Found], target: Format
) -> dict[str, Any]:
    """The source's config.json with the new quantization_config."""
    config: dict[str, Any] = without_paths(without_quantization(checkpoint.config))
    kv = _kv_scheme(checkpoint, target)
    ignore = _unquantized(checkpoint, found)
    desc_act = any(not entry.in_order for entry in found.values())
    try:
        match target:
            case "compressed-tensors":
                made = write_config(schemes, ignore, "minmax", kv)
            case "gptq" | "gptq_v2":
                made = write_gptq_config(schemes, ignore, version=1 if target == "gptq" else 2, desc_act=desc_act)
            case "awq":
                made = write_awq_config(schemes, ignore)
            case "fp8":
                made = write_fp8_config(schemes, ignore)
            case "gguf":
                return config
    except FormatError as e:
        raise QuantizeError(f"{checkpoint.directory.name} can't be written as {target}: {e}") from e
    return config | {"quantization_config": made}


def _unquantized(checkpoint: Checkpoint, found: Mapping[str, _Found]) -> list[str]:
    """Linear layers that stay as they are: two-dimensional weights, embeddings aside; lm_head even if it has none."""
    modules = {"lm_head"} - found.keys()
    for name in checkpoint.names:
        module, _, suffix = name.rpartition(".")
        spec = checkpoint.spec(name)
        if suffix == "weight" and len(spec.shape) == 2 and spec.dtype in FLOATS and not EMBEDDING.search(module):
            modules.add(module)
    return sorted(modules)


def _kv_scheme(checkpoint: Checkpoint, target: Format) -> KVScheme | None:
    """The KV cache's scheme for compressed-tensors' config. Raises QuantizeError where scales would be lost."""
    scales = checkpoint.kv_scale_names
    if not scales:
        return None
    dtype = checkpoint.kv_cache_dtype
    if target != "compressed-tensors":
        raise QuantizeError(
            f"{checkpoint.directory.name} has scales for a {dtype or 'quantized'} KV cache ({scales[0]}), which the "
            f"config of {target} has no word for; that of compressed-tensors has"
        )
    if any(not name.endswith((".self_attn.k_scale", ".self_attn.v_scale")) for name in scales) or dtype is None:
        raise QuantizeError(
            f"{scales[0]}: KV scales of this name, or for a cache of no known type, can't be carried over"
        )
    has_keys = any(name.endswith(".k_scale") for name in scales)
    per_head = any(checkpoint.spec(name).numel > 1 for name in scales)
    key_dtype: Any = dtype
    return KVScheme(key_dtype if has_keys else "bf16", key_dtype, per_head)
