"""Measure a model's perplexity; with --against, what a quantized model lost of the original.

Both run as `octavo serve` runs them, one after the other. The exit code is 3 when the mean KL is above --max-kl.
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

from octavo.commands.failure import one_line
from octavo.commands.flag_types import parse_count, parse_nats
from octavo.commands.progress_bar import progress_bar
from octavo.kernels.native.environment import ENVIRONMENT

if TYPE_CHECKING:
    from rich.console import Console

    from octavo.calibration.report.report import Report
    from octavo.quant.scheme import QuantScheme
    from octavo.runtime.config import EngineConfig

PROG = "octavo eval"
NOT_GOOD_ENOUGH = 3
DTYPES = ("auto", "float32", "bfloat16", "float16", "fp8", "int8", "int4")
AT_LOAD = ("fp8", "int8", "int4")


class EvalError(ValueError):
    """One line that says what was asked for and can't be had."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("model", help="a local directory, or a Hugging Face Hub id, in any format that is served")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id (default: its main branch)")
    parser.add_argument("--against", metavar="ORIGINAL", help="the model that MODEL was made of (default: none)")
    parser.add_argument("--against-revision", metavar="REVISION", help="its revision (default: its main branch)")

    text = parser.add_argument_group("the text")
    text.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="a text file, or .jsonl, .json or .parquet as for calibration (default: octavo's held-out text)",
    )
    text.add_argument(
        "--max-tokens", type=parse_count, default=2048, metavar="N", help="tokens of it to measure on (default: 2048)"
    )

    how = parser.add_argument_group("how the models run", "as in `octavo serve`")
    how.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="what to compute in; fp8, int8 and int4 quantize MODEL while loading it, and only that (default: auto)",
    )
    how.add_argument(
        "--kv-cache-dtype",
        choices=("auto", "float32", "bfloat16", "float16", "fp8", "fp8_e4m3", "int8"),
        default="auto",
        help="of MODEL's KV cache (default: auto)",
    )
    how.add_argument("--lm-head-dtype", choices=("auto", "int8"), default="auto", help="of MODEL (default: auto)")

    output = parser.add_argument_group("the result")
    output.add_argument(
        "--max-kl",
        type=parse_nats,
        metavar="X",
        help="exit with 3 when the mean KL is above X nats a token (default: by MODEL's scheme; without one, no limit)",
    )
    output.add_argument("--json", type=Path, metavar="OUT", help="write the figures there")
    output.add_argument("--html", type=Path, metavar="OUT", help="write a page with plots there; needs --against")


def run(args: argparse.Namespace) -> int:
    """Measure, print, judge; returns the exit code."""
    os.environ.update({**ENVIRONMENT, **os.environ})  # before torch is imported

    from rich.console import Console

    from octavo.calibration.report.report import print_report
    from octavo.calibration.verify import NotFiniteError
    from octavo.jobs.quality import QualityError
    from octavo.quant.checkpoint import CheckpointError

    console = Console()
    try:
        _check(args)
        if args.against is None:
            _alone(args, console)
            return 0
        report = _against(args)
        _write(args, report)
    except NotFiniteError as e:
        print(f"{PROG}: {e}", file=sys.stderr)
        return NOT_GOOD_ENOUGH if e.side == "quantized" else 1
    except (EvalError, QualityError, CheckpointError, ValueError, OSError) as e:
        print(f"{PROG}: {one_line(e)}", file=sys.stderr)
        return 1
    print_report(report, console)
    return NOT_GOOD_ENOUGH if report.verdict is not None and not report.verdict.passed else 0


def _check(args: argparse.Namespace) -> None:
    """Refuse what goes with --against alone, and outputs that could not be written, before minutes are spent."""
    if args.against is None:
        for flag in ("against_revision", "max_kl", "html"):
            if getattr(args, flag) is not None:
                raise EvalError(f"--{flag.replace('_', '-')} compares two models: --against names the original")
    for flag in ("json", "html"):
        path: Path | None = getattr(args, flag)
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            what = "is a directory" if path.is_dir() else f"can't be written: {path.parent} is no directory"
            raise EvalError(f"--{flag} {path} {what}")


def _config(args: argparse.Namespace, directory: Path) -> EngineConfig:
    """How MODEL runs."""
    from octavo.runtime.config import EngineConfig

    kv: Any = "fp8_e4m3" if args.kv_cache_dtype == "fp8" else args.kv_cache_dtype
    return EngineConfig(model=str(directory), dtype=args.dtype, kv_cache_dtype=kv, lm_head_dtype=args.lm_head_dtype)


