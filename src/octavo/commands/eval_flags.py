"""The flags of `octavo eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from octavo.runtime.config import Dtype


class EvalOptions(msgspec.Struct, frozen=True):
    """The flags of `octavo eval`."""

    model: Annotated[
        str,
        Meta(
            description="a local directory, or a Hugging Face Hub id, in any format that is served",
            extra={"positional": True},
        ),
    ]
    revision: Annotated[
        str | None, Meta(description="branch, tag or commit of a Hub id", extra={"default": "its main branch"})
    ] = None
    against: Annotated[
        str | None,
        Meta(description="the model that MODEL was made of", extra={"metavar": "ORIGINAL", "default": "none"}),
    ] = None
    against_revision: Annotated[
        str | None, Meta(description="its revision", extra={"metavar": "REVISION", "default": "its main branch"})
    ] = None
    data: Annotated[
        Path | None,
        Meta(
            description="a text file, or .jsonl, .json, .parquet or .csv as for calibration; of an encoder-decoder a "
            ".jsonl of prompts and completions",
            extra={"group": "the text", "metavar": "FILE", "default": "octavo's held-out text"},
        ),
    ] = None
    max_tokens: Annotated[
        int,
        Meta(
            ge=2,
            description="tokens of it to measure on",
            extra={"metavar": "N", "what": "a number of tokens from 2 up"},
        ),
    ] = 2048
    tasks: Annotated[
        list[str],
        Meta(
            description="ask tasks of lm-eval (octavo[eval]) instead: arc_easy,hellaswag; with --against in pairs",
            extra={"group": "tasks", "metavar": "TASK", "default": "none"},
        ),
    ] = []
    tasks_path: Annotated[
        Path | None,
        Meta(
            description="a folder of task files, whose names go before lm-eval's own",
            extra={
                "aliases": ("--include-path", "--include_path"),
                "metavar": "DIR",
                "default": "lm-eval's tasks only",
            },
        ),
    ] = None
    tasks_limit: Annotated[
        int | None,
        Meta(ge=1, description="documents of each task", extra={"metavar": "N", "default": "all"}),
    ] = None
    num_fewshot: Annotated[
        int | None,
        Meta(ge=0, description="solved examples in each prompt", extra={"metavar": "N", "default": "as the task says"}),
    ] = None
    apply_chat_template: Annotated[
        bool, Meta(description="send prompts through the model's chat template", extra={"default": "as plain text"})
    ] = False
    dataset: Annotated[
        Path | None,
        Meta(
            description="retrieval in BEIR's layout: a directory or .zip with corpus.jsonl, queries.jsonl and "
            "qrels/test.tsv, or another .tsv of qrels",
            extra={
                "group": "models that embed or rerank",
                "metavar": "DIR|FILE",
                "default": "octavo's held-out questions",
            },
        ),
    ] = None
    runner: Annotated[
        Literal["auto", "generate", "pooling"],
        Meta(description="pooling: both models embed or rerank, whatever their class", extra={"default": "auto"}),
    ] = "auto"
    convert: Annotated[
        Literal["auto", "none", "embed", "classify"],
        Meta(description="as in `octavo serve`", extra={"default": "auto"}),
    ] = "auto"
    max_ndcg_loss: Annotated[
        float | None,
        Meta(
            ge=0,
            le=1,
            description="exit with 3 when nDCG@10 is lower than the original's by more than X",
            extra={"metavar": "X", "default": "no limit", "what": "a number from 0 to 1"},
        ),
    ] = None
    dtype: Annotated[
        Dtype,
        Meta(
            description="what to compute in; fp8, int8 and int4 quantize MODEL while loading it, and only that",
            extra={"group": "how the models run, as in `octavo serve`"},
        ),
    ] = "auto"
    kv_cache_dtype: Annotated[
        Literal[
            "auto",
            "float32",
            "bfloat16",
            "float16",
            "fp8",
            "fp8_e4m3",
            "int8",
            "int8_per_token_head",
            "int4_per_token_head",
        ],
        Meta(description="type of MODEL's KV cache"),
    ] = "auto"
    lm_head_dtype: Annotated[Literal["auto", "int8"], Meta(description="type of MODEL's output head")] = "auto"
    max_kl: Annotated[
        float | None,
        Meta(
            ge=0,
            le=1e300,
            description="exit with 3 when the mean KL is above X nats a token",
            extra={
                "group": "the result",
                "metavar": "X",
                "default": "by MODEL's scheme; without one, no limit",
                "what": "a number of nats from 0 up",
            },
        ),
    ] = None
    json: Annotated[Path | None, Meta(description="write the figures there", extra={"metavar": "OUT"})] = None
    html: Annotated[
        Path | None, Meta(description="write a page with plots there; needs --against", extra={"metavar": "OUT"})
    ] = None
