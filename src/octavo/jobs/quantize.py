"""`octavo.quantize`: all of `octavo quantize` as a function. The command is a thin layer over it.

Wires the rooms: calibration decides and writes, the runtime runs blocks and serves what is measured.
"""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from octavo.calibration.choices import ActOrder, Algorithm, Format, RotationName
from octavo.calibration.recipe import Recipe, RecipeError, read_recipe
from octavo.jobs.calibration_data import DataOptions
from octavo.jobs.quantize_job import Job

if TYPE_CHECKING:
    from octavo.calibration.prepare import Calibration, Prepared
    from octavo.calibration.quantize_model import Quantized
    from octavo.calibration.report.report import Report
    from octavo.jobs.quality import Recorded
    from octavo.quant.checkpoint import Checkpoint
    from octavo.quant.scheme import Search


def quantize(
    model: str | Path,
    output: str | Path,
    *,
    scheme: str = "W4A16",
    algorithm: Algorithm = "auto",
    format: Format = "compressed-tensors",
    data: Any = None,
    num_calibration_samples: int | None = None,
    max_seq_length: int | None = None,
    seed: int = 0,
    self_generated_samples: int | None = None,
    ignore: str | tuple[str, ...] | list[str] = (),
    layers: dict[str, str] | None = None,
    recipe: Recipe | str | Path | None = None,
    search: Search | None = None,
    act_order: ActOrder = "static",
    kv_cache: str | None = None,
    rotations: tuple[RotationName, ...] | list[RotationName] = (),
    lm_head: str | None = None,
    embedding: str | None = None,
    **options: Any,
) -> Report:
    """Write a quantized copy of a checkpoint, measure what it cost, and return the report.

    model       a local directory, or a Hub id
    output      the directory to write; all of it or nothing
    scheme      a preset of compressed-tensors, with '@' and a group size where it isn't the preset's: 'W4A16@64'
    algorithm   auto chooses by scheme and `effort`; rtn needs no data, the others do
    data        a file, a data set's id, texts, records, or tensors of token ids; None: the model generates its text
    self_generated_samples  how many the model generates beside data; None: what tuning needs, and else none
    layers      pattern -> scheme (or 'none') of layers that differ
    recipe      a recipe, or its file, instead of all of the above but data
    kv_cache    'fp8', 'int8', 'fp8/head', 'k=bf16,v=fp8': calibrate scales for the KV cache
    rotations   'R1', 'R2', 'R4': what is rotated first; a `Recipe` says how
    lm_head     the head's scheme, and embedding: the embedding's; None: it stays as it is
    options     further fields of `Job`: resume, overwrite, evaluate, max_kl, bits_budget, offload_dir, listener, ...

    Raises RecipeError, QuantizeError, DataError, CheckpointError or OSError with one line that says what and why.
    """
    if recipe is None:
        recipe = Recipe(
            scheme=scheme,
            algorithm=algorithm,
            format=format,
            layers=layers or {},
            ignore=(ignore,) if isinstance(ignore, str) else tuple(ignore),
            search=search,
            act_order=act_order,
            kv_cache=kv_cache,
            rotations=tuple(rotations),
            lm_head=lm_head,
            embedding=embedding,
        )
    text = DataOptions(
        data, num_calibration_samples, max_seq_length, seed, self_generated_samples=self_generated_samples
    )
    return run(Job(str(model), Path(output), _read(recipe), text, **options))


def _read(recipe: Recipe | str | Path) -> Recipe:
    if not isinstance(recipe, Recipe | str | Path):
        raise RecipeError(f"recipe is a {type(recipe).__name__}; a Recipe or a file's path is needed")
    return recipe if isinstance(recipe, Recipe) else read_recipe(Path(recipe))


def run(job: Job) -> Report:
    """Do a job; see `quantize`."""
    from octavo.calibration.quantize_model import quantize_model
    from octavo.calibration.report.files import write_reports
    from octavo.jobs.calibration_team import gather_team

    prepared = prepare(job)
    source = prepared.checkpoint.directory
    begin = time.perf_counter()
    job.listener.phase("quantizing")
    length = job.data.length_of(prepared.checkpoint.config)
    gather = partial(gather_team, prepared, job.distributed_executor_backend, job.device, length)
    result = quantize_model(prepared, job.listener.progress, gather)
    report = _report(job, prepared, result, time.perf_counter() - begin)
    recipe = prepared.recipe
    del prepared, gather  # the text and the block runner make room for the models that are measured
    write_reports(job.output, report, source=source)
    if job.evaluate:
        report = _with_quality(job, recipe, source, report)
        write_reports(job.output, report, source=source)
    return report


