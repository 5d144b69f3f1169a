"""A checkpoint in, a quantized checkpoint out: one block in memory at a time, and all of it or nothing.

Without calibration text, one tensor at a time is read, rounded and written. With it, each block is loaded, its inputs
are measured over all samples, its weights are quantized and written, and the samples' outputs of the quantized block
are the inputs of the next one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.calibration.auxiliary_files import copy_files, without_paths, write_json
from octavo.calibration.block import Block
from octavo.calibration.experts import rare_experts
from octavo.calibration.gguf_output import replaced
from octavo.calibration.hidden_states_file import Hidden
from octavo.calibration.kv import KVCollector, KVError, KVReport, kv_advice
from octavo.calibration.layers import (
    LinearLayer,
    QuantizeError,
    Selection,
    joined_with,
    mixed_experts,
    of_embeddings,
    portability_warnings,
)
from octavo.calibration.output import make_format, quantization_config, scale_dtype
from octavo.calibration.plan import Item, Plan, Unit, weight_map
from octavo.calibration.prepare import Calibration, Prepared
from octavo.calibration.progress import Progress, silent
from octavo.calibration.recipe import Recipe, to_json
from octavo.calibration.report.weight_error import LayerRow, layer_row, squared_error
from octavo.calibration.team import ALONE, Team, check_alike, wait_for_all
from octavo.calibration.tune import Example
from octavo.calibration.workspace import Onlooker, ResumeError, Workspace, finished, partial_of, workspace
from octavo.quant.checkpoint import INDEX, Checkpoint
from octavo.quant.decoded_embeddings import decoded
from octavo.quant.formats.reading import FLOATS
from octavo.quant.qparams import QuantizedWeight, WeightError, global_scale_of, quantize_weight
from octavo.quant.scheme import QuantScheme

BOUNDS = (".input_min", ".input_max", ".output_min", ".output_max")
"""How names of tensors end that a layer's input or output is clamped to, as in Gemma 4's towers."""


@dataclass
class Quantized:
    """The result of a quantization, for the report. kv: the KV cache's calibration by block."""

    recipe: Recipe
    selection: Selection
    bytes_before: int
    bytes_after: int
    layers: list[LayerRow]
    kv: list[KVReport]
    warnings: list[str]


@dataclass
class _Run:
    """State that is carried from unit to unit.

    states     the next block's inputs, by `Calibration.sequences`
    team       who share the samples; only the first member's work writes anything
    embedding  [vocab, H], as it was rounded, until the first block's inputs are made of it
    """

    prepared: Prepared
    work: Workspace | Onlooker
    progress: Progress
    team: Team = ALONE
    done: float = 0
    states: dict[str, Hidden] = field(default_factory=dict)
    embedding: Tensor | None = None

    @property
    def plan(self) -> Plan:
        return self.prepared.plan

    @property
    def recipe(self) -> Recipe:
        return self.prepared.recipe


GatherTeam = Callable[[Workspace], AbstractContextManager[Team]]


def quantize_model(
    prepared: Prepared, progress: Progress = silent, gather_team: GatherTeam = lambda _: nullcontext(ALONE)
) -> Quantized:
    """Write the quantized copy that was prepared.

    gather_team: starts those who share the samples, and call `follow_model`, once it is known what is done already.
    Raises QuantizeError, CheckpointError or OSError. A run with calibration that is interrupted or killed, or that runs
    out of disk or memory, leaves its finished blocks, which a run with `resume` goes on with: the result is the same to
    the bit. After any other error nothing is left.
    """
    out = prepared.out
    identity = prepared.identity
    if prepared.resume and not prepared.overwrite and (there := finished(out, identity)) is not None:
        return _result(prepared, there)
    keep = prepared.calibration is not None
    how: dict[str, Any] = {
        "resume": prepared.resume,
        "overwrite": prepared.overwrite,
        "keep": keep,
        "make_writer": prepared.plan.writer,
    }
    try:
        with workspace(out, prepared.plan.shards, identity, **how) as work:
            # first, since a broken one is found without waiting
            copy_files(prepared.other_files, work.directory)
            with gather_team(work) as team:
                _units(_Run(prepared, work, progress, team))
            _finish(prepared, work)
            units = work.units
    finally:
        _remove_offloaded(out, prepared.calibration)
    return _result(prepared, units)


