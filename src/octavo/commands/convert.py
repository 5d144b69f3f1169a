"""Write a quantized checkpoint in another format: the same integers and scales, exactly, or a refusal that says why.

Between compressed-tensors, GPTQ, AWQ and native FP8, where both can carry what the checkpoint holds.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from octavo.commands.failure import one_line
from octavo.commands.progress_bar import progress_bar
from octavo.commands.termination import unwinding_when_terminated
from octavo.kernels.native.environment import ENVIRONMENT

FORMATS = ("compressed-tensors", "gptq", "gptq_v2", "awq", "fp8")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("model", help="a quantized checkpoint: a local directory, or a Hugging Face Hub id")
    parser.add_argument("output", type=Path, metavar="OUT", help="the directory to write")
    parser.add_argument(
        "--format",
        required=True,
        choices=FORMATS,
        help="compressed-tensors: any scheme. gptq, gptq_v2: weights of 2, 3, 4 or 8 bits, also with desc_act; v2 "
        "holds every zero point. awq: weights of 4 bits. fp8: fp8 in blocks or per tensor",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id (default: its main branch)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there (default: refuse)")


def run(args: argparse.Namespace) -> int:
    """Convert and say what was done; returns the exit code."""
    os.environ.update({**ENVIRONMENT, **os.environ})  # before torch is imported

    from rich.console import Console

    from octavo.calibration.convert_model import convert_model
    from octavo.calibration.layers import QuantizeError
    from octavo.quant.checkpoint import CheckpointError
    from octavo.quant.hub import resolve_model
    from octavo.quant.safetensors_file import SafetensorsError

    try:
        source = resolve_model(args.model, args.revision)
        with unwinding_when_terminated("octavo convert"), progress_bar("layers", Console()) as bar:
            done = convert_model(
                source,
                args.output,
                args.format,
                overwrite=args.overwrite,
                progress=bar.progress,
            )
    except (QuantizeError, CheckpointError, SafetensorsError, OSError) as e:
        print(f"octavo convert: {one_line(e)}", file=sys.stderr)
        return 1
    for note in done.notes:
        print(note)
    schemes = ", ".join(dict.fromkeys(str(scheme) for scheme in done.schemes.values()))
    print(
        f"{args.output}: {len(done.schemes)} layers ({schemes}) from {done.source_format} to {args.format}, "
        f"{done.bytes_before / 1e6:,.1f} MB to {done.bytes_after / 1e6:,.1f} MB, every number the same"
    )
    return 0
