"""What `octavo quantize` was asked for: the flags of the command and the parameters of the function, once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec import Meta

from octavo.calibration.choices import Effort, ExpertSchemes
from octavo.calibration.progress import Progress, silent
from octavo.calibration.recipe import HOW, WHAT, Recipe
from octavo.calibration.target import Streams, Target, one_target, parse_speed, streams_of
from octavo.flags import parse_count, parse_size
from octavo.jobs.calibration_data import DataOptions

if TYPE_CHECKING:
    from octavo.calibration.preflight import Estimate


Device = Literal["auto", "cpu", "cuda"]
Backend = Literal["mp", "ray"]


@dataclass(frozen=True)
class Listener:
    """Functions that are called while a job runs: the command's show a progress bar, by default nobody listens.

    estimate  called before anything is written
    progress  called with (done, total, what), in any unit
    phase     called with what begins: 'generating text', 'quantizing', 'measuring quality'
    """

    estimate: Callable[[Estimate], None] = lambda _: None
    progress: Progress = silent
    phase: Callable[[str], None] = lambda _: None


class Job(msgspec.Struct, frozen=True):
    """Everything that `quantize` was asked for. Fields with a description are flags of the command."""

    model: Annotated[str, Meta(description="a local directory, or a Hugging Face Hub id", extra={"positional": True})]
    output: Annotated[
        Path, Meta(description="the directory to write", extra={"flag": ("-o", "--output"), "metavar": "OUT"})
    ]
    recipe: Recipe
    data: DataOptions = DataOptions()
    effort: Annotated[
        Effort,
        Meta(
            description="choose the algorithm by the scheme, and how long it may take. fast: rtn. auto: awq+gptq for "
            "weights of 4 bits and fewer, smoothquant for int8 weights and inputs, rtn for others, for models "
            "that octavo has no code of, and for those that can't write text where none is given. "
            "best: tune where auto has awq+gptq or smoothquant, awq+gptq for fp8 weights and inputs",
            extra={"group": HOW},
        ),
    ] = "auto"
    bits_budget: Annotated[
        float | None,
        Meta(
            gt=0,
            description="mixed precision: measure each layer's sensitivity and choose schemes of BITS bits per weight "
            "on average, scales included; the choice is written to OUT/recipe.json",
            extra={"group": WHAT, "metavar": "BITS", "default": "one scheme for all"},
        ),
    ] = None
    expert_schemes: Annotated[
        ExpertSchemes,
        Meta(
            description="in a mixture of experts, what a budget or target chooses a scheme for: all experts of a "
            "layer, as vLLM and octavo's GPU kernels want it, or each expert, which a CPU serves as fast",
            extra={"group": WHAT},
        ),
    ] = "layer"
    target_size: Annotated[
        int | None,
        Meta(
            description="mixed precision of the least loss, in weight files of SIZE at the most, all included",
            extra={"group": WHAT, "metavar": "SIZE", "parse": parse_size, "default": "none"},
        ),
    ] = None
    max_model_len: Annotated[
        int | None,
        Meta(
            ge=1,
            description="let --target-size, or the numbers of --bits-budget, include a KV cache of sequences of N "
            "tokens, and choose its type, too",
            extra={"metavar": "N", "parse": parse_count, "default": "weights alone"},
        ),
    ] = None
    max_num_seqs: Annotated[
        int | None,
        Meta(ge=1, description="how many sequences of --max-model-len", extra={"metavar": "N", "default": "1"}),
    ] = None
    target_speed: Annotated[
        float | None,
        Meta(
            description="mixed precision of the least loss, with which one stream decodes RATIO times as fast as "
            "unquantized (1.8x) by the roofline: by the bytes of weights that a token needs",
            extra={"metavar": "RATIO", "parse": parse_speed, "default": "none"},
        ),
    ] = None
    target_kl: Annotated[
        float | None,
        Meta(
            gt=0,
            description="mixed precision of the fewest bits whose mean KL is X nats a token at the most, rounded to "
            "nearest, on calibration text; also the verdict's limit, unless --max-kl is given",
            extra={"metavar": "X", "default": "none", "what": "a number of nats above 0"},
        ),
    ] = None
    revision: Annotated[
        str | None,
        Meta(description="branch, tag or commit of a Hub id", extra={"group": "", "default": "its main branch"}),
    ] = None
    offload_dir: Annotated[
        Path | None,
        Meta(
            description="where the calibration samples' hidden states lie while the run lasts",
            extra={"group": "output", "metavar": "DIR", "default": "beside OUT"},
        ),
    ] = None
    max_shard_bytes: Annotated[
        int,
        Meta(
            description="largest weight file",
            extra={"flag": "--max-shard-size", "metavar": "SIZE", "parse": parse_size, "default": "5GB"},
        ),
    ] = 5_000_000_000
    overwrite: Annotated[bool, Meta(description="replace OUT if it is there", extra={"default": "refuse"})] = False
    resume: Annotated[
        bool, Meta(description="go on with a run that was killed", extra={"default": "refuse to lose its work"})
    ] = False
    evaluate: Annotated[
        bool,
        Meta(
            description="don't measure quality",
            extra={"group": "quality", "flag": "--no-eval", "default": "measure it"},
        ),
    ] = True
    compares_rtn: Annotated[
        bool,
        Meta(
            description="don't measure what algorithm rtn would have cost",
            extra={"group": "quality", "flag": "--no-compare-rtn", "default": "measure it too, with another algorithm"},
        ),
    ] = True
    eval_tokens: Annotated[
        int,
        Meta(
            ge=2,
            description="tokens of the built-in held-out text to measure on; it has some 3,500",
            extra={"metavar": "N", "what": "a number of tokens from 2 up"},
        ),
    ] = 2048
    max_kl: Annotated[
        float | None,
        Meta(
            ge=0,
            le=1e300,
            description="exit with 3 when the mean KL to the original is above X nats a token",
            extra={"metavar": "X", "default": "by scheme", "what": "a number of nats from 0 up"},
        ),
    ] = None
    device: Annotated[Device, Meta(description="where blocks are run", extra={"group": "output"})] = "auto"
    calibration_workers: Annotated[
        int,
        Meta(
            ge=1,
            description="processes that share the calibration samples, and each layer's rows, this one among them: "
            "each with its part of the cores, or a GPU, and as much memory as one needs",
            extra={"metavar": "N"},
        ),
    ] = 1
    distributed_executor_backend: Annotated[
        Backend,
        Meta(
            description="who starts them: this process, on its machine (mp), or a Ray cluster that it is part of "
            "(ray), whose nodes have the directories of MODEL, OUT and --offload-dir in common"
        ),
    ] = "mp"
    listener: Listener = Listener()

    @property
    def target(self) -> Target | None:
        """What a mixed recipe is to hold. Raises RecipeError for two of them."""
        return one_target(bits=self.bits_budget, size=self.target_size, speed=self.target_speed, kl=self.target_kl)

    @property
    def streams(self) -> Streams | None:
        """Whose KV cache counts beside the weights. Raises RecipeError."""
        return streams_of(self.target, self.max_model_len, self.max_num_seqs)
