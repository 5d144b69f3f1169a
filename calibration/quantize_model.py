"""A checkpoint in, a quantized checkpoint out, one tensor in memory at a time, and all of it or nothing.

The sizes of everything that will be written are known before anything is (QuantFormat.tensors), so shards are laid
out first and their headers written first; then tensors are read in the order of the source's files, rounded, and put
in their places. The result is made in a directory beside its place and renamed into it.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from octavo.calibration.layers import (
    FLOATS,
    Linear,
    QuantizeError,
    Selection,
    check_group_size,
    portability_warnings,
    select_linears,
)
from octavo.calibration.sidecars import copy_other_files, without_paths, write_json
from octavo.quant.checkpoint import INDEX, SINGLE, Checkpoint, quantization_dict, read_config
from octavo.quant.formats.compressed_tensors import CompressedTensorsFormat, write_config
from octavo.quant.qparams import QuantizedWeight, Search, WeightError, quantize_weight
from octavo.quant.safetensors_file import SafetensorsFile, SafetensorsWriter, TensorSpec
from octavo.quant.scheme import QuantScheme

ERROR_ROWS = 1 << 20  # elements whose error is computed at a time
Progress = Callable[[int, int, str], None]  # bytes read, bytes in all, tensor


@dataclass(frozen=True)
class LayerError:
    """How far a quantized layer is from the original, as sums over its weights."""

    linear: Linear
    signal: float
    noise: float
    bytes_before: int
    bytes_after: int


@dataclass
class Quantized:
    """What was done: for the report."""

    scheme: QuantScheme
    selection: Selection
    bytes_before: int
    bytes_after: int
    layers: list[LayerError]
    warnings: list[str]


@dataclass(frozen=True)
class _Item:
    """One tensor of the source, and what becomes of it."""

    name: str
    file: SafetensorsFile
    linear: Linear | None
    outputs: dict[str, TensorSpec]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.outputs.values())


def quantize_model(
    source: Path,
    out: Path,
    scheme: QuantScheme,
    *,
    search: Search = "absmax",
    ignore: list[str] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Quantized:
    """Write a quantized copy of the checkpoint in `source` to `out`, as compressed-tensors.

    Raises QuantizeError, CheckpointError or OSError, and leaves nothing behind then, nor when it is interrupted.
    """
    _clear_up(out.resolve())
    _check_out(source, out, overwrite)
    if quantization_dict(read_config(source)) is not None:
        raise QuantizeError(
            f"{source} is quantized already (config.json has a quantization_config): rounding twice would lose more "
            "than the report could tell; start from the original checkpoint"
        )
    checkpoint = Checkpoint.open(source)
    selection = select_linears(checkpoint, ignore or [])
    check_group_size(scheme, selection.linears)
    shards = _plan(checkpoint, scheme, selection, max_shard_bytes)
    items = [item for shard in shards for item in shard]
    before = sum(item.file.specs[item.name].nbytes for item in items)
    after = sum(item.nbytes for item in items)
    run = _Run(scheme, search, progress, total=before)
    with _appearing(out, after, overwrite) as partial:
        copy_other_files(source, partial)  # first, since a broken one is found without waiting
        names = _shard_names(len(shards))
        for name, shard in zip(names, shards, strict=True):
            run.write_shard(partial / name, shard)
        if len(shards) > 1:
            _write_index(partial / INDEX, names, shards, after)
        write_json(partial / "config.json", _config(checkpoint, scheme, selection, search))
    return Quantized(scheme, selection, before, after, run.layers, portability_warnings(scheme, selection))


def _plan(checkpoint: Checkpoint, scheme: QuantScheme, selection: Selection, max_shard_bytes: int) -> list[list[_Item]]:
    """All tensors in the source's order, cut into shards of at most max_shard_bytes (a larger tensor has its own)."""
    shards: list[list[_Item]] = [[]]
    size = 0
    for file in checkpoint.files.values():
        for name, spec in file.specs.items():
            linear = selection.linears.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            outputs = {name: spec}
            if linear is not None:
                planned = CompressedTensorsFormat(scheme, spec.dtype).tensors(*spec.shape)
                outputs = {f"{linear.module}.{suffix}": out for suffix, out in planned.items()}
            item = _Item(name, file, linear, outputs)
            if shards[-1] and size + item.nbytes > max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(item)
            size += item.nbytes
    return shards


@dataclass
class _Run:
    """What goes on from shard to shard: how to round, what came of it, and how far it is."""

    scheme: QuantScheme
    search: Search
    progress: Progress | None
    total: int
    done: int = 0
    layers: list[LayerError] = field(default_factory=list)

    def write_shard(self, path: Path, items: list[_Item]) -> None:
        specs = {name: spec for item in items for name, spec in item.outputs.items()}
        with SafetensorsWriter(path, specs) as writer:
            for item in items:
                if item.linear is None:
                    writer.write_bytes(item.name, _finite(item))
                else:
                    self.layers.append(self._quantize(item, item.linear, writer))
                self.done += item.file.specs[item.name].nbytes
                if self.progress is not None:
                    self.progress(self.done, self.total, item.name)

    def _quantize(self, item: _Item, linear: Linear, writer: SafetensorsWriter) -> LayerError:
        weight = item.file.read(item.name)
        try:
            quantized = quantize_weight(weight, self.scheme, self.search)
        except WeightError as e:
            raise QuantizeError(f"{item.name} can't be quantized: {e}") from e
        signal, noise = squared_error(weight, quantized)
        nbytes = weight.nbytes
        del weight  # packing takes as much again
        for suffix, tensor in CompressedTensorsFormat(self.scheme, quantized.scale.dtype).write(quantized).items():
            writer.write(f"{linear.module}.{suffix}", tensor)
        return LayerError(linear, signal, noise, nbytes, item.nbytes)


