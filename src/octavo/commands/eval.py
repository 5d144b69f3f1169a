"""Measure a model's perplexity; with --against, what a quantized model lost of the original.

Both run as `octavo serve` runs them, one after the other. The exit code is 3 when the mean KL is above --max-kl. With
--tasks, what is measured are tasks of lm-eval instead of a text, and the exit code is 3 when a loss is seen. Of models
that embed or rerank it is nDCG, and the exit code is 3 when that lost more than --max-ndcg-loss.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.commands.eval_flags import EvalOptions
from octavo.commands.failure import one_line
from octavo.commands.progress_bar import progress_bar
from octavo.flags import add_flags, flags_of, read
from octavo.kernels.native.environment import ENVIRONMENT
from octavo.quant.scheme import AT_LOAD, HEAD_INT8, KV_SHORT_NAMES, PRESETS

if TYPE_CHECKING:
    from rich.console import Console

    from octavo.calibration.report.report import Report
    from octavo.calibration.verify import Quality
    from octavo.quant.scheme import QuantScheme
    from octavo.runtime.config import EngineConfig

PROG = "octavo eval"
NOT_GOOD_ENOUGH = 3  # the exit code when MODEL is worse than --max-kl


class EvalError(ValueError):
    """Options that can't be followed; the message is one line."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_flags(parser, flags_of(EvalOptions))


def run(args: argparse.Namespace) -> int:
    """Measure, print, judge; returns the exit code."""
    os.environ.update({**ENVIRONMENT, **os.environ})  # before torch is imported

    from rich.console import Console

    from octavo.calibration.report.terminal import print_report
    from octavo.calibration.verify import NotFiniteError
    from octavo.commands.eval_pooled import check_pooled, measure_pooled
    from octavo.jobs.measured_text import QualityError
    from octavo.offline.errors import EngineError
    from octavo.quant.hub import resolve_model
    from octavo.quant.model_files import CheckpointError

    console = Console()
    try:
        options = read(EvalOptions, args)
        _check(options)
        directory = resolve_model(options.model, options.revision)
        if options.tasks:
            return _of_tasks(options, directory, console)
        if check_pooled(options, directory):
            assert options.against is not None
            original = resolve_model(options.against, options.against_revision)
            return 0 if measure_pooled(options, directory, original, console) else NOT_GOOD_ENOUGH
        if options.against is None:
            _alone(options, directory, console)
            return 0
        report = _against(options, directory, options.against)
        _write(options, report)
    except NotFiniteError as e:
        print(f"{PROG}: {e}", file=sys.stderr)
        return NOT_GOOD_ENOUGH if e.side == "quantized" else 1
    except (EvalError, QualityError, CheckpointError, EngineError, ValueError, OSError) as e:
        print(f"{PROG}: {one_line(e)}", file=sys.stderr)
        return 1
    print_report(report, console)
    return NOT_GOOD_ENOUGH if report.verdict is not None and not report.verdict.passed else 0


def _check(options: EvalOptions) -> None:
    """Refuse flags that don't go together, and outputs that can't be written, before minutes are spent."""
    from octavo.commands.eval_pooled import OF_RANKING
    from octavo.commands.eval_tasks import check_tasks

    check_tasks(options)
    for flag in OF_RANKING:
        if options.tasks and getattr(options, flag) is not None:
            raise EvalError(
                f"--{flag.replace('_', '-')} is about embeddings, and --tasks asks questions: leave one out"
            )
    if options.against is None:
        for flag in ("against_revision", "max_kl", "html", *OF_RANKING):
            if getattr(options, flag) is not None:
                raise EvalError(f"--{flag.replace('_', '-')} compares two models: --against names the original")
    for flag in ("json", "html"):
        path: Path | None = getattr(options, flag)
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            what = "is a directory" if path.is_dir() else f"can't be written: {path.parent} is no directory"
            raise EvalError(f"--{flag} {path} {what}")


def _of_tasks(options: EvalOptions, directory: Path, console: Console) -> int:
    """The exit code of --tasks."""
    from octavo.commands.eval_tasks import measure_tasks
    from octavo.jobs.embedding_quality import is_encoder, unmeasured
    from octavo.quant.hub import resolve_model

    if (where := unmeasured(directory)) is not None:
        raise EvalError(f"--tasks: quality is not measured here: {where}")
    if is_encoder(directory):
        raise EvalError("an encoder answers no tasks of lm-eval; --against ORIGINAL alone compares its embeddings")
    original = None if options.against is None else resolve_model(options.against, options.against_revision)
    return 0 if measure_tasks(options, directory, original, console) else NOT_GOOD_ENOUGH


