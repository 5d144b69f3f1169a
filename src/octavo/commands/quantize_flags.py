"""The flags of `octavo quantize`, and the job that they mean. llm-compressor's and GPTQModel's names.

All but a recipe's scheme are fields of the job, its recipe and its calibration data, and are stated there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from octavo.calibration.recipe import WHAT, Recipe, RecipeError, read_recipe
from octavo.flags import add_flags, flags_of, given, read
from octavo.jobs.calibration_data import DataOptions
from octavo.jobs.quantize_job import Job, Listener
from octavo.quant.scheme import GGUF, GGUF_MIXES, GROUP_SIZES, PRESETS

DEFAULT_SCHEME = "W4A16"
TARGETS = ("bits_budget", "target_size", "target_speed", "target_kl")


class SchemeFlags(msgspec.Struct, frozen=True):
    """A recipe's scheme in two flags, or a file of the whole recipe."""

    scheme: Annotated[
        str | None,
        Meta(
            description="W4A16, W4A16_ASYM, W3A16, W2A16, W8A16: integer weights in groups, input as it is. W8A8 "
            "(INT8), W4A8: the input rounded to int8 per token as well. FP8_DYNAMIC, FP8_BLOCK: weights and input in "
            "fp8, weights per channel or in 128x128 blocks. FP8: one scale each, that of the input from calibration. "
            "W4AFP8: 4-bit weights, fp8 input. With --format gguf: Q4_K_M, Q4_K_S, Q5_K_M, Q5_K_S, llama.cpp's mixes, "
            "and Q4_K, Q5_K, Q6_K, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, the same for all layers",
            extra={
                "group": WHAT,
                "parse": str.upper,
                "choices": (*PRESETS, *GGUF_MIXES, *GGUF),
                "default": "none: required, except with --recipe, --bits-budget or a --target",
            },
        ),
    ] = None
    group_size: Annotated[
        int | None,
        Meta(
            description="columns that share a scale, -1 for a whole row; for integer weights in groups",
            extra={"choices": (*GROUP_SIZES, -1), "default": "128"},
        ),
    ] = None
    recipe: Annotated[
        Path | None,
        Meta(description="do what a recipe file says, instead of the flags of a recipe", extra={"metavar": "FILE"}),
    ] = None


FLAGS = flags_of(Job, SchemeFlags, Recipe, DataOptions)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_flags(parser, FLAGS)


def job_from_args(args: argparse.Namespace, listener: Listener) -> Job:
    """The job that the flags mean. Raises RecipeError."""
    return read(Job, args, recipe=_recipe(args), data=read(DataOptions, args), listener=listener)


def _recipe(args: argparse.Namespace) -> Recipe:
    flags = read(SchemeFlags, args)
    targets = given(args, [flag for flag in flags_of(Job) if flag.field in TARGETS])
    if flags.recipe is not None:
        stated = given(args, [flag for flag in flags_of(SchemeFlags, Recipe) if flag.field != "recipe"])
        if stated or targets:
            names = ", ".join(stated or targets)
            raise RecipeError(f"--recipe says all that {names} would; edit {flags.recipe}, or leave one of them out")
        return read_recipe(flags.recipe)
    if flags.scheme is None and not targets:
        raise RecipeError(f"--scheme is needed, such as {DEFAULT_SCHEME}; or --recipe, --bits-budget or a --target")
    scheme = flags.scheme or DEFAULT_SCHEME
    return read(Recipe, args, scheme=scheme if flags.group_size is None else f"{scheme}@{flags.group_size}")
