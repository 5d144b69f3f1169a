"""The flags of `octavo quantize`, and the job that they mean. llm-compressor's and GPTQModel's names."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from octavo.calibration.choices import ActOrder, Algorithm, Format
from octavo.commands.calibration_flags import add_data_arguments
from octavo.commands.flag_types import parse_count, parse_nats, parse_size
from octavo.jobs.quantize import DataOptions, Job, Listener
from octavo.quant.scheme import GROUP_SIZES, PRESETS

if TYPE_CHECKING:
    from octavo.calibration.recipe import Recipe

DEFAULT_SCHEME = "W4A16"
RECIPE_FLAGS = ("scheme", "group_size", "algorithm", "format", "observer", "act_order", "dampening_frac",
                "true_sequential", "smoothing_strength", "kv_cache_scheme", "ignore")  # fmt: skip


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("model", help="a local directory, or a Hugging Face Hub id")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="OUT", help="the directory to write")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id (default: its main branch)")
    _configure_what(parser.add_argument_group("what to quantize, and how"))
    _configure_algorithm(parser.add_argument_group("algorithm"))
    add_data_arguments(parser)
    _configure_output(parser.add_argument_group("output"))
    _configure_quality(parser.add_argument_group("quality"))


def _configure_what(what: argparse._ArgumentGroup) -> None:
    what.add_argument(
        "--scheme",
        type=str.upper,
        choices=PRESETS,
        help="W4A16, W4A16_ASYM, W3A16, W2A16, W8A16: integer weights in groups, input as it is. W8A8 (INT8), W4A8: "
        "the input rounded to int8 per token as well. FP8_DYNAMIC, FP8_BLOCK: weights and input in fp8, weights per "
        "channel or in 128x128 blocks. FP8: one scale each, that of the input from calibration. W4AFP8: 4-bit weights, "
        "fp8 input (required, but with --recipe or --bits-budget)",
    )
    what.add_argument(
        "--group-size",
        type=int,
        choices=(*GROUP_SIZES, -1),
        help="columns that share a scale, -1 for a whole row; for integer weights in groups (default: 128)",
    )
    what.add_argument(
        "--kv-cache-scheme",
        metavar="KV",
        help="calibrate scales for a KV cache in fp8 or int8, one for a layer or, with /head, for each KV head: fp8, "
        "int8/head, k=bf16,v=fp8 (default: none)",
    )
    what.add_argument(
        "--ignore",
        nargs="+",
        action="extend",
        metavar="PATTERN",
        help="linear layers to leave as they are: a name ('model.layers.0.mlp.down_proj', 'down_proj'), a glob "
        "('*.layers.0.*') or a regex ('re:.*o_proj'); lm_head, embeddings and routers always are (default: none)",
    )
    what.add_argument(
        "--bits-budget",
        type=float,
        metavar="BITS",
        help="mixed precision: measure each layer's sensitivity and choose schemes of BITS bits per weight on average, "
        "scales included; the choice is written to OUT/recipe.json (default: one scheme for all)",
    )
    what.add_argument(
        "--recipe", type=Path, metavar="FILE", help="do what a recipe file says, instead of the flags of these groups"
    )


def _configure_algorithm(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--algorithm",
        choices=get_args(Algorithm),
        help="rtn: round each weight by itself, without data. gptq: make each column's error good by those to come. "
        "awq: scale channels by their inputs first. smoothquant: the same for W8A8 (default: rtn)",
    )
    group.add_argument(
        "--observer",
        choices=("mse", "absmax", "minmax"),
        help="how scales are chosen: to cover every weight (absmax, also called minmax), or for the least squared "
        "error (mse) (default: mse for fewer than 8 bits, else absmax)",
    )
    group.add_argument(
        "--act-order",
        choices=get_args(ActOrder),
        help="GPTQ's order of columns: as they stand (none), by importance within the groups of before (static), or "
        "with groups of columns alike, which needs g_idx (group; --format gptq) (default: static)",
    )
    group.add_argument(
        "--dampening-frac",
        type=_share,
        metavar="X",
        help="GPTQ's dampening, as a share of the Hessian's mean diagonal; raised where it doesn't do (default: 0.1)",
    )
    group.add_argument(
        "--true-sequential",
        action="store_const",
        const=True,
        help="measure the inputs of each part of a block once the parts before it are quantized; four times the "
        "forwards (default: measure each block once)",
    )
    group.add_argument(
        "--smoothing-strength",
        type=_share,
        metavar="ALPHA",
        help="SmoothQuant's alpha, from 0 (weights as they are) to 1 (default: 0.8 behind norms, the best of several "
        "behind linear layers)",
    )


def _configure_output(output: argparse._ArgumentGroup) -> None:
    output.add_argument(
        "--format",
        choices=get_args(Format),
        help="compressed-tensors; gptq (v1, what every engine reads) or gptq_v2; awq (GEMM); fp8 (DeepSeek's native "
        "block format, for FP8_BLOCK and FP8) (default: compressed-tensors)",
    )
    output.add_argument("--overwrite", action="store_true", help="replace OUT if it is there (default: refuse)")
    output.add_argument(
        "--resume", action="store_true", help="go on with a run that was killed (default: refuse to lose its work)"
    )
    output.add_argument(
        "--offload-dir",
        type=Path,
        metavar="DIR",
        help="where the calibration samples' hidden states lie while the run lasts (default: beside OUT)",
    )
    output.add_argument(
        "--max-shard-size", type=parse_size, default="5GB", metavar="SIZE", help="largest weight file (default: 5GB)"
    )
    output.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where blocks are run (default: auto)"
    )


def _configure_quality(quality: argparse._ArgumentGroup) -> None:
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


def job_from_args(args: argparse.Namespace, listener: Listener) -> Job:
    """The job that the flags mean. Raises RecipeError."""
    data = DataOptions(args.dataset, args.num_calibration_samples, args.max_seq_length, args.seed, args.chat_template)
    return Job(
        model=args.model,
        output=args.output,
        recipe=_recipe(args),
        data=data,
        bits_budget=args.bits_budget,
        revision=args.revision,
        offload_dir=args.offload_dir,
        max_shard_bytes=args.max_shard_size,
        overwrite=args.overwrite,
        resume=args.resume,
        evaluate=not args.no_eval,
        eval_tokens=args.eval_tokens,
        max_kl=args.max_kl,
        device=args.device,
        listener=listener,
    )


def _recipe(args: argparse.Namespace) -> Recipe:
    from octavo.calibration.recipe import Recipe, RecipeError, read_recipe

    given = [name for name in RECIPE_FLAGS if getattr(args, name) is not None]
    if args.recipe is not None:
        if given or args.bits_budget is not None:
            flags = ", ".join("--" + name.replace("_", "-") for name in (*given, *["bits_budget"] * (not given)))
            raise RecipeError(f"--recipe says all that {flags} would; edit {args.recipe}, or leave one of them out")
        return read_recipe(args.recipe)
    scheme = args.scheme
    if scheme is None:
        if args.bits_budget is None:
            raise RecipeError(f"--scheme is needed, such as {DEFAULT_SCHEME}; or --recipe or --bits-budget")
        scheme = DEFAULT_SCHEME
    spelled = scheme if args.group_size is None else f"{scheme}@{args.group_size}"
    renamed: Mapping[str, Any] = {
        "algorithm": args.algorithm,
        "format": args.format,
        "search": "absmax" if args.observer == "minmax" else args.observer,
        "act_order": args.act_order,
        "dampening": args.dampening_frac,
        "true_sequential": args.true_sequential,
        "smoothing": args.smoothing_strength,
        "kv_cache": args.kv_cache_scheme,
        "ignore": None if args.ignore is None else tuple(args.ignore),
    }
    return replace(Recipe(scheme=spelled), **{name: value for name, value in renamed.items() if value is not None})


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value