def _config(options: EvalOptions, directory: Path) -> EngineConfig:
    """The configuration that MODEL runs with."""
    from octavo.runtime.config import EngineConfig

    kv: Any = KV_SHORT_NAMES.get(options.kv_cache_dtype, options.kv_cache_dtype)
    return EngineConfig(
        model=str(directory), dtype=options.dtype, kv_cache_dtype=kv, lm_head_dtype=options.lm_head_dtype
    )


def _alone(options: EvalOptions, directory: Path, console: Console) -> None:
    from octavo.jobs.quality import perplexity_of
    from octavo.quant.hub import model_name
    from octavo.report.files import write_whole

    with progress_bar("loading") as bar:
        found = perplexity_of(
            _config(options, directory), max_tokens=options.max_tokens, text=options.data, progress=bar.progress
        )
    console.print(
        f"perplexity {found.perplexity:.3f} over {found.num_tokens:,} tokens of {found.text}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if options.json is not None:
        write_whole(options.json, json.dumps({"model": model_name(options.model), **asdict(found)}, indent=2) + "\n")


def _against(options: EvalOptions, directory: Path, against: str) -> Report:
    from octavo.calibration.report.compare_checkpoints import compare_checkpoints
    from octavo.calibration.report.report import Report, rounded, sizes_of
    from octavo.calibration.report.verdict import judge
    from octavo.calibration.report.weight_error import by_kind, in_order
    from octavo.quant.checkpoint import Checkpoint
    from octavo.quant.hub import hub_id, model_name, resolve_model
    from octavo.runtime.model.families.registry import LAYOUTS

    begin = time.perf_counter()
    original = resolve_model(against, options.against_revision)
    quality = _quality(options, original, directory)
    checkpoints = [Checkpoint.open(path, LAYOUTS, takes_transforms=True) for path in (original, directory)]
    sides = compare_checkpoints(*checkpoints)
    before, after = (sum(c.spec(name).nbytes for name in c.names) for c in checkpoints)
    schemes = _schemes(options, sides.schemes)
    kv_cache = _kv_cache(options, checkpoints[1].kv_cache_dtype)
    verdict = None
    if schemes or kv_cache or options.max_kl is not None:
        verdict = judge(quality, schemes, options.max_kl, layers=sides.rows, algorithm="unknown", kv_cache=kv_cache)
    quantization = checkpoints[1].quantization
    return Report(
        task="eval",
        model=model_name(options.model),
        base_model=hub_id(against),
        architecture=str(checkpoints[1].config.get("model_type")),
        scheme=", ".join(map(str, schemes)) or "unquantized",
        format=quantization.name if quantization else "unquantized",
        algorithm="unknown",
        options={
            "dtype": options.dtype,
            "kv_cache_dtype": options.kv_cache_dtype,
            "lm_head_dtype": options.lm_head_dtype,
        },
        kv_cache=kv_cache,
        sizes=sizes_of(before, after, sides.rows),
        kinds=by_kind(sides.rows),
        layers=in_order(sides.rows),
        quality=quality,
        verdict=verdict,
        warnings=sides.notes,
        seconds=rounded({"evaluate": time.perf_counter() - begin}),
    )


def _quality(options: EvalOptions, original: Path, directory: Path) -> Quality:
    from octavo.jobs.quality import compare
    from octavo.runtime.config import EngineConfig

    dtype: Any = "auto" if options.dtype in AT_LOAD else options.dtype
    with progress_bar("loading") as bar:
        return compare(
            EngineConfig(model=str(original), dtype=dtype),
            _config(options, directory),
            max_tokens=options.max_tokens,
            text=options.data,
            progress=bar.progress,
        )


def _schemes(options: EvalOptions, stored: tuple[QuantScheme, ...]) -> tuple[QuantScheme, ...]:
    """The schemes of what is rounded: in the checkpoint, at load, and in the output head."""
    at_load = [PRESETS[AT_LOAD[options.dtype]]] if options.dtype in AT_LOAD else []
    head = [HEAD_INT8] if options.lm_head_dtype == "int8" else []
    return (*stored, *at_load, *head)


def _kv_cache(options: EvalOptions, stored: str | None) -> str | None:
    """The type of MODEL's KV cache where it is one of 8 bits or fewer."""
    if options.kv_cache_dtype == "auto":
        return stored
    kind: str = options.kv_cache_dtype
    return None if kind in ("float32", "bfloat16", "float16") else kind


def _write(options: EvalOptions, report: Report) -> None:
    from octavo.calibration.report.html import render_html
    from octavo.report.files import write_whole

    if options.json is not None:
        write_whole(options.json, report.to_json())
    if options.html is not None:
        write_whole(options.html, render_html(report))
