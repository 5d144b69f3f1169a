"""Whether processes of two machines mean the same: octavo, the model, and what the command line says of both."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec

from octavo.flags import flags_of
from octavo.runtime.config import EngineConfig
from octavo.runtime.parallel.config import ParallelConfig
from octavo.version import VERSION

# What each machine may have of its own, or what is about the server alone.
OWN = frozenset({"model", "num_threads", "parallel", "kv_events_config"})
OWN_PARALLEL = frozenset(
    {
        *("node_rank", "headless", "master_addr", "master_port"),
        *("data_parallel_address", "data_parallel_rpc_port", "data_parallel_size_local", "data_parallel_start_rank"),
        *("distributed_executor_backend", "data_parallel_backend"),
        *("routing", "migration_limit", "max_engine_restarts", "engine_restart_delay"),
    }
)
DESCRIPTIONS = ("config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json", "*.index.json")
WEIGHTS = ("*.safetensors", "*.gguf")
SHOWN = 3  # differences in one line


class Agreement(msgspec.Struct, frozen=True):
    """What must be equal. files: of the model, each with what tells it from another one. options: by their flags."""

    version: str
    files: dict[str, str]
    options: dict[str, str]


def agreement_of(config: EngineConfig) -> Agreement:
    """What a machine with this configuration means. Small files are read; weights are told by their sizes."""
    directory = Path(config.model)
    found = {path.name: path for pattern in DESCRIPTIONS for path in directory.glob(pattern)}
    files = {name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in found.items()}
    files |= {path.name: f"{path.stat().st_size} bytes" for pattern in WEIGHTS for path in directory.glob(pattern)}
    options = _options(config, OWN) | _options(config.parallel, OWN_PARALLEL)
    return Agreement(VERSION, files, options)


def _options(options: msgspec.Struct, own: frozenset[str]) -> dict[str, str]:
    flags = {flag.field: flag.names[-1] for flag in flags_of(EngineConfig, ParallelConfig)}
    values: dict[str, Any] = {name: getattr(options, name) for name in options.__struct_fields__ if name not in own}
    return {flags.get(name, name): str(value) for name, value in values.items()}


def difference(first: Agreement, second: Agreement, names: tuple[str, str]) -> str | None:
    """What two machines of these names don't agree on, as a sentence; None where they do."""
    found = []
    if first.version != second.version:
        found.append(f"octavo is {first.version} on {names[0]} and {second.version} on {names[1]}")
    here = first.files | first.options
    there = second.files | second.options
    for name in [*here, *(name for name in there if name not in here)]:
        if here.get(name) != there.get(name):
            values = [side.get(name, "missing") or "''" for side in (here, there)]
            found.append(f"{name} is {values[0]} on {names[0]} and {values[1]} on {names[1]}")
    if not found:
        return None
    more = f", and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return f"{names[1]} doesn't mean the same as {names[0]}: " + "; ".join(found[:SHOWN]) + more
