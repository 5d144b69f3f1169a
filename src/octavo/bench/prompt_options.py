"""What is asked: the options of prompts, with vLLM's names where it has them, and the check that they go together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from octavo.bench.server_options import ServerOptions
from octavo.bench.traces import FORMATS, MOONCAKE_BLOCK
from octavo.bench.workloads import WORKLOADS

# Data sets that are files, and the traces' formats that they are in.
FILES = {"custom": "prompts", "sharegpt": "sharegpt", "timed_trace": "timed", "burstgpt": "burstgpt"}
OUTPUT_LEN = {"random": 128, "prefix_repetition": 128}


class PromptOptions(ServerOptions, frozen=True, kw_only=True):
    """The prompts, as given."""

    dataset_name: Annotated[
        Literal["random", "prefix_repetition", "custom", "sharegpt", "timed_trace", "burstgpt"],
        Meta(
            description="random: random words, their tokens counted by the server's /tokenize, openai-chat's template "
            'included; prefix_repetition: the same behind prefixes that prompts share; custom: the "prompt" of each '
            "line of --dataset-path; sharegpt: first messages of its conversations, with answers as long as its own; "
            "timed_trace: lengths and times of a trace; burstgpt: lengths of BurstGPT's",
            extra={"group": "prompts"},
        ),
    ] = "random"
    dataset_path: Annotated[
        Path | None, Meta(description="the file of a data set that is one", extra={"metavar": "FILE"})
    ] = None
    workload: Annotated[
        str | None,
        Meta(
            description="lengths, arrivals, conversations and shared texts after a published source, in place of a "
            "data set",
            extra={"choices": tuple(WORKLOADS), "default": "none"},
        ),
    ] = None
    length_scale: Annotated[
        float,
        Meta(
            gt=0,
            le=1000,
            description="a workload's lengths times this, for a small context",
            extra={"metavar": "FACTOR"},
        ),
    ] = 1.0
    trace: Annotated[
        Path | None,
        Meta(
            description="replay a file: ShareGPT, Mooncake, Azure, BurstGPT, or what vllm bench and guidellm read; "
            "where it has times, they are kept, unless --request-rate says otherwise",
            extra={"metavar": "FILE", "default": "none"},
        ),
    ] = None
    trace_format: Annotated[str, Meta(description="the file's format", extra={"choices": ("auto", *FORMATS)})] = "auto"
    trace_speed: Annotated[
        float, Meta(gt=0, le=1e9, description="replay it that many times as fast", extra={"metavar": "FACTOR"})
    ] = 1.0
    timed_trace_sec_multiplier: Annotated[
        float | None,
        Meta(
            gt=0,
            description="seconds in a unit of the trace's timestamps",
            extra={
                "flag": ("--trace-sec-multiplier", "--timed-trace-sec-multiplier"),
                "metavar": "S",
                "default": "1; mooncake 0.001",
            },
        ),
    ] = None
    timed_trace_chunk_hash_size: Annotated[
        int,
        Meta(
            ge=1,
            description="tokens that one of its hash_ids stands for",
            extra={
                "flag": ("--trace-block-size", "--timed-trace-chunk-hash-size"),
                "metavar": "N",
                "default": "512; timed_trace 16",
            },
        ),
    ] = 0
    num_prompts: Annotated[int, Meta(ge=1, description="requests", extra={"metavar": "N"})] = 1000
    random_input_len: Annotated[
        int,
        Meta(
            ge=1,
            description="tokens of a random prompt",
            extra={"flag": ("--random-input-len", "--input-len"), "metavar": "N"},
        ),
    ] = 1024
    output_len: Annotated[
        int,
        Meta(
            ge=1,
            description="tokens of an answer, at most; with --ignore-eos, exactly",
            extra={
                "flag": ("--random-output-len", "--custom-output-len", "--output-len"),
                "aliases": ("--sharegpt-output-len", "--prefix-repetition-output-len"),
                "metavar": "N",
                "default": "what the file says, else 256; 128 with random prompts",
            },
        ),
    ] = 0
    random_range_ratio: Annotated[
        float,
        Meta(
            ge=0,
            lt=1,
            description="random lengths are uniform within [N * (1 - R), N * (1 + R)]",
            extra={"metavar": "R"},
        ),
    ] = 0.0
    random_prefix_len: Annotated[
        int, Meta(ge=0, description="tokens before them that all prompts share", extra={"metavar": "N"})
    ] = 0
    prefix_repetition_prefix_len: Annotated[
        int, Meta(ge=1, description="of prefix_repetition: tokens of a prefix", extra={"metavar": "N"})
    ] = 256
    prefix_repetition_suffix_len: Annotated[
        int, Meta(ge=1, description="of prefix_repetition: tokens behind it", extra={"metavar": "N"})
    ] = 256
    prefix_repetition_num_prefixes: Annotated[
        int, Meta(ge=1, description="of prefix_repetition: different prefixes", extra={"metavar": "N"})
    ] = 10
    disable_shuffle: Annotated[bool, Meta(description="take a file's prompts in their order")] = False
    oversample: Annotated[
        bool, Meta(description="don't repeat prompts of a file that has too few", extra={"flag": "--no-oversample"})
    ] = True
    tokenizer: Annotated[
        Path | None,
        Meta(
            description="a checkpoint whose tokenizer counts tokens",
            extra={"metavar": "DIR", "default": "the server's /tokenize"},
        ),
    ] = None
    seed: Annotated[
        int | None,
        Meta(
            description="seed of prompts, lengths and arrivals. A seed used twice on one server meets its prefix cache",
            extra={"default": "a new one each time, which is printed"},
        ),
    ] = None

    @property
    def is_random(self) -> bool:
        """True if prompts are made of nothing but lengths."""
        return self.trace is None and self.workload is None and self.dataset_name in OUTPUT_LEN

    @property
    def file(self) -> Path | None:
        """The file that prompts come from, if they do."""
        return self.trace or self.dataset_path

    @property
    def file_format(self) -> str:
        """The format of that file, or auto."""
        return self.trace_format if self.trace is not None else FILES[self.dataset_name]

    @property
    def keeps_times(self) -> bool:
        """True if the file's own times count, where it has some; of burstgpt, lengths alone do, as in vLLM."""
        return self.trace is not None or self.dataset_name == "timed_trace"

    @property
    def block_size(self) -> int:
        """Tokens of a block of a trace."""
        if self.timed_trace_chunk_hash_size:
            return self.timed_trace_chunk_hash_size
        return 16 if self.trace is None else MOONCAKE_BLOCK


def sources_conflict(options: PromptOptions) -> str | None:
    """What is wrong with where the prompts are to come from, or None."""
    if options.workload is not None and options.trace is not None:
        return "--workload and --trace exclude each other: both say what is asked"
    named = "--workload" if options.workload is not None else "--trace" if options.trace is not None else None
    if named and (options.dataset_name != "random" or options.dataset_path is not None):
        return f"{named} takes the place of --dataset-name and --dataset-path"
    if named is None and (options.dataset_name in FILES) != (options.dataset_path is not None):
        names = ", ".join(FILES)
        return f"--dataset-path FILE goes with --dataset-name {names}, and only with them"
    if options.workload is None and options.length_scale != 1:
        return "--length-scale goes with --workload"
    if options.trace_speed != 1 and not options.keeps_times:
        return "--trace-speed goes with --trace"
    return None
