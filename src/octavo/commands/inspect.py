"""Say what is in a checkpoint, and what it needs to serve: from its config and headers, without reading a weight."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta

from octavo.commands.failure import one_line
from octavo.flags import add_flags, flags_of, read
from octavo.quant.printable import printable

if TYPE_CHECKING:
    from rich.table import Table

    from octavo.quant.checkpoint import Checkpoint
    from octavo.quant.formats.format import QuantFormat
    from octavo.quant.kernel_table import KernelChoice
    from octavo.quant.target import Target
    from octavo.runtime.model.spec import DecoderSpec

INDEX_IN_NAME = re.compile(r"\.\d+(?=\.|$)")
MAX_ROWS = 500  # of the table; models on the Hub take some 60 at most
MAX_CELL = 200  # characters


def parse_device(spelled: str) -> str:
    """'auto', 'cpu', 'cuda' or 'cuda:9.0'. Raises ValueError."""
    if spelled not in ("auto", "cpu", "cuda") and not re.fullmatch(r"cuda:\d+\.\d", spelled):
        raise ValueError(f"{spelled!r} is none of auto, cpu, cuda and such as cuda:9.0")
    return spelled


class InspectOptions(msgspec.Struct, frozen=True):
    """The flags of `octavo inspect`."""

    model: Annotated[str, Meta(description="a local directory, or a Hugging Face Hub id", extra={"positional": True})]
    revision: Annotated[
        str | None, Meta(description="branch, tag or commit of a Hub id", extra={"default": "its main branch"})
    ] = None
    device: Annotated[
        str,
        Meta(
            description="say which kernels serve the model there, cuda:9.0 on a GPU of that compute capability, "
            "wherever it is",
            extra={
                "metavar": "cpu|cuda|cuda:X.Y",
                "parse": parse_device,
                "default": "this machine's GPU, or its CPU",
            },
        ),
    ] = "auto"
    json: Annotated[bool, Meta(description="print JSON instead of tables", extra={"default": "tables"})] = False
    html: Annotated[Path | None, Meta(description="write a page there too", extra={"metavar": "OUT"})] = None


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_flags(parser, flags_of(InspectOptions))


def run(args: argparse.Namespace) -> int:
    """Inspect and print; returns the exit code."""
    from octavo.quant.checkpoint import Checkpoint
    from octavo.quant.formats.format import FormatError
    from octavo.quant.hub import resolve_model
    from octavo.quant.model_files import CheckpointError
    from octavo.runtime.model.families.registry import LAYOUTS

    options = read(InspectOptions, args)
    try:
        directory = resolve_model(options.model, options.revision)
        checkpoint = Checkpoint.open(directory, LAYOUTS, takes_transforms=True)
        facts = inspect(checkpoint, options.device)
        if options.html is not None:
            _write_page(options.html, facts, options.model)
    except (CheckpointError, FormatError, OSError, DeviceError) as e:
        print(f"octavo inspect: {one_line(e)}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        _print(facts, options.model)
    return 0


def _write_page(out: Path, facts: dict[str, Any], model: str) -> None:
    from octavo.commands.inspect_page import inspect_page
    from octavo.report.files import write_whole

    path = Path(model).expanduser()
    write_whole(out, inspect_page(facts, path.resolve().name if path.is_dir() else model))


class DeviceError(ValueError):
    """The device isn't on this machine."""


def inspect(checkpoint: Checkpoint, device: str = "auto") -> dict[str, Any]:
    """What `octavo inspect --json` prints."""
    config = checkpoint.config
    to_serve, kernels = _to_serve(checkpoint, device)
    layers = _layers(checkpoint, kernels)
    return {
        "architecture": (config.get("architectures") or [None])[0],
        "model_type": config.get("model_type"),
        "format": checkpoint.quantization.name if checkpoint.quantization else "unquantized",
        "files": len(checkpoint.files),
        "tensors": len(checkpoint.names),
        "layers": layers,
        "kv_cache": {"dtype": checkpoint.kv_cache_dtype, "scales": len(checkpoint.kv_scale_names)},
        "notes": checkpoint.notes,
        "to_serve": to_serve,
    }


def _layers(checkpoint: Checkpoint, kernels: Mapping[str, KernelChoice]) -> list[dict[str, Any]]:
    """Rows by kind of module (block numbers made '*'), scheme and kernel, in the order of their names."""
    modules: dict[str, list[str]] = {}
    for name in checkpoint.names:
        modules.setdefault(_module(name), []).append(name)
    rows: dict[tuple[str, str, str | None], dict[str, Any]] = {}
    for module, names in sorted(modules.items()):
        kind = INDEX_IN_NAME.sub(".*", module)
        format_ = checkpoint.stored_format_of(module)
        scheme = _stored_type(checkpoint, module, names) if format_ is None else str(format_.scheme)
        choice = kernels.get(module)
        kernel = _kernel(choice)["kernel"]
        new = {"kind": kind, "scheme": scheme, "count": 0, "parameters": 0, "bytes": 0}
        row = rows.setdefault((kind, scheme, kernel), {**new, **_kernel(choice)})
        row["count"] += 1
        row["bytes"] += sum(checkpoint.spec(name).nbytes for name in names)
        row["parameters"] += _parameters(checkpoint, module, format_)
    return list(rows.values())


