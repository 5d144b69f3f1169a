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
    from octavo.calibration.verify import Quality
    from octavo.quant.qparams import Search

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
        type=_count,
        default=2048,
        metavar="N",
        help="tokens of the built-in held-out text to measure on; it has some 3,500 (default: 2048)",
    )


def run(args: argparse.Namespace) -> int:
    """Quantize, measure, report; returns the exit code."""
    os.environ.update({**ENVIRONMENT, **os.environ})  # before torch is imported

    from rich.console import Console

    from octavo.calibration.layers import QuantizeError
    from octavo.calibration.quantize_model import quantize_model
    from octavo.calibration.report import build_report, print_report, write_report
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
        names = {"scheme": args.scheme, "search": search}
        write_report(args.output, build_report(result, **names, quality=None))
    except (QuantizeError, SchemeError, CheckpointError, SafetensorsError, OSError) as e:
        print(f"octavo quantize: {e}", file=sys.stderr)
        return 1
    try:
        quality = None if args.no_eval else _quality(source, args.output, args.eval_tokens, result, console)
    except KeyboardInterrupt:
        print(f"octavo quantize: interrupted; {args.output} is whole, its quality was not measured", file=sys.stderr)
        return 130
    report = build_report(result, **names, quality=quality)
    write_report(args.output, report)
    print_report(report, console)
    console.print(f"written: {args.output}", highlight=False, soft_wrap=True)
    return 0


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


def _quality(source: Path, out: Path, max_tokens: int, result: Quantized, console: Console) -> Quality | None:
    """Measure, or say why not: the checkpoint is written and good either way."""
    from octavo.commands.quality import measure_quality

    try:
        with console.status("measuring quality through the serving path"):
            return measure_quality(source, out, max_tokens=max_tokens)
    except (RuntimeError, ValueError) as e:
        result.warnings.append(f"quality could not be measured: {e}")
        return None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens from 2 up")
    return int(text)


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