def _with_layers_kept(job: Job, source: Path, notes: list[str], seconds: dict[str, float]) -> Job:
    """An encoder's job without the layers that rounding costs most, where its recipe says nothing of them."""
    from octavo.jobs.encoder_layers import is_searched, layers_to_keep

    if not is_searched(job.recipe):
        return job
    begin = time.perf_counter()
    job.listener.phase("measuring sensitivity")
    kept = layers_to_keep(source, job.recipe, job.listener.progress)
    seconds["sensitivity"] = time.perf_counter() - begin
    if kept is None:
        return job
    notes.append(kept.note)
    return msgspec.structs.replace(job, recipe=msgspec.structs.replace(job.recipe, ignore=kept.patterns))


def prepare(job: Job) -> Prepared:
    """Check, plan and cost a job, and have its calibration text; nothing is checked or planned again after this."""
    from octavo.calibration.prepare import complete, open_source, plan_model
    from octavo.calibration.report.report import source_note
    from octavo.calibration.text.documents import NoTextError
    from octavo.jobs.mixed_recipe import check_target
    from octavo.jobs.rotated_source import rotated_source
    from octavo.quant.hub import resolve_model
    from octavo.runtime.model.families.registry import LAYOUTS

    source = resolve_model(job.model, job.revision)
    how = {"overwrite": job.overwrite, "resume": job.resume}
    _check_effort(job)
    _check_options(_resolved(job, calibrates=True))
    checkpoint = open_source(source, job.output, layouts=LAYOUTS, **how)
    asked = job
    job, notes = _for_source(asked, checkpoint)
    notes += [source_note(checkpoint.source)] if checkpoint.source else []
    _check_options(job)
    seconds: dict[str, float] = {}
    job = _with_layers_kept(job, source, notes, seconds) if checkpoint.layout.is_encoder else job
    checkpoint = rotated_source(checkpoint, job.recipe, notes)
    planned = plan_model(checkpoint, job.output, job.recipe, max_shard_bytes=job.max_shard_bytes, **how)
    if planned.checkpoint is not checkpoint:
        notes += planned.checkpoint.notes
    if job.target is not None:
        check_target(job.target, planned, job.streams)
    recipe = job.recipe
    calibration = None
    if _runs_blocks(job):
        begin = time.perf_counter()
        try:
            calibration = _calibration(job, checkpoint)
            notes += job.data.notes_of(checkpoint.config)
        except NoTextError as e:
            without = _resolved(asked, calibrates=False)
            if _runs_blocks(without):
                raise
            recipe = without.recipe
            notes.append(f"algorithm {recipe.algorithm}, which needs no calibration text: {e}")
        seconds["data"] = time.perf_counter() - begin
        if job.target is not None and calibration is not None:
            recipe = _mixed_recipe(job, planned, calibration, notes, seconds)
    prepared = complete(planned, recipe, calibration if recipe.needs_data else None)
    job.listener.estimate(prepared.estimate)
    _check_memory(prepared, job.calibration_workers if job.distributed_executor_backend == "mp" else 1)
    return replace(prepared, text=calibration.data if calibration else None, notes=tuple(notes), seconds=seconds)


def _for_source(job: Job, checkpoint: Checkpoint) -> tuple[Job, list[str]]:
    """The job with an algorithm that the model can have, and notes for the report. Raises QuantizeError."""
    from octavo.calibration.layers import QuantizeError
    from octavo.jobs.source_check import check_options, check_source

    check_options(job.recipe, checkpoint.layout, measures=job.target is not None)
    runs_blocks = _runs_blocks(_resolved(job, calibrates=False))
    notes, uncalibrated = check_source(checkpoint, runs_blocks=runs_blocks, max_kl=job.max_kl)
    resolved = _resolved(job, calibrates=not (notes or uncalibrated) and checkpoint.layout.is_calibrated)
    if uncalibrated and resolved != _resolved(job, calibrates=True):
        notes.append(f"algorithm {resolved.recipe.algorithm}, which needs no calibration: {uncalibrated}")
    if checkpoint.layout.reads_text and _runs_blocks(resolved) and job.device == "cuda":
        raise QuantizeError("--device cuda: encoder-decoders are calibrated on the CPU; --device cpu works")
    return resolved, notes