def _kernel(choice: KernelChoice | None) -> dict[str, Any]:
    """What a row says of the kernel."""
    if choice is None:
        return {"kernel": None, "reason": None, "batch_invariant": None}
    kernel = choice.kernel
    return {"kernel": kernel.name, "reason": choice.reason, "batch_invariant": kernel.batch_invariant}


def _module(name: str) -> str:
    """The module of a tensor that a linear layer may have in any format; of another its own name."""
    from octavo.quant.formats.select import SUFFIXES

    module, _, suffix = name.rpartition(".")
    return module if suffix in SUFFIXES or suffix == "bias" else name


def _stored_type(checkpoint: Checkpoint, module: str, names: list[str]) -> str:
    """The type of an unquantized module."""
    main = f"{module}.weight" if f"{module}.weight" in names else names[0]
    return str(checkpoint.spec(main).dtype).removeprefix("torch.")


def _parameters(checkpoint: Checkpoint, module: str, format_: QuantFormat | None) -> int:
    """Weights and biases of a module, scales not counted. A packed weight's shape may be read: 16 bytes."""
    names = [module, f"{module}.bias"]  # a name that is a tensor's: such as an attention's sinks
    count = 0
    if format_ is None:
        names.append(f"{module}.weight")
    else:
        n, k = format_.shape(
            {suffix: checkpoint.tensor(f"{module}.{suffix}") for suffix in checkpoint.suffixes(module)}
        )
        count = n * k
    return count + sum(checkpoint.spec(name).numel for name in names if checkpoint.has(name))


def _to_serve(checkpoint: Checkpoint, device: str) -> tuple[dict[str, Any], dict[str, KernelChoice]]:
    """The bytes of the weights as stored and of 1,000 tokens of KV cache, or why octavo can't serve the model.

    Also returns each linear module's kernel, if octavo's decoder serves the model.
    """
    from octavo.quant.scheme import SchemeError
    from octavo.runtime.model.config_types import ModelConfigError
    from octavo.runtime.model.families.registry import ENCODER_DECODERS, ENCODERS, SPEECH
    from octavo.runtime.model.kernel_plan import plan_kernels
    from octavo.runtime.model.names import required_modules
    from octavo.runtime.model.sources import CheckpointSource, LoadError
    from octavo.runtime.model.spec import DecoderSpec, UnknownArchitectureError, UnsupportedModelError
    from octavo.runtime.vision.linears import plan_tower

    weights = sum(checkpoint.spec(name).nbytes for name in checkpoint.names)
    try:
        spec = DecoderSpec.from_hf(checkpoint.config)
        source = CheckpointSource(checkpoint)
        source.require(required_modules(spec, source.prefix, source.has))
        target = _target(device, spec)
        kernels = plan_kernels(checkpoint, spec, target) | plan_tower(checkpoint, target)
    except UnknownArchitectureError as e:
        if e.model_type in ENCODERS:
            return {
                "weight_bytes": weights,
                "note": f"{e.model_type} is an encoder, and makes embeddings or scores",
            }, {}
        if e.model_type in SPEECH:
            return {"weight_bytes": weights, "note": _of_speech(checkpoint.config)}, {}
        if e.model_type in ENCODER_DECODERS:
            return {"weight_bytes": weights, "note": _of_encoder_decoder(checkpoint.config)}, {}
        note = f"{e.model_type} is served in transformers' own code, if that has it"
        return {"weight_bytes": weights, "note": note}, {}
    except (UnsupportedModelError, ModelConfigError, LoadError, SchemeError) as e:
        return {"weight_bytes": weights, "problem": str(e)}, {}
    numbers = spec.cached_numbers
    per_1k = {"bfloat16": 2000 * numbers, "fp8_e4m3": 1000 * numbers, "int8": 1000 * numbers}
    facts = {
        "weight_bytes": weights,
        "device": str(target),
        "kv_bytes_per_1k_tokens": {"auto": per_1k[checkpoint.kv_cache_dtype or "bfloat16"]} | per_1k,
        "max_position": spec.max_position,
    }
    if spec.states:
        facts["state_bytes_per_sequence"] = sum(mixer.state.num_bytes for mixer in spec.states)
    return facts, kernels


def _of_speech(config: dict[str, Any]) -> str:
    """What a speech model does and needs, or why it isn't served."""
    import torch

    from octavo.runtime.model.config_types import ModelConfigError
    from octavo.runtime.model.encdec_parts import source_bytes
    from octavo.runtime.model.spec import UnsupportedModelError
    from octavo.runtime.model.speech_spec import SpeechSpec

    try:
        spec = SpeechSpec.from_hf(config)
    except (UnsupportedModelError, ModelConfigError) as e:
        return f"not served: {e}"
    layers = spec.decoder.num_layers
    megabytes = source_bytes(layers, spec.num_sources, spec.hidden_size, torch.bfloat16) / 1e6
    return (
        f"{spec.architecture} writes down what it hears: each request under way takes {megabytes:.1f} MB for keys and "
        f"values of its audio in bfloat16, and has {spec.max_position} tokens"
    )


