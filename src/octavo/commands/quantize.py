"""Write a quantized copy of a checkpoint, and measure what it cost.

The result is a checkpoint that octavo, vLLM and transformers load: compressed-tensors, GPTQ, AWQ or native FP8.
"""

from __future__ import annotations

import argparse
import os
import sys

from octavo.commands.failure import one_line
from octavo.commands.progress_bar import progress_bar
from octavo.commands.quantize_flags import configure, job_from_args
from octavo.commands.termination import unwinding_when_terminated
from octavo.kernels.native.environment import ENVIRONMENT

__all__ = ["configure", "run"]
NOT_GOOD_ENOUGH = 3  # the exit code when the checkpoint is written but its KL is above --max-kl


def run(args: argparse.Namespace) -> int:
    """Quantize, measure, report; returns the exit code."""
    os.environ.update({**ENVIRONMENT, **os.environ})  # before torch is imported

    from rich.console import Console

    from octavo.calibration.layers import QuantizeError
    from octavo.calibration.recipe import RecipeError
    from octavo.calibration.report.terminal import print_report
    from octavo.calibration.text.documents import DataError
    from octavo.calibration.workspace import is_interruption
    from octavo.jobs.quantize import run as run_job
    from octavo.jobs.quantize_job import Listener
    from octavo.quant.model_files import CheckpointError
    from octavo.quant.safetensors_file import SafetensorsError

    console = Console()
    try:
        with unwinding_when_terminated("octavo quantize"), progress_bar("reading", console) as bar:
            listener = Listener(
                estimate=lambda estimate: console.print(f"expected: {estimate}", highlight=False),
                progress=bar.progress,
                phase=bar.phase,
            )
            report = run_job(job_from_args(args, listener))
    except KeyboardInterrupt:
        print(f"octavo quantize: interrupted{_what_is_left(args)}", file=sys.stderr)
        return 130
    except (QuantizeError, RecipeError, DataError, CheckpointError, SafetensorsError) as e:
        print(f"octavo quantize: {one_line(e)}", file=sys.stderr)
        return 1
    except (OSError, MemoryError, RuntimeError) as e:
        if not is_interruption(e):
            raise
        reason = one_line(e) if isinstance(e, OSError) else "out of memory"
        print(f"octavo quantize: {reason}{_what_is_left(args)}", file=sys.stderr)
        return 1
    print_report(report, console)
    console.print(f"written: {args.output}", highlight=False, soft_wrap=True)
    return NOT_GOOD_ENOUGH if report.verdict is not None and not report.verdict.passed else 0


def _what_is_left(args: argparse.Namespace) -> str:
    """A hint at the work that an interrupted run has left."""
    from octavo.calibration.workspace import partial_of

    if (args.output / "config.json").is_file() and not args.overwrite:
        return f"; {args.output} is whole, its quality was not measured"
    return "; --resume goes on with it" if partial_of(args.output.resolve()).is_dir() else ""
