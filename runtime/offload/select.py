"""Whether a configuration keeps blocks of the prefix cache in a file, which one, and what they are blocks of."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash

from octavo.kernels.attention.cache import LayerCache
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.model import Model
from octavo.runtime.offload.block_file import BlockFile, BlockFileError
from octavo.runtime.offload.offload import Offload
from octavo.runtime.offload.rows import BlockRows
from octavo.runtime.scheduling.prefix_cache import PrefixCache
from octavo.version import VERSION

GIB = 1 << 30
READ_BYTES = 1 << 22
FILES = (  # what a model is made of, and what its images are
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "*.gguf",
    "*.py",
    "preprocessor_config.json",
    "processor_config.json",
)


def check_offload(config: EngineConfig) -> None:
    """Raise ValueError for options that contradict each other, or ask for what there isn't."""
    size = config.kv_offloading_size
    path = config.kv_offloading_path
    if size is None and path is None:
        return
    if size is None:
        raise ValueError(f"--kv-offloading-path {path}: --kv-offloading-size GIB says how large its files may be")
    if path is None:
        raise ValueError(
            f"--kv-offloading-size {size:g}: on a CPU the KV cache is host memory already: --kv-cache-memory-bytes "
            "makes it larger; with --kv-offloading-path DIR blocks are kept in a file, which outlives the server"
        )
    if config.device == "cuda":
        raise ValueError("--kv-offloading-size on a GPU: blocks are kept on the CPU so far; leave it out")
    if config.parallel.num_ranks > 1:
        raise ValueError(
            "--kv-offloading-size with -tp or -pp: each rank has a part of each block, and a file holds whole ones; "
            "-dp N runs several engines, each with a file"
        )
    if not config.enable_prefix_caching:
        raise ValueError(
            "--kv-offloading-size with --no-enable-prefix-caching: it is the prefix cache that is kept; leave one out"
        )
    _check_disk(Path(path), size)


def _check_disk(directory: Path, size: float) -> None:
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"--kv-offloading-path {directory}: {there} is not a directory that can be written to")
    own = sum(path.stat().st_blocks * 512 for path in directory.glob("engine-*.kv"))
    space = os.statvfs(there)
    free = space.f_bavail * space.f_frsize + own
    if size * GIB > free:
        raise ValueError(
            f"--kv-offloading-size {size:g}: {directory} has {free / GIB:,.1f} GiB free; "
            f"--kv-offloading-size {int(free * 0.9 / GIB * 10) / 10:g} works"
        )


def open_offload(
    config: EngineConfig, model: Model, caches: Sequence[LayerCache], prefixes: PrefixCache, index: int
) -> tuple[Offload | None, list[str]]:
    """The file of engine `index`, open, and lines about it; None where there is none. Raises ValueError."""
    if config.kv_offloading_size is None or config.kv_offloading_path is None:
        return None, []
    if model.device.type != "cpu":
        raise ValueError("--kv-offloading-size on a GPU: blocks are kept on the CPU so far; --device cpu works")
    rows = BlockRows(caches)
    engines = len(config.parallel.local_engines)
    try:
        file = BlockFile(
            Path(config.kv_offloading_path),
            index,
            description_of(config, model, caches),
            rows.block_bytes,
            int(config.kv_offloading_size * GIB) // engines,
        )
    except BlockFileError as error:
        raise ValueError(f"--kv-offloading-path: {error}") from None
    notes = [file.note] if file.note else []
    notes.append(f"KV offload: {file.path} has {len(file.found):,} blocks, and room for {file.num_slots:,}")
    columns = config.max_num_batched_tokens // config.block_size + config.max_num_seqs
    return Offload(file, rows, prefixes, columns * len(prefixes.groups.windows)), notes


def description_of(config: EngineConfig, model: Model, caches: Sequence[LayerCache]) -> dict[str, Any]:
    """What decides a block's bytes beside its name, which has the tokens, the cache_salt and the adapter."""
    return {
        "octavo version": VERSION,
        "model": digest_of_files(Path(config.model)),
        "dtype": [config.dtype, str(model.dtype), config.load_format, config.deterministic],
        "kernels": _digest(repr((model.architecture, model.report_layers())).encode()),
        "length": config.max_model_len or model.max_position,  # longrope's factors are chosen by it
        "KV cache": [config.block_size, _digest(repr([_shape_of(cache) for cache in caches]).encode())],
        "KV scales": _digest(b"".join(_scales_of(cache) for cache in caches)),
    }


def digest_of_files(directory: Path) -> str:
    """Of a checkpoint's configuration and weights. It tells models apart; it is no defense against who writes them."""
    digest = xxhash.xxh3_128()
    for path in sorted({path for pattern in FILES for path in directory.glob(pattern)}):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(READ_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def _shape_of(cache: LayerCache) -> tuple[object, ...]:
    return (cache.group, cache.key.dtype, cache.key.shape[1:], cache.value.dtype, cache.value.shape[1:])


def _scales_of(cache: LayerCache) -> bytes:
    return torch.cat([cache.key_scale, cache.value_scale]).numpy().tobytes()


def _digest(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)