def _finite(item: _Item) -> Iterator[torch.Tensor]:
    """The bytes of a tensor that is copied, which must be numbers as well: a copy is not an excuse."""
    dtype = item.file.specs[item.name].dtype
    for chunk in item.file.chunks(item.name):
        if dtype in FLOATS and not bool(chunk.view(dtype).isfinite().all()):
            raise QuantizeError(f"{item.name} holds NaN or infinity: the model is broken, quantized or not")
        yield chunk


def squared_error(weight: torch.Tensor, quantized: QuantizedWeight) -> tuple[float, float]:
    """Sum of the squares of a weight [N, K], and of its differences to what the codes stand for."""
    n, k = quantized.shape
    side = quantized.scheme.weight.granularity.block
    rows = max(1, ERROR_ROWS // k)
    if side is not None:
        rows = -(-rows // side[0]) * side[0]
    signal = noise = 0.0
    for begin in range(0, n, rows):
        part = weight[begin : begin + rows].float()
        signal += float(part.square().sum(dtype=torch.float64))
        part -= quantized.rows(begin, min(begin + rows, n)).dequantize()
        noise += float(part.square_().sum(dtype=torch.float64))
    return signal, noise


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _write_index(path: Path, names: list[str], shards: list[list[_Item]], total: int) -> None:
    weight_map = {
        tensor: name for name, shard in zip(names, shards, strict=True) for item in shard for tensor in item.outputs
    }
    write_json(path, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _config(checkpoint: Checkpoint, scheme: QuantScheme, selection: Selection, search: Search) -> dict[str, Any]:
    """The source's config.json with what was done; without the path that it was once loaded from."""
    config: dict[str, Any] = without_paths(checkpoint.config)
    if not any(config.get(key) for key in ("dtype", "torch_dtype")) and "text_config" not in config:
        first = checkpoint.spec(f"{next(iter(selection.linears))}.weight")
        config["dtype"] = str(first.dtype).removeprefix("torch.")
    config["quantization_config"] = write_config(scheme, selection.ignore, {"absmax": "minmax", "mse": "mse"}[search])
    return config


def _check_out(source: Path, out: Path, overwrite: bool) -> None:
    here, there = source.resolve(), out.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise QuantizeError(f"the output {out} and the model {source} must not contain each other")
    if not out.exists():
        return
    if not out.is_dir():
        raise QuantizeError(f"{out} exists and is not a directory")
    if any(out.iterdir()):
        if not overwrite:
            raise QuantizeError(f"{out} exists; --overwrite replaces it")
        if not (out / "config.json").is_file():
            raise QuantizeError(f"{out} has no config.json: --overwrite replaces a checkpoint, and this is none")


@contextmanager
def _appearing(out: Path, nbytes: int, overwrite: bool) -> Iterator[Path]:
    """A new directory that becomes `out` if all goes well, and is gone if anything goes wrong, Ctrl-C included.

    A run that is killed can't clear up. Directories of a run are locked while it lives, so the next one knows.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < nbytes * 1.01 + 64_000_000:  # what is copied beside the weights is small
        raise QuantizeError(f"{out.parent} has {free / 1e6:,.0f} MB free; {nbytes / 1e6:,.0f} MB will be written")
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    replaced = partial.with_suffix(".replaced")
    locks = [_lock(partial)]
    try:
        yield partial
        partial.chmod(0o755)
        _sync(partial)
        if overwrite and out.exists():
            locks.append(_lock(out))
            out.rename(replaced)
        partial.rename(out)
        _sync(out.parent)
    except BaseException:
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        for fd in locks:
            if fd is not None:
                os.close(fd)
    shutil.rmtree(replaced, ignore_errors=True)


def _clear_up(out: Path) -> None:
    """Remove what killed runs left beside `out`; put back what one had moved away and not yet replaced."""
    name = re.compile(rf"\.{re.escape(out.name)}\.\w{{8}}\.(partial|replaced)")
    for left in out.parent.glob(".*"):
        if not name.fullmatch(left.name) or left.is_symlink() or not left.is_dir():
            continue
        fd = _lock(left)
        if fd is None:  # of a run that lives
            continue
        if left.suffix == ".replaced" and not out.exists():
            left.rename(out)
        else:
            shutil.rmtree(left, ignore_errors=True)
        os.close(fd)


def _lock(directory: Path) -> int | None:
    """A descriptor that holds the lock on a directory until it is closed; None where another process has it."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