def _mixed_recipe(
    job: Job, planned: Prepared, calibration: Calibration, notes: list[str], seconds: dict[str, float]
) -> Recipe:
    """The recipe that holds the job's target."""
    from octavo.jobs.mixed_recipe import Mixing, mixed_recipe

    begin = time.perf_counter()
    job.listener.phase("measuring sensitivity")
    assert job.target is not None
    mixing = Mixing(job.target, job.streams, each_expert=job.expert_schemes == "expert")
    recipe = mixed_recipe(mixing, planned, calibration, notes, job.listener.progress)
    seconds["sensitivity"] = time.perf_counter() - begin
    return recipe


def _check_memory(prepared: Prepared, num_workers: int) -> None:
    """num_workers: on this machine."""
    from octavo.jobs.memory import check_memory

    check_memory(
        num_workers * prepared.estimate.memory,
        "rtn works tensor by tensor and needs least, and a model with smaller blocks less",
    )


def _resolved(job: Job, *, calibrates: bool) -> Job:
    """The job with an algorithm in auto's place."""
    return msgspec.structs.replace(job, recipe=job.recipe.resolved(job.effort, calibrates=calibrates))


def _runs_blocks(job: Job) -> bool:
    return job.recipe.needs_data or job.target is not None


def _check_effort(job: Job) -> None:
    if job.effort != "auto" and job.recipe.algorithm != "auto":
        raise RecipeError(
            f"--effort {job.effort} chooses an algorithm, and {job.recipe.algorithm} is one: leave one of the two out"
        )


def _check_options(job: Job) -> None:
    """Refuse data that the algorithm wouldn't use: whoever gives text doesn't want rtn; and a choice of nothing."""
    _ = job.streams  # are refused, or counted
    if job.expert_schemes != "layer" and job.target is None:
        raise RecipeError("--expert-schemes expert says what a budget chooses for: --bits-budget or a --target works")
    if job.calibration_workers < 1:
        raise RecipeError(f"calibration_workers {job.calibration_workers}: 1 or more are needed")
    if job.calibration_workers > 1 and not _runs_blocks(job):
        raise RecipeError(
            f"--calibration-workers {job.calibration_workers}: algorithm {job.recipe.algorithm} has no samples to "
            "share; gptq has"
        )
    data = job.data
    if data.self_generated_samples is not None and data.dataset is None:
        raise RecipeError(
            "--self-generated-samples is of text beside --dataset, and there is none: the model generates all of it, "
            "and --num-calibration-samples says how much"
        )
    if (data.dataset is not None or data.num_samples is not None) and not _runs_blocks(job):
        raise RecipeError(
            f"algorithm {job.recipe.algorithm} with scheme {job.recipe.scheme} uses no calibration text: leave the "
            "data out, or take an algorithm that learns from it, such as gptq"
        )


def _calibration(job: Job, checkpoint: Checkpoint) -> Calibration:
    """Text, and the model block by block. The model is checked first: text may take long."""
    from octavo.calibration.layers import QuantizeError
    from octavo.calibration.prepare import Calibration
    from octavo.jobs.calibration_data import make_data
    from octavo.jobs.calibration_member import make_runner
    from octavo.jobs.calibration_team import check_workers

    if checkpoint.layout.reads_text and job.calibration_workers > 1:
        raise QuantizeError("--calibration-workers: encoder-decoders are calibrated by one process; leave it out")
    if checkpoint.layout.reads_text:
        from octavo.jobs.encdec_calibration import encdec_calibration

        job.listener.phase("calibration text")
        return encdec_calibration(checkpoint, job.data, job.offload_dir, job.listener.progress)
    runner = make_runner(checkpoint, job.data.length_of(checkpoint.config), job.device)
    job.listener.phase("calibration text")
    data = make_data(checkpoint.directory, job.data, job.device, job.listener.progress, tunes=job.recipe.tunes)
    calibration = Calibration(data, runner, job.offload_dir, job.calibration_workers)
    if calibration.num_workers > 1:
        check_workers(calibration, job.distributed_executor_backend)
    return calibration


def _report(job: Job, prepared: Prepared, result: Quantized, seconds: float) -> Report:
    """The report without the quality."""
    from octavo.calibration.kv import kv_rows
    from octavo.calibration.report.report import CalibrationText, Report, rounded, sizes_of
    from octavo.calibration.report.weight_error import by_kind, in_order
    from octavo.quant.hub import hub_id, model_name

    recipe = result.recipe
    data = prepared.text
    calibration = (
        None
        if data is None
        else CalibrationText(
            source=data.source,
            samples=len(data.samples),
            tokens=data.num_tokens,
            seed=data.seed,
            generated=job.data.dataset is None,
            fingerprint=data.fingerprint,
        )
    )
    layers = result.layers
    return Report(
        model=model_name(job.model),
        base_model=hub_id(job.model),
        architecture=str(prepared.checkpoint.config.get("model_type")),
        scheme=recipe.scheme,
        format=recipe.format,
        algorithm=recipe.algorithm,
        options=recipe.options(),
        kv_cache=recipe.kv_cache,
        calibration=calibration,
        sizes=sizes_of(result.bytes_before, result.bytes_after, layers),
        kinds=by_kind(layers),
        layers=in_order(layers),
        ignore=tuple(result.selection.ignore),
        warnings=(*prepared.notes, *result.warnings, *(() if data is None else data.notes)),
        seconds=rounded({**prepared.seconds, "quantize": seconds}),
        kv_layers=tuple(kv_rows(result.kv)),
        source=prepared.checkpoint.source or None,
    )


