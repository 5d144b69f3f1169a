"""A checkpoint in, a quantized checkpoint out: one block in memory at a time, and all of it or nothing.

Without calibration text not even that: tensors are read, rounded and put in their places one by one. With it, each
block is loaded, its inputs are measured over all samples, its weights are solved and written, and the samples go on
through the quantized block to the next one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.calibration.auxiliary_files import copy_other_files, without_paths, write_json
from octavo.calibration.block import Block, Runner
from octavo.calibration.experts import rare_experts
from octavo.calibration.hidden_states_file import Hidden, Shape
from octavo.calibration.kv import KVError, KVReport, kv_advice
from octavo.calibration.layers import FLOATS, Linear, QuantizeError, Selection, portability_warnings
from octavo.calibration.output import make_format, quantization_config, scale_dtype
from octavo.calibration.plan import Item, Plan, Unit, make_plan, source_digest, weight_map
from octavo.calibration.recipe import Recipe, to_json
from octavo.calibration.report.weight_error import LayerRow, layer_row, squared_error
from octavo.calibration.workspace import MANIFEST, ResumeError, Workspace, finished, partial_of, recover, workspace
from octavo.quant.checkpoint import INDEX, Checkpoint, quantization_dict, read_config
from octavo.quant.qparams import QuantizedWeight, WeightError, quantize_weight
from octavo.version import VERSION

Progress = Callable[[float, float, str], None]  # bytes done, bytes in all, what is in work


@dataclass(frozen=True)
class Calibration:
    """What algorithms with data need: text as token ids [num_samples, seq_len] int64, and the model block by block.

    source  what the text is, for the manifest and the report; a resumed run must have the same
    """

    token_ids: Tensor
    runner: Runner
    source: Mapping[str, Any]
    offload_dir: Path | None = None


@dataclass
class Quantized:
    """What was done: for the report. kv: rows of the KV-cache's calibration."""

    recipe: Recipe
    selection: Selection
    bytes_before: int
    bytes_after: int
    layers: list[LayerRow]
    kv: list[KVReport]
    warnings: list[str]


@dataclass
class _Run:
    """What goes on from unit to unit."""

    checkpoint: Checkpoint
    plan: Plan
    recipe: Recipe
    calibration: Calibration | None
    progress: Progress
    done: float = 0
    hidden: Hidden | None = None