def _alone(args: argparse.Namespace, console: Console) -> None:
    from octavo.calibration.report.files import write_whole
    from octavo.jobs.quality import perplexity_of
    from octavo.quant.hub import resolve_model

    directory = resolve_model(args.model, args.revision)
    with progress_bar("loading") as bar:
        found = perplexity_of(
            _config(args, directory), max_tokens=args.max_tokens, text=args.data, progress=bar.progress
        )
    console.print(
        f"perplexity {found.perplexity:.3f} over {found.num_tokens:,} tokens of {found.text}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if args.json is not None:
        write_whole(args.json, json.dumps({"model": _name(args.model), **asdict(found)}, indent=2) + "\n")


def _against(args: argparse.Namespace) -> Report:
    from octavo.calibration.report.compare_checkpoints import compare_checkpoints
    from octavo.calibration.report.report import Report, rounded, sizes_of
    from octavo.calibration.report.verdict import judge
    from octavo.calibration.report.weight_error import by_kind, in_order
    from octavo.jobs.quality import compare
    from octavo.quant.checkpoint import Checkpoint
    from octavo.quant.hub import resolve_model
    from octavo.runtime.config import EngineConfig

    begin = time.perf_counter()
    directory = resolve_model(args.model, args.revision)
    original = resolve_model(args.against, args.against_revision)
    dtype: Any = "auto" if args.dtype in AT_LOAD else args.dtype
    with progress_bar("loading") as bar:
        quality = compare(
            EngineConfig(model=str(original), dtype=dtype),
            _config(args, directory),
            max_tokens=args.max_tokens,
            text=args.data,
            progress=bar.progress,
        )
    checkpoints = Checkpoint.open(original), Checkpoint.open(directory)
    sides = compare_checkpoints(*checkpoints)
    before, after = (sum(c.spec(name).nbytes for name in c.names) for c in checkpoints)
    schemes = _schemes(args, sides.schemes)
    kv_cache = _kv_cache(args, checkpoints[1].kv_cache_dtype)
    verdict = None
    if schemes or kv_cache or args.max_kl is not None:
        verdict = judge(quality, schemes, args.max_kl, layers=sides.rows, algorithm="unknown", kv_cache=kv_cache)
    quantization = checkpoints[1].quantization
    return Report(
        task="eval",
        model=_name(args.model),
        base_model=None if Path(args.against).expanduser().is_dir() else args.against,
        architecture=str(checkpoints[1].config.get("model_type")),
        scheme=", ".join(map(str, schemes)) or "unquantized",
        format=quantization.name if quantization else "unquantized",
        algorithm="unknown",
        options={"dtype": args.dtype, "kv_cache_dtype": args.kv_cache_dtype, "lm_head_dtype": args.lm_head_dtype},
        kv_cache=kv_cache,
        sizes=sizes_of(before, after, sides.rows),
        kinds=by_kind(sides.rows),
        layers=in_order(sides.rows),
        quality=quality,
        verdict=verdict,
        warnings=sides.notes,
        seconds=rounded({"evaluate": time.perf_counter() - begin}),
    )


def _schemes(args: argparse.Namespace, stored: tuple[QuantScheme, ...]) -> tuple[QuantScheme, ...]:
    """What is rounded: in the checkpoint, while it is loaded, and in the output head."""
    from octavo.quant.scheme import CHANNEL, PRESETS, QuantScheme, WeightScheme

    presets = {"fp8": "FP8_DYNAMIC", "int8": "W8A8", "int4": "W4A16"}
    at_load = [PRESETS[presets[args.dtype]]] if args.dtype in presets else []
    head = [QuantScheme(WeightScheme("int8", CHANNEL))] if args.lm_head_dtype == "int8" else []
    return (*stored, *at_load, *head)


def _kv_cache(args: argparse.Namespace, stored: str | None) -> str | None:
    """The type of MODEL's KV cache where it is an 8-bit one."""
    if args.kv_cache_dtype == "auto":
        return stored
    kind: str = args.kv_cache_dtype
    return kind if kind in ("fp8", "fp8_e4m3", "int8") else None


def _write(args: argparse.Namespace, report: Report) -> None:
    from octavo.calibration.report.files import write_whole
    from octavo.calibration.report.html import render_html

    if args.json is not None:
        write_whole(args.json, report.to_json())
    if args.html is not None:
        write_whole(args.html, render_html(report))


def _name(model: str) -> str:
    """Of a model, without where on this machine it lies."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model.rpartition("/")[2]