def follow_model(prepared: Prepared, directory: Path, done: Collection[str], team: Team) -> None:
    """Take a share of what another process's `quantize_model` does in a directory, whose units `done` are done there.

    Raises what it raises where all members do, and TeamError.
    """
    _units(_Run(prepared, Onlooker(directory, {unit: {} for unit in done}), silent, team))


def _units(run: _Run) -> None:
    try:
        for unit in run.plan.units:
            _unit(run, unit)
    finally:
        for hidden in run.states.values():
            hidden.close(remove=False)


def _remove_offloaded(out: Path, calibration: Calibration | None) -> None:
    """Nothing stays in --offload-dir but what a resumed run needs."""
    partial = partial_of(out.resolve())
    if calibration is not None and calibration.offload_dir is not None and not partial.is_dir():
        for left in calibration.offload_dir.glob(f"{_offloaded(partial)}-*.bin"):
            left.unlink(missing_ok=True)


def _offloaded(partial: Path) -> str:
    """Prefix of a run's files in --offload-dir, unique to its output's path: other runs may have files there too."""
    return f"octavo-{hashlib.sha256(str(partial).encode()).hexdigest()[:12]}-hidden"


def _unit(run: _Run, unit: Unit) -> None:
    """Do one unit, unless it is done; leaves the next one's inputs in run.states."""
    if unit.name in run.work.units:
        run.done += unit.nbytes
        run.states = _states_again(run, unit)
        return
    run.progress(run.done, run.plan.bytes_before, unit.name)
    before = run.states
    rows: list[LayerRow] = []
    kv: dict[str, Any] | None = None
    experts: list[int] | None = None
    calibration = run.prepared.calibration
    if calibration is not None and unit.index is not None:
        rows, kv, experts = _block(run, calibration, unit, unit.index)
    else:
        rows = _one_by_one(run, unit) if run.team.rank == 0 else []
        if calibration is not None:
            run.states = _embed(run, calibration)
    remember = {"layers": [asdict(row) for row in rows], "kv": kv, "experts": experts}
    run.work.finish(unit.name, run.states, remember)
    run.prepared.checkpoint.unmap()
    for hidden in before.values():
        hidden.close(remove=True)


def _one_by_one(run: _Run, unit: Unit) -> list[LayerRow]:
    """Tensor by tensor: copy what stays, round what doesn't."""
    rows = []
    global_scales: dict[tuple[tuple[str, ...], QuantScheme], Tensor | None] = {}  # by the layers that share one
    for item in unit.items:
        if item.linear is None or item.scheme is None:
            run.work.copy(item.name, _finite(item))
        else:
            weight = item.file.read(item.name)
            shared = joined_with(item.linear.module), item.scheme
            if shared not in global_scales:
                global_scales[shared] = _global_scale(unit, *shared)
            try:
                quantized = quantize_weight(
                    weight,
                    item.scheme,
                    run.recipe.search_of(item.scheme),
                    scale_dtype=scale_dtype(run.recipe, weight.dtype),
                    global_scale=global_scales[shared],
                )
            except WeightError as e:
                raise QuantizeError(f"{item.name} can't be quantized: {e}") from e
            rows.append(_measured(item, item.linear, weight, quantized))
            calibration = run.prepared.calibration
            if calibration is not None and calibration.runner.embedding_name == item.name:
                run.embedding = decoded(quantized, weight.dtype)
            del weight  # packing takes as much again
            _write(run, item, item.linear, quantized)
        run.done += item.spec.nbytes
        run.progress(run.done, run.plan.bytes_before, item.name)
    return rows