def _with_quality(job: Job, recipe: Recipe, source: Path, report: Report) -> Report:
    """The report with measured quality and a verdict, or with the reason why there are none."""
    from octavo.calibration.report.report import rounded
    from octavo.calibration.report.verdict import broken, judge
    from octavo.calibration.verify import NotFiniteError
    from octavo.jobs.embedding_quality import is_encoder, unmeasured
    from octavo.jobs.quality import recorded
    from octavo.runtime.config import EngineConfig

    job.listener.phase("measuring quality")
    if is_encoder(source):
        return _with_cosines(job, source, report)
    if (where := unmeasured(source)) is not None:
        return replace(report, warnings=(*report.warnings, f"quality was not measured: {where}"))
    progress = job.listener.progress
    config = EngineConfig(model=str(source))
    begin = time.perf_counter()
    with ExitStack() as stack:
        try:
            original = stack.enter_context(
                recorded(config, max_tokens=job.eval_tokens, dequantized=True, progress=progress)
            )
            quality = original.compare(EngineConfig(model=str(job.output)), progress)
        except (RuntimeError, ValueError) as e:
            if isinstance(e, NotFiniteError) and e.side == "quantized":
                return replace(report, verdict=broken(e))
            return replace(report, warnings=(*report.warnings, f"quality could not be measured: {e}"))
        seconds = report.seconds | rounded({"quality": time.perf_counter() - begin})
        verdict = judge(
            quality,
            recipe.schemes,
            job.target_kl if job.max_kl is None else job.max_kl,
            layers=report.layers,
            algorithm=report.algorithm,
            kv_cache=report.kv_cache,
        )
        measured = replace(report, quality=quality, verdict=verdict, seconds=seconds)
        return _with_rtn(job, recipe, source, original, measured)


def _with_cosines(job: Job, source: Path, report: Report) -> Report:
    """An encoder's report with how near its vectors are to the original's, or with the reason why that isn't known."""
    from octavo.calibration.report.report import rounded
    from octavo.jobs.embedding_quality import measure_embeddings

    begin = time.perf_counter()
    try:
        cosines = measure_embeddings(source, job.output)
    except (RuntimeError, ValueError) as e:
        return replace(report, warnings=(*report.warnings, f"quality could not be measured: {e}"))
    seconds = report.seconds | rounded({"quality": time.perf_counter() - begin})
    return replace(report, embeddings=cosines, seconds=seconds)


def _with_rtn(job: Job, recipe: Recipe, source: Path, original: Recorded, report: Report) -> Report:
    """The report with the KL of rtn without rotations, of a copy that is written beside OUT, measured and removed."""
    from octavo.calibration.prepare import prepare as prepare_rtn
    from octavo.calibration.quantize_model import quantize_model
    from octavo.calibration.report.report import rounded
    from octavo.runtime.config import EngineConfig
    from octavo.runtime.model.families.registry import LAYOUTS

    plain = recipe.with_rtn()
    is_plain = recipe.algorithm == "rtn" and not recipe.rotations
    if not job.compares_rtn or is_plain or plain.needs_data:
        return report
    job.listener.phase("measuring rtn")
    begin = time.perf_counter()
    copy = job.output.resolve().with_name(f".{job.output.name}.rtn")
    try:
        quantize_model(prepare_rtn(source, copy, plain, overwrite=True, layouts=LAYOUTS), job.listener.progress)
        quality = original.compare(EngineConfig(model=str(copy)), job.listener.progress)
    except (RuntimeError, ValueError, OSError) as e:
        return replace(report, warnings=(*report.warnings, f"what rtn would have cost could not be measured: {e}"))
    finally:
        shutil.rmtree(copy, ignore_errors=True)
    seconds = report.seconds | rounded({"rtn": time.perf_counter() - begin})
    return replace(report, rtn_kl=quality.mean_kl, seconds=seconds)
