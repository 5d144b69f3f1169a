"""Write a quantized copy of a checkpoint, and measure what it cost.

The result is a compressed-tensors checkpoint, which octavo, vLLM and transformers load. No calibration data is used.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.kernels.threads import ENVIRONMENT
from octavo.quant.scheme import GROUP_SIZES, PRESETS, QuantScheme, SchemeError, group

if TYPE_CHECKING:
    from rich.console import Console

    from octavo.calibration.quantize_model import Quantized
    from octavo.calibration.report import Report
    from octavo.quant.qparams import Search

NOT_GOOD_ENOUGH = 3  # the exit code when the checkpoint is written but its KL is above --max-kl
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("model", help="a local directory, or a Hugging Face Hub id")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="OUT", help="the directory to write")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id (default: its main branch)")

    what = parser.add_argument_group("what to quantize, and how")
    what.add_argument(
        "--scheme",
        required=True,
        type=str.upper,
        choices=PRESETS,
        help="W4A16, W4A16_ASYM, W8A16: integer weights in groups, input as it is. W8A8: int8 weights and int8 input, "
        "rounded per token. FP8_DYNAMIC, FP8_BLOCK: the same in fp8, weights per channel or in 128x128 blocks",
    )
    what.add_argument(
        "--group-size",
        type=int,
        choices=(*GROUP_SIZES, -1),
        help="columns that share a scale, -1 for a whole row; for W4A16, W4A16_ASYM and W8A16 (default: 128)",
    )
    what.add_argument(
        "--observer",
        choices=("mse", "absmax", "minmax"),
        help="how scales are chosen: to cover every weight (absmax, also called minmax), or for the least squared "
        "error (mse) (default: mse for 4 bits, else absmax)",
    )
    what.add_argument(
        "--ignore",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATTERN",
        help="linear layers to leave as they are: a name ('model.layers.0.mlp.down_proj', 'down_proj'), a glob "
        "('*.layers.0.*') or a regex ('re:.*o_proj'); lm_head, embeddings and routers always are (default: none)",
    )

    _configure_output(parser)


def _configure_output(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("output")
    output.add_argument("--overwrite", action="store_true", help="replace OUT if it is there (default: refuse)")
    output.add_argument(
        "--max-shard-size", type=parse_size, default="5GB", metavar="SIZE", help="largest weight file (default: 5GB)"
    )

    quality = parser.add_argument_group("quality")
    quality.add_argument("--no-eval", action="store_true", help="don't measure quality (default: measure it)")
    quality.add_argument(
        "--eval-tokens",
        type=parse_count,
        default=2048,
        metavar="N",
        help="tokens of the built-in held-out text to measure on; it has some 3,500 (default: 2048)",
    )
    quality.add_argument(
        "--max-kl",
        type=parse_nats,
        metavar="X",
        help="exit with 3 when the mean KL to the original is above X nats a token (default: by scheme)",
    )


def run(args: argparse.Namespace) -> int:
    """Quantize, measure, report; returns the exit code."""
    os.environ.update({**ENVIRONMENT, **os.environ})  # before torch is imported

    from rich.console import Console

    from octavo.calibration.layers import QuantizeError
    from octavo.calibration.quantize_model import quantize_model
    from octavo.calibration.report import print_report
    from octavo.calibration.report_files import write_reports
    from octavo.quant.checkpoint import CheckpointError
    from octavo.quant.hub import resolve_model
    from octavo.quant.safetensors_file import SafetensorsError

    console = Console()
    try:
        scheme = _scheme(args.scheme, args.group_size)
        search = _search(args.observer, scheme)
        source = resolve_model(args.model, args.revision)
        with _clearing_up_when_terminated(), _Bar(console) as bar:
            result = quantize_model(
                source,
                args.output,
                scheme,
                search=search,
                ignore=args.ignore,
                max_shard_bytes=args.max_shard_size,
                overwrite=args.overwrite,
                progress=bar.update,
            )
        report = _report(args, result, search)
        write_reports(args.output, report, source=source)
    except (QuantizeError, SchemeError, CheckpointError, SafetensorsError, OSError) as e:
        print(f"octavo quantize: {e}", file=sys.stderr)
        return 1
    try:
        report = report if args.no_eval else _with_quality(source, args, report, console)
    except KeyboardInterrupt:
        print(f"octavo quantize: interrupted; {args.output} is whole, its quality was not measured", file=sys.stderr)
        return 130
    write_reports(args.output, report, source=source)
    print_report(report, console)
    console.print(f"written: {args.output}", highlight=False, soft_wrap=True)
    return NOT_GOOD_ENOUGH if report.verdict is not None and not report.verdict.passed else 0


@contextmanager
def _clearing_up_when_terminated() -> Iterator[None]:
    """SIGTERM as an exception, like Ctrl-C: what was half written is removed on the way out."""

    def end(number: int, frame: object) -> None:  # noqa: ARG001 (the system calls it)
        print("octavo quantize: terminated", file=sys.stderr)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _scheme(name: str, group_size: int | None) -> QuantScheme:
    scheme = PRESETS[name]
    if group_size is None:
        return scheme
    if scheme.weight.granularity.kind != "group":
        raise SchemeError(
            f"--group-size is for W4A16, W4A16_ASYM and W8A16; {name} scales per {scheme.weight.granularity}"
        )
    return replace(scheme, weight=replace(scheme.weight, granularity=group(group_size)))


def _search(observer: str | None, scheme: QuantScheme) -> Search:
    if observer is None:
        return "mse" if scheme.weight.bits < 8 else "absmax"
    return "mse" if observer == "mse" else "absmax"


def _report(args: argparse.Namespace, result: Quantized, search: Search) -> Report:
    """What is known before the quality is."""
    from octavo.calibration.report import build_report
    from octavo.calibration.weight_error import layer_row

    local = Path(args.model).expanduser().is_dir()
    rows = [
        layer_row(
            layer.linear.module,
            layer.linear.index,
            layer.linear.kind,
            (layer.linear.out_features, layer.linear.in_features),
            scheme=result.scheme,
            bytes_before=layer.bytes_before,
            bytes_after=layer.bytes_after,
            error=(layer.signal, layer.noise),
        )
        for layer in result.layers
    ]
    return build_report(
        model=Path(args.model).expanduser().resolve().name if local else args.model.rpartition("/")[2],
        base_model=None if local else args.model,
        scheme=args.scheme,
        format="compressed-tensors",
        algorithm="rtn",
        options={"search": search},
        layers=rows,
        bytes_before=result.bytes_before,
        bytes_after=result.bytes_after,
        ignore=result.selection.ignore,
        warnings=result.warnings,
    )


def _with_quality(source: Path, args: argparse.Namespace, report: Report, console: Console) -> Report:
    """Measure and judge, or say why not: the checkpoint is written and whole either way."""
    from octavo.calibration.verdict import judge
    from octavo.commands.quality import measure_quality

    try:
        with console.status("measuring quality through the serving path"):
            quality = measure_quality(source, args.output, max_tokens=args.eval_tokens)
    except (RuntimeError, ValueError) as e:
        return replace(report, warnings=(*report.warnings, f"quality could not be measured: {e}"))
    scheme = _scheme(args.scheme, args.group_size)
    verdict = judge(quality, [scheme], args.max_kl, layers=report.layers, algorithm=report.algorithm)
    return replace(report, quality=quality, verdict=verdict)


def parse_count(text: str) -> int:
    """A number of tokens to measure on."""
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens from 2 up")
    return int(text)


def parse_nats(text: str) -> float:
    """A KL divergence: a finite number from 0 up."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of nats from 0 up")
    return value


def parse_size(text: str) -> int:
    """'5GB' in bytes, with the units that transformers has."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB, 500MB or 2GiB")
    return int(float(match[1]) * unit)


class _Bar:
    """A progress bar with the time that is left."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("quantizing", total=None)

    def update(self, done: int, total: int, name: str) -> None:
        self._progress.update(self._task, completed=done, total=total, description=name)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()
