"""Write a quantized checkpoint in another format: the same integers and scales, exactly, or a refusal that says why.

Between compressed-tensors, GPTQ, AWQ, native FP8 and GGUF, where both can carry what the checkpoint holds.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from octavo.calibration.choices import Format
from octavo.commands.failure import one_line
from octavo.commands.progress_bar import progress_bar
from octavo.commands.termination import unwinding_when_terminated
from octavo.flags import add_flags, flags_of, read
from octavo.kernels.native.environment import ENVIRONMENT


class ConvertOptions(msgspec.Struct, frozen=True):
    """The flags of `octavo convert`."""

    model: Annotated[
        str,
        Meta(
            description="a quantized checkpoint: a local directory, or a Hugging Face Hub id",
            extra={"positional": True},
        ),
    ]
    output: Annotated[Path, Meta(description="the directory to write", extra={"positional": True, "metavar": "OUT"})]
    format: Annotated[
        Format,
        Meta(
            description="compressed-tensors: any scheme. gptq, gptq_v2: weights of 2, 3, 4 or 8 bits, also with "
            "desc_act; v2 holds every zero point. awq: weights of 4 bits. fp8: fp8 in blocks or per tensor. "
            "gguf: symmetric weights of 4 or 8 bits in groups of 32 or a multiple, as Q4_0 and Q8_0"
        ),
    ]
    revision: Annotated[
        str | None, Meta(description="branch, tag or commit of a Hub id", extra={"default": "its main branch"})
    ] = None
    overwrite: Annotated[bool, Meta(description="replace OUT if it is there", extra={"default": "refuse"})] = False


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_flags(parser, flags_of(ConvertOptions))


def run(args: argparse.Namespace) -> int:
    """Convert and say what was done; returns the exit code."""
    os.environ.update({**ENVIRONMENT, **os.environ})  # before torch is imported

    from rich.console import Console

    from octavo.calibration.convert_model import convert_model
    from octavo.calibration.layers import QuantizeError
    from octavo.quant.hub import resolve_model
    from octavo.quant.model_files import CheckpointError
    from octavo.quant.safetensors_file import SafetensorsError
    from octavo.runtime.model.families.registry import LAYOUTS

    options = read(ConvertOptions, args)
    try:
        source = resolve_model(options.model, options.revision)
        with unwinding_when_terminated("octavo convert"), progress_bar("layers", Console()) as bar:
            done = convert_model(
                source,
                options.output,
                options.format,
                overwrite=options.overwrite,
                progress=bar.progress,
                layouts=LAYOUTS,
            )
    except (QuantizeError, CheckpointError, SafetensorsError, OSError) as e:
        print(f"octavo convert: {one_line(e)}", file=sys.stderr)
        return 1
    for note in done.notes:
        print(note)
    schemes = ", ".join(dict.fromkeys(str(scheme) for scheme in done.schemes.values()))
    print(
        f"{options.output}: {len(done.schemes)} layers ({schemes}) from {done.source_format} to {options.format}, "
        f"{done.bytes_before / 1e6:,.1f} MB to {done.bytes_after / 1e6:,.1f} MB, every number the same"
    )
    return 0