def _global_scale(unit: Unit, joined: tuple[str, ...], scheme: QuantScheme) -> Tensor | None:
    """What divides the e4m3 scales of layers that engines make one, of those that have the scheme."""
    alike = (item for item in unit.items if item.linear is not None and item.linear.module in joined)
    return global_scale_of((item.file.read(item.name) for item in alike if item.scheme == scheme), scheme.weight)


def _block(
    run: _Run, calibration: Calibration, unit: Unit, index: int
) -> tuple[list[LayerRow], dict[str, Any] | None, list[int] | None]:
    """A block through calibration; leaves its output over all samples in run.states.

    Returns the layers' errors, what was found of keys and values, and how often each expert was chosen.
    """
    items = {item.name: item for item in unit.items}
    tensors = {item.name: _checked(item) for item in unit.items}
    steps = _Steps(run, unit)
    schemes = {item.linear.module: item.scheme for item in unit.items if item.linear and item.scheme}
    block = Block(index, tensors, schemes, run.recipe, calibration.runner, steps.next, run.team)
    rows = []
    with _closed_on_errors() as following:
        for path in ("original", "original-starts"):
            if path in run.states:
                following[path] = _hidden(run, calibration, index + 1, path)
                block.run(run.states[path], following[path])
        starts = run.states.get("starts")
        start_example = None if starts is None else Example(starts, following["original-starts"])
        reader = _norm_behind(run, calibration, index)
        for solved in block.quantize(run.states["hidden"], following.get("original"), start_example, reader):
            item = items[f"{solved.module}.weight"]
            assert item.linear is not None
            rows.append(_measured(item, item.linear, solved.weight, solved.quantized, solved.output_snr_db))
            _write(run, item, item.linear, solved.quantized)
        for item in unit.items:
            if item.linear is None:
                run.work.write(item.name, tensors[item.name])
        last = index == calibration.runner.num_blocks - 1
        following["hidden"] = _hidden(run, calibration, index + 1, "hidden")
        kv = None if last and run.recipe.kv is None else block.advance(run.states["hidden"], following["hidden"])
        if starts is not None and not last:
            following["starts"] = _hidden(run, calibration, index + 1, "starts")
            block.run(starts, following["starts"])
    if run.team.size > 1:
        check_alike(run.team, unit.name, _digest(tensors))
    run.states = following
    run.done += unit.nbytes
    experts = None if block.expert_counts is None else block.expert_counts.tolist()
    if kv is None:
        return rows, None, experts
    report = _kv_report(kv, unit, run.team)
    found = report.scales()
    for name, spec in unit.scales.items():
        run.work.write(name, found[name.rpartition(".")[2]].view(spec.shape))
    return rows, report.to_json(), experts


def _norm_behind(run: _Run, calibration: Calibration, index: int) -> Tensor | None:
    """What the norm that reads a block's output multiplies it by, [H]."""
    found = calibration.runner.norm_behind(index)
    checkpoint = run.prepared.checkpoint
    if found is None or not checkpoint.has(found[0]):
        return None
    name, offset = found
    return checkpoint.tensor(name).float() + offset