def _of_encoder_decoder(config: dict[str, Any]) -> str:
    """What an encoder-decoder does and needs, or why it isn't served."""
    import torch

    from octavo.runtime.model.config_types import ModelConfigError
    from octavo.runtime.model.encdec_parts import source_bytes
    from octavo.runtime.model.encdec_spec import EncDecSpec
    from octavo.runtime.model.spec import UnsupportedModelError

    try:
        spec = EncDecSpec.from_hf(config)
    except (UnsupportedModelError, ValueError, ModelConfigError) as e:
        return f"not served: {e}"
    kilobytes = source_bytes(spec.decoder.num_layers, 1, spec.width, torch.bfloat16) / 1e3
    return (
        f"{spec.architecture} reads a prompt with its encoder, and its decoder writes: each request under way takes "
        f"{kilobytes:.1f} kB in bfloat16 for keys and values of each token of its prompt"
    )


def _target(device: str, spec: DecoderSpec) -> Target:
    """The device that a user named, computing in the type that a server would choose there."""
    import torch

    from octavo.quant.target import Target
    from octavo.runtime.model.dtypes import choose_dtype
    from octavo.runtime.worker.device import capability, choose_device

    name, _, version = device.partition(":")
    if version:
        there = torch.device("cuda")
        return Target(there, choose_dtype("auto", spec.dtype, there, []), int(version.replace(".", "")))
    try:
        here = choose_device(name)  # type: ignore[arg-type]
    except ValueError as e:
        raise DeviceError(f"{e}; such as --device cuda:9.0 asks about a GPU that isn't here") from e
    return Target.of(here, choose_dtype("auto", spec.dtype, here, []), capability(here))


def _kernel_lines(facts: dict[str, Any]) -> list[str]:
    """One for each kernel and reason, with the layers that it serves, each name once."""
    served: dict[tuple[str, str], dict[str, None]] = {}
    for row in facts["layers"]:
        if row["kernel"]:
            kernel = f"{row['kernel']} (batch-invariant)" if row["batch_invariant"] else row["kernel"]
            served.setdefault((kernel, row["reason"]), {})[row["kind"].rpartition(".")[2]] = None
    lines = [f"kernels on {facts['to_serve']['device']}:"]
    lines += [f"  {kernel} for {', '.join(kinds)}: {reason}" for (kernel, reason), kinds in served.items()]
    return lines


def _table(facts: dict[str, Any], model: str) -> Table:
    """A row for each kind of layer, its names as they may stand on a terminal."""
    from rich.table import Table

    title = f"{Path(model).name}: {facts['architecture']} ({facts['model_type']}), {facts['format']}"
    table = Table(title=printable(title, MAX_CELL))
    table.add_column("layers", overflow="fold")
    table.add_column("scheme")
    for heading in ("count", "parameters", "MB"):
        table.add_column(heading, justify="right")
    for row in facts["layers"][:MAX_ROWS]:
        table.add_row(
            printable(row["kind"].removeprefix("model."), MAX_CELL),
            printable(row["scheme"], MAX_CELL),
            str(row["count"]),
            f"{row['parameters']:,}",
            f"{row['bytes'] / 1e6:.2f}",
        )
    return table


def _print(facts: dict[str, Any], model: str) -> None:
    from rich.console import Console

    console = Console(markup=False)  # a name may look like rich's markup
    console.print(_table(facts, model))
    lines = []
    if len(facts["layers"]) > MAX_ROWS:
        lines.append(f"and {len(facts['layers']) - MAX_ROWS:,} kinds of layers more, which --json shows")
    lines.append(f"{facts['tensors']:,} tensors in {facts['files']} files")
    if "device" in facts["to_serve"]:
        lines += _kernel_lines(facts)
    cache = facts["kv_cache"]
    if cache["scales"]:
        lines.append(f"KV cache: {cache['scales']} scales for {cache['dtype'] or 'a quantized cache'}")
    needs = facts["to_serve"]
    fp8 = (
        " (a CPU keeps fp8 weights as bf16, twice as large)"
        if any("fp8" in row["scheme"] for row in facts["layers"])
        else ""
    )
    lines.append(f"weights: {needs['weight_bytes'] / 1e6:,.1f} MB as stored{fp8}")
    lines += facts["notes"]
    if "problem" in needs:
        lines.append(f"not served by octavo's decoder: {needs['problem']}")
    elif "note" in needs:
        lines.append(needs["note"])
    else:
        kv = needs["kv_bytes_per_1k_tokens"]
        lines.append(
            f"KV cache: {kv['bfloat16'] / 1e6:.1f} MB per 1,000 tokens, {kv['int8'] / 1e6:.1f} MB in fp8 or int8; "
            f"context {needs['max_position']:,} tokens"
        )
        if (state := needs.get("state_bytes_per_sequence")) is not None:
            lines.append(f"states: {state / 1e6:.1f} MB per sequence, however long it is")
    for line in lines:
        console.print(printable(line), highlight=False)