def quantize_model(
    source: Path,
    out: Path,
    recipe: Recipe,
    *,
    calibration: Calibration | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Quantized:
    """Write a quantized copy of the checkpoint in `source` to `out`.

    Raises QuantizeError, CheckpointError or OSError, and leaves nothing behind then. A run with calibration that is
    interrupted or killed leaves its work, which `resume` goes on with: the result is the same to the bit.
    """
    recover(out)
    checkpoint = open_source(source)
    plan = make_plan(checkpoint, recipe, max_shard_bytes)
    if recipe.needs_data and calibration is None:
        raise QuantizeError(f"{recipe.algorithm} with scheme {recipe.scheme} needs calibration text")
    try:
        quantization_config(
            recipe, plan.schemes, plan.selection.ignore
        )  # what a config can't say is found before anything is done
    except ValueError as e:
        raise QuantizeError(f"format {recipe.format}: {e}") from e
    job = _job(checkpoint, plan, recipe, calibration)
    check_out(source, out, overwrite, resume)
    if resume and not overwrite and (there := finished(out, job)) is not None:
        return _result(plan, recipe, there)
    check_disk(out, plan, calibration)
    run = _Run(checkpoint, plan, recipe, calibration, progress or _silent)
    keep = calibration is not None
    try:
        with workspace(out, plan.shards, job, resume=resume, overwrite=overwrite, keep=keep) as work:
            copy_other_files(source, work.directory)  # first, since a broken one is found without waiting
            try:
                for unit in plan.units:
                    _unit(run, work, unit)
            finally:
                if run.hidden is not None:
                    run.hidden.close(remove=False)
            _finish(run, work)
            units = work.units
    finally:
        _remove_offloaded(out, calibration)
    return _result(plan, recipe, units)


def _remove_offloaded(out: Path, calibration: Calibration | None) -> None:
    """Nothing stays in --offload-dir but what a resumed run needs."""
    partial = partial_of(out.resolve())
    if calibration is not None and calibration.offload_dir is not None and not partial.is_dir():
        for left in calibration.offload_dir.glob(f"{_offloaded(partial)}-*.bin"):
            left.unlink(missing_ok=True)


def _offloaded(partial: Path) -> str:
    """How the names of a run's files in --offload-dir begin: other runs may have theirs there, of the same OUT even."""
    return f"octavo-{hashlib.sha256(str(partial).encode()).hexdigest()[:12]}-hidden"


def _silent(done: float, total: float, what: str) -> None:
    """Nobody listens."""


def open_source(source: Path) -> Checkpoint:
    """The original checkpoint. Raises QuantizeError for one that is quantized, CheckpointError for a broken one."""
    if quantization_dict(read_config(source)) is not None:
        raise QuantizeError(
            f"{source} is quantized already (config.json has a quantization_config): rounding twice would lose more "
            "than the report could tell; start from the original checkpoint, or change the format with octavo convert"
        )
    return Checkpoint.open(source)


def _job(checkpoint: Checkpoint, plan: Plan, recipe: Recipe, calibration: Calibration | None) -> dict[str, Any]:
    """What decides the result, for the manifest."""
    return {
        "source": source_digest(checkpoint),
        "recipe": to_json(recipe),
        "shards": {name: len(specs) for name, specs in plan.shards.items()},
        "data": None if calibration is None else dict(calibration.source),
        "versions": {"octavo": VERSION, "torch": torch.__version__},
    }


def _unit(run: _Run, work: Workspace, unit: Unit) -> None:
    """Do one unit, unless it is done; leaves the next one's input in run.hidden."""
    if unit.name in work.units:
        run.done += unit.nbytes
        run.hidden = _hidden_again(run, work, unit)
        return
    run.progress(run.done, run.plan.bytes_before, unit.name)
    before = run.hidden
    rows: list[LayerRow] = []
    kv: dict[str, Any] | None = None
    experts: list[int] | None = None
    if run.calibration is not None and unit.index is not None:
        rows, kv, experts = _block(run, run.calibration, work, unit, unit.index)
    else:
        rows = _one_by_one(run, work, unit)
        if run.calibration is not None:
            run.hidden = _embed(run, run.calibration, work)
    remember = {"layers": [asdict(row) for row in rows], "kv": kv, "experts": experts}
    work.finish(unit.name, run.hidden, remember)
    if before is not None:
        before.close(remove=True)


def _one_by_one(run: _Run, work: Workspace, unit: Unit) -> list[LayerRow]:
    """Tensor by tensor: copy what stays, round what doesn't."""
    rows = []
    for item in unit.items:
        if item.linear is None or item.scheme is None:
            work.copy(item.name, _finite(item))
        else:
            weight = item.file.read(item.name)
            try:
                quantized = quantize_weight(
                    weight,
                    item.scheme,
                    run.recipe.search_of(item.scheme),
                    scale_dtype=scale_dtype(run.recipe, weight.dtype),
                )
            except WeightError as e:
                raise QuantizeError(f"{item.name} can't be quantized: {e}") from e
            rows.append(_measured(item, item.linear, weight, quantized))
            del weight  # packing takes as much again
            _write(run, work, item, item.linear, quantized)
        run.done += item.spec.nbytes
        run.progress(run.done, run.plan.bytes_before, item.name)
    return rows


def _block(
    run: _Run, calibration: Calibration, work: Workspace, unit: Unit, index: int
) -> tuple[list[LayerRow], dict[str, Any] | None, list[int] | None]:
    """A block through calibration; leaves its output over all samples in run.hidden.

    Returns the layers' errors, what was found of keys and values, and how often each expert was chosen.
    """
    assert run.hidden is not None
    items = {item.name: item for item in unit.items}
    tensors = {item.name: _checked(item) for item in unit.items}
    steps = _Steps(run, unit)
    schemes = {item.linear.module: item.scheme for item in unit.items if item.linear and item.scheme}
    block = Block(index, tensors, schemes, run.recipe, calibration.runner, steps.next)
    rows = []
    for solved in block.quantize(run.hidden):
        item = items[f"{solved.module}.weight"]
        assert item.linear is not None
        rows.append(_measured(item, item.linear, solved.weight, solved.quantized, solved.output_snr_db))
        _write(run, work, item, item.linear, solved.quantized)
    counts = calibration.runner.expert_counts
    experts = counts.tolist() if counts is not None and run.recipe.needs_statistics else None
    for item in unit.items:
        if item.linear is None:
            work.write(item.name, tensors[item.name])
    last = index == calibration.runner.num_blocks - 1
    target = _hidden(calibration, work, index + 1)
    with _closed_on_errors(target):
        kv = None if last and run.recipe.kv is None else block.advance(run.hidden, target)
    run.hidden = target
    run.done += unit.nbytes
    if kv is None:
        return rows, None, experts
    try:
        report = kv.result()
    except KVError as e:
        raise QuantizeError(f"{unit.name}: {e}") from e
    found = report.scales()
    for name, spec in unit.scales.items():
        work.write(name, found[name.rpartition(".")[2]].view(spec.shape))
    return rows, report.to_json(), experts


def _checked(item: Item) -> Tensor:
    """A tensor in memory; numbers, all of them."""
    tensor = item.file.read(item.name)
    if tensor.dtype in FLOATS and not bool(tensor.isfinite().all()):
        raise QuantizeError(f"{item.name} holds NaN or infinity: the model is broken, quantized or not")
    return tensor


def _write(run: _Run, work: Workspace, item: Item, linear: Linear, quantized: QuantizedWeight) -> None:
    format_ = make_format(run.recipe, quantized.scheme, item.spec.dtype)
    for suffix, tensor in format_.write(quantized).items():
        work.write(f"{linear.module}.{suffix}", tensor)


def _measured(
    item: Item, linear: Linear, weight: Tensor, quantized: QuantizedWeight, output_snr_db: float | None = None
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


def _shape(calibration: Calibration) -> Shape:
    num_samples, seq_len = calibration.token_ids.shape
    return Shape(num_samples, seq_len, calibration.runner.hidden_size, calibration.runner.dtype)


def _hidden(calibration: Calibration, work: Workspace, index: int, *, again: bool = False) -> Hidden:
    """The file of block `index`'s input."""
    directory = work.directory
    name = f"hidden-{index}.bin"
    if calibration.offload_dir is not None:
        directory = calibration.offload_dir
        name = f"{_offloaded(work.directory)}-{index}.bin"
    return Hidden(directory / name, _shape(calibration), again=again)


def _embed(run: _Run, calibration: Calibration, work: Workspace) -> Hidden:
    runner = calibration.runner
    embedding = run.checkpoint.tensor(runner.embedding_name)  # a view: only the rows of the text's tokens are read
    hidden = _hidden(calibration, work, 0)
    with _closed_on_errors(hidden):
        for batch in torch.split(calibration.token_ids, hidden.shape.batch):
            hidden.append(runner.embed(batch, embedding))
    return hidden


@contextmanager
def _closed_on_errors(hidden: Hidden) -> Iterator[None]:
    """Who calls from Python may go on after an error."""
    try:
        yield
    except BaseException:
        hidden.close(remove=False)
        raise


def _hidden_again(run: _Run, work: Workspace, unit: Unit) -> Hidden | None:
    """The next unit's input as an earlier run left it, if the next unit isn't done too."""
    entry = work.units[unit.name]
    following = run.plan.units[run.plan.units.index(unit) + 1 :]
    if run.calibration is None or not following or following[0].name in work.units:
        return None
    index = 0 if unit.index is None else unit.index + 1
    try:
        hidden = _hidden(run.calibration, work, index, again=True)
    except FileNotFoundError as e:
        raise ResumeError(
            f"can't resume: the hidden states after {unit.name} are not in {e.filename}; --offload-dir must be the one "
            "that the run was started with, and --overwrite starts anew"
        ) from e
    if not hidden.is_whole(entry.get("hidden", {}).get("sha256", "")):
        hidden.close(remove=False)
        raise ResumeError(
            f"can't resume: the hidden states after {unit.name} in {hidden.path} aren't what was written; --overwrite "
            "starts anew"
        )
    return hidden


def _finish(run: _Run, work: Workspace) -> None:
    """What makes the directory a checkpoint; config.json last."""
    for left in work.directory.glob("hidden-*.bin"):
        left.unlink()
    if len(run.plan.shards) > 1:
        write_json(work.directory / INDEX, weight_map(run.plan))
    write_json(work.directory / "recipe.json", to_json(run.recipe))
    write_json(work.directory / "config.json", _config(run.checkpoint, run.plan, run.recipe))


def _config(checkpoint: Checkpoint, plan: Plan, recipe: Recipe) -> dict[str, Any]:
    """The source's config.json with what was done; without the path that it was once loaded from."""
    config: dict[str, Any] = without_paths(checkpoint.config)
    if not any(config.get(key) for key in ("dtype", "torch_dtype")) and "text_config" not in config:
        config["dtype"] = str(plan.dtype).removeprefix("torch.")
    config["quantization_config"] = quantization_config(recipe, plan.schemes, plan.selection.ignore)
    return config


def _result(plan: Plan, recipe: Recipe, units: Mapping[str, Mapping[str, Any]]) -> Quantized:
    """All that the manifest remembers, whichever run did it."""
    layers = [LayerRow(**row) for unit in units.values() for row in unit["layers"]]
    kv = [] if recipe.kv is None else [KVReport.from_json(recipe.kv, u["kv"]) for u in units.values() if u["kv"]]
    advice = kv_advice(kv)
    rare = rare_experts({name: unit["experts"] for name, unit in units.items() if unit.get("experts")})
    found = [w for scheme in plan.schemes.values() for w in portability_warnings(scheme, plan.selection, recipe.format)]
    warnings = list(dict.fromkeys([*([advice] if advice else []), *rare, *found]))
    return Quantized(recipe, plan.selection, plan.bytes_before, plan.bytes_after, layers, kv, warnings)


def _finite(item: Item) -> Iterator[Tensor]:
    """The bytes of a tensor that is copied, which must be numbers as well: a copy is not an excuse."""
    dtype = item.spec.dtype
    for chunk in item.file.chunks(item.name):
        if dtype in FLOATS and not bool(chunk.view(dtype).isfinite().all()):
            raise QuantizeError(f"{item.name} holds NaN or infinity: the model is broken, quantized or not")
        yield chunk


def check_out(source: Path, out: Path, overwrite: bool, resume: bool) -> None:
    """Refuse an output that is the source, or holds something else than a checkpoint that may be replaced."""
    here = source.resolve()
    there = out.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise QuantizeError(f"the output {out} and the model {source} must not contain each other")
    above = next(parent for parent in there.parents if parent.exists())
    if not above.is_dir():
        raise QuantizeError(f"{above} is a file: {out} can't be made in it")
    if not os.access(above, os.W_OK | os.X_OK):
        raise QuantizeError(f"{above} can't be written to: another place for {out} works")
    if not out.exists():
        return
    if not out.is_dir():
        raise QuantizeError(f"{out} exists and is not a directory")
    if any(out.iterdir()):
        if resume and (out / MANIFEST).is_file():
            return  # what a resumed run may find finished
        if not overwrite:
            raise QuantizeError(f"{out} exists; --overwrite replaces it")
        if not (out / "config.json").is_file():
            raise QuantizeError(f"{out} has no config.json: --overwrite replaces a checkpoint, and this is none")


def hidden_bytes(calibration: Calibration | None) -> int:
    """Bytes of all samples' hidden states between two blocks."""
    return 0 if calibration is None else _shape(calibration).nbytes


def check_disk(out: Path, plan: Plan, calibration: Calibration | None) -> None:
    """Refuse when what will be written doesn't fit."""
    parent = out.resolve().parent
    parent.mkdir(parents=True, exist_ok=True)
    hidden = 2 * hidden_bytes(calibration)
    if calibration is not None and calibration.offload_dir is not None and not calibration.offload_dir.is_dir():
        raise QuantizeError(f"--offload-dir {calibration.offload_dir} is not a directory that is there; make it first")
    needs = [(parent, int(plan.bytes_after * 1.01) + 64_000_000)]  # what is copied beside the weights is small
    if hidden and calibration is not None:
        needs.append((calibration.offload_dir or parent, hidden))
    if len(needs) == 2 and needs[0][0] == needs[1][0]:
        needs = [(parent, needs[0][1] + hidden)]
    for directory, nbytes in needs:
        free = shutil.disk_usage(directory).free
        if free < nbytes:
            raise QuantizeError(f"{directory} has {free / 1e6:,.0f} MB free; {nbytes / 1e6:,.0f} MB will be written")