def _digest(tensors: Mapping[str, Tensor]) -> int:
    """64 bits of a hash of a block's tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return int.from_bytes(digest.digest()[:8])


def _kv_report(kv: KVCollector, unit: Unit, team: Team) -> KVReport:
    try:
        return kv.result(team)
    except KVError as e:
        raise QuantizeError(f"{unit.name}: {e}") from e


def _checked(item: Item) -> Tensor:
    """A tensor in memory; numbers, all of them."""
    tensor = item.file.read(item.name)
    _check_numbers(item.name, tensor)
    return tensor


def _write(run: _Run, item: Item, linear: LinearLayer, quantized: QuantizedWeight) -> None:
    format_ = make_format(run.recipe, quantized.scheme, item.spec.dtype)
    for suffix, tensor in format_.write(quantized).items():
        run.work.write(f"{linear.module}.{suffix}", tensor)


def _measured(
    item: Item, linear: LinearLayer, weight: Tensor, quantized: QuantizedWeight, output_snr_db: float | None = None
) -> LayerRow:
    return layer_row(
        linear.module,
        linear.index,
        linear.kind,
        quantized.shape,
        scheme=quantized.scheme,
        bytes_before=item.spec.nbytes,
        bytes_after=item.nbytes,
        error=squared_error(weight, quantized),
        output_snr_db=output_snr_db,
    )


class _Steps:
    """Progress within a block: each step counts as much as the others, which is near enough for an estimate."""

    def __init__(self, run: _Run, unit: Unit) -> None:
        self._run = run
        self._unit = unit
        linears = sum(item.linear is not None for item in unit.items)
        self._share = unit.nbytes / (linears / 2 + 4)  # some share an input and are solved together
        self._count = 0

    def next(self, what: str) -> None:
        self._count += 1
        done = self._run.done + min(self._count * self._share, self._unit.nbytes)
        self._run.progress(done, self._run.plan.bytes_before, f"{self._unit.name} {what}")


def _hidden(run: _Run, calibration: Calibration, index: int, path: str, *, again: bool = False) -> Hidden:
    """The file of block `index`'s input; path: one of `_Run.states`."""
    directory = run.work.directory
    prefix = "hidden"
    if calibration.offload_dir is not None:
        directory = calibration.offload_dir
        prefix = _offloaded(run.work.directory)
    name = f"{prefix}-{index}.bin" if path == "hidden" else f"{prefix}-{path}-{index}.bin"
    shape = calibration.shape(calibration.sequences(run.recipe)[path])
    return Hidden(directory / name, shape, run.team, again=again)


def _embed(run: _Run, calibration: Calibration) -> dict[str, Hidden]:
    """The first block's inputs."""
    runner = calibration.runner
    table = run.prepared.checkpoint.tensor(runner.embedding_name)  # a view: only rows of the text's tokens are read
    with _closed_on_errors() as states:
        for path, sequences in calibration.sequences(run.recipe).items():
            states[path] = _hidden(run, calibration, 0, path)
            rows = run.embedding if run.embedding is not None and path in ("hidden", "starts") else table
            if run.team.rank == 0:
                size = states[path].shape.batch
                for begin, batch in zip(range(0, len(sequences), size), torch.split(sequences, size), strict=True):
                    states[path].put(begin, runner.embed(batch, rows))
    wait_for_all(run.team)
    run.embedding = None
    return states


@contextmanager
def _closed_on_errors() -> Iterator[dict[str, Hidden]]:
    """Files that are closed when an error passes: a caller from Python may go on after it."""
    states: dict[str, Hidden] = {}
    try:
        yield states
    except BaseException:
        for hidden in states.values():
            hidden.close(remove=False)
        raise


def _states_again(run: _Run, unit: Unit) -> dict[str, Hidden]:
    """The next unit's inputs as an earlier run left them, if the next unit isn't done too."""
    entry = run.work.units[unit.name]
    following = run.plan.units[run.plan.units.index(unit) + 1 :]
    calibration = run.prepared.calibration
    if calibration is None or not following or following[0].name in run.work.units:
        return {}
    index = 0 if unit.index is None else unit.index + 1
    paths = calibration.sequences(run.recipe)
    return {path: _hidden_again(run, calibration, unit, index, path, entry) for path in paths}


def _hidden_again(
    run: _Run, calibration: Calibration, unit: Unit, index: int, path: str, entry: Mapping[str, Any]
) -> Hidden:
    """A file of block `index`'s input, which must be what the manifest's entry says."""
    try:
        hidden = _hidden(run, calibration, index, path, again=True)
    except FileNotFoundError as e:
        raise ResumeError(
            f"can't resume: the hidden states after {unit.name} are not in {e.filename}; --offload-dir must be the one "
            "that the run was started with, and --overwrite starts anew"
        ) from e
    if run.team.rank == 0 and not hidden.is_whole(entry.get(path, {}).get("sha256", "")):
        hidden.close(remove=False)
        raise ResumeError(
            f"can't resume: the hidden states after {unit.name} in {hidden.path} aren't what was written; --overwrite "
            "starts anew"
        )
    return hidden


def _finish(prepared: Prepared, work: Workspace) -> None:
    """Write the files that make the directory a checkpoint, config.json last."""
    for left in work.directory.glob("hidden-*.bin"):
        left.unlink()
    if len(prepared.plan.shards) > 1:
        write_json(work.directory / INDEX, weight_map(prepared.plan))
    write_json(work.directory / "recipe.json", to_json(prepared.recipe))
    write_json(work.directory / "config.json", _config(prepared.checkpoint, prepared.plan, prepared.recipe))


def _config(checkpoint: Checkpoint, plan: Plan, recipe: Recipe) -> dict[str, Any]:
    """The source's config.json with what was done; without the path that it was once loaded from."""
    config: dict[str, Any] = without_paths(checkpoint.config)
    if not any(config.get(key) for key in ("dtype", "torch_dtype")) and "text_config" not in config:
        config["dtype"] = str(plan.dtype).removeprefix("torch.")
    if plan.layout is None:  # a GGUF file says itself what its layers are
        config["quantization_config"] = quantization_config(recipe, plan.schemes, plan.selection.ignore)
    if checkpoint.transforms:
        config["quantization_config"]["transform_config"] = checkpoint.transforms.to_config()
    return config


def _result(prepared: Prepared, units: Mapping[str, Mapping[str, Any]]) -> Quantized:
    """All that the manifest remembers, whichever run did it."""
    plan = prepared.plan
    recipe = prepared.recipe
    layers = [LayerRow(**row) for unit in units.values() for row in unit["layers"]]
    kv = [] if recipe.kv is None else [KVReport.from_json(recipe.kv, u["kv"]) for u in units.values() if u["kv"]]
    advice = kv_advice(kv)
    counts = {name: unit["experts"] for name, unit in units.items() if unit.get("experts")}
    rare = rare_experts(counts, tunes=recipe.tunes)
    where = plan.selection, recipe.format, str(prepared.checkpoint.config.get("model_type"))
    found = [w for scheme in dict.fromkeys(plan.schemes.values()) for w in portability_warnings(scheme, *where)]
    found += mixed_experts(plan.schemes) + of_embeddings(plan.schemes)
    if recipe.format == "gguf":
        found += replaced(recipe, plan.selection.linears, plan.schemes)
    warnings = list(dict.fromkeys([*([advice] if advice else []), *rare, *found]))
    return Quantized(recipe, plan.selection, plan.bytes_before, plan.bytes_after, layers, kv, warnings)


def _finite(item: Item) -> Iterator[Tensor]:
    """The bytes of a tensor that is copied, which must be numbers as well: a copy is not an excuse."""
    for chunk in item.file.chunks(item.name):
        if item.spec.dtype in FLOATS:
            _check_numbers(item.name, chunk.view(item.spec.dtype))
        yield chunk


def _check_numbers(name: str, tensor: Tensor) -> None:
    """Raise QuantizeError for what is no number; a bound may be infinite: nothing is clamped then."""
    if tensor.dtype not in FLOATS:
        return
    is_bound = name.endswith(BOUNDS)
    if bool((tensor.isnan() if is_bound else ~tensor.isfinite()).any()):
        raise QuantizeError(
            f"{name} holds NaN{'' if is_bound else ' or infinity'}: the model is broken, quantized or not"
        )
