"""The engine's configuration: frozen, resolved once, printed at start. Unknown keys are errors.

Each option of `octavo serve` that the engine needs is stated here only: its flag, check, help and documentation are
made of the field (see octavo/flags.py). Flags have vLLM's names; SGLang's are hidden aliases.
"""

# No `from __future__ import annotations`: each option would be compiled again at each start, to make its flag.

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from octavo.flags import configuration, parse_count, parse_size
from octavo.quant.scheme import KV_SHORT_NAMES
from octavo.runtime.lora_config import LoraOptions
from octavo.runtime.parallel.config import ParallelConfig
from octavo.runtime.speculation.config import SpeculativeConfig, parse_speculative

Dtype = Literal["auto", "float32", "bfloat16", "float16", "fp8", "int8", "int4"]
Policy = Literal["fcfs", "priority", "lpm"]
Count = Annotated[int, Meta(ge=1)]
PoolingType = Literal["CLS", "MEAN", "LAST", "MAX"]
KVCacheDtype = Literal[
    "auto", "float32", "bfloat16", "float16", "fp8_e4m3", "int8", "int8_per_token_head", "int4_per_token_head"
]


class KVEventsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the prefix cache tells what it remembers and forgets: vLLM's keys and defaults.

    An endpoint with a `*` or `::` in it, or of ipc, is bound, another one connected to; replay_endpoint is bound.
    replay_endpoint: where messages that were missed can be asked for, of the last buffer_steps. hwm: messages that wait
    for a slow listener, who then misses some. max_queue_size: those that wait to be sent, before the engine waits.
    """

    enable_kv_cache_events: bool = False
    publisher: Literal["null", "zmq"] = "zmq"
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    buffer_steps: Annotated[int, Meta(ge=0)] = 10_000
    hwm: Annotated[int, Meta(ge=0)] = 100_000
    max_queue_size: Annotated[int, Meta(ge=0)] = 100_000
    topic: str = ""

    @property
    def is_on(self) -> bool:
        """Whether anything is told."""
        return self.enable_kv_cache_events and self.publisher == "zmq"


class PoolerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How hidden states are pooled, where it isn't to be as the checkpoint says: vLLM's keys.

    pooling_type (or seq_pooling_type): the first token's, the mean, the last token's, or the largest of each number.
    use_activation: embeddings get the length 1, logits become probabilities. dimensions: the first so many numbers of
    an embedding, where a request doesn't say it.
    """

    pooling_type: PoolingType | None = None
    seq_pooling_type: PoolingType | None = None
    use_activation: bool | None = None
    dimensions: Count | None = None

    @property
    def kind(self) -> PoolingType | None:
        return self.pooling_type or self.seq_pooling_type


class MediaLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many of each kind a prompt may have: vLLM's keys. There are images alone."""

    image: Annotated[int, Meta(ge=0)] = 16
    video: Literal[0] = 0
    audio: Literal[0] = 0


def _parse_length(text: str) -> int | None:
    return None if text in ("auto", "-1") else parse_count(text)


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that the engine process needs to know; it crosses the process boundary as JSON.

    model is a local directory: a Hub id has been resolved to its snapshot before this.
    """

    model: str
    dtype: Annotated[
        Dtype,
        Meta(
            description="what to compute in; fp8, int8 and int4 quantize an unquantized checkpoint while loading it, "
            "and compute in its own type",
            extra={
                "group": "model",
                "default": "auto: the checkpoint's own type, on a CPU bfloat16",
                "spellings": {"half": "float16", "float": "float32"},
            },
        ),
    ] = "auto"
    lm_head_dtype: Annotated[
        Literal["auto", "int8"],
        Meta(
            description="int8: quantize the output head's copy of its weight (per channel, also where it is tied); "
            "fewer bytes for each token"
        ),
    ] = "auto"
    model_impl: Annotated[
        Literal["auto", "octavo", "hf"],
        Meta(
            description="octavo: its own decoder only. hf: transformers' modelling code, slower. auto: the former "
            "where it can",
            extra={"spellings": {"transformers": "hf"}},
        ),
    ] = "auto"
    runner: Annotated[
        Literal["auto", "generate", "pooling"],
        Meta(
            description="pooling: answer with embeddings, scores or labels instead of text, also where the model could "
            "generate. auto: as its class says"
        ),
    ] = "auto"
    convert: Annotated[
        Literal["auto", "none", "embed", "classify"],
        Meta(description="with --runner pooling: what a model becomes whose class is another"),
    ] = "auto"
    pooler_config: Annotated[
        PoolerConfig,
        Meta(
            description='how hidden states become one vector, such as \'{"pooling_type": "MEAN"}\'; also '
            "use_activation, dimensions",
            extra={
                "aliases": ("--override-pooler-config",),
                "metavar": "JSON",
                "parse": configuration(PoolerConfig, "a pooler"),
                "default": "as the checkpoint says",
            },
        ),
    ] = PoolerConfig()
    load_format: Annotated[
        Literal["auto", "safetensors", "dummy"],
        Meta(description="dummy: random weights of the model's shape, to measure speed"),
    ] = "auto"
    trust_remote_code: Annotated[bool, Meta(description="run Python code that lies in the checkpoint")] = False
    device: Annotated[Literal["auto", "cpu", "cuda"], Meta(description="where to compute")] = "auto"
    enforce_eager: Annotated[
        bool,
        Meta(
            description="launch a step's kernels one by one instead of replaying a CUDA graph, or on a CPU a recording",
            extra={"aliases": ("--disable-cuda-graph",)},
        ),
    ] = False
    deterministic: Annotated[
        bool,
        Meta(
            description="give a request the same tokens and log-probabilities, to the bit, whatever else is computed "
            "with it: batch-invariant kernels alone, on a CPU with AVX-512 BF16 and VNNI; VLLM_BATCH_INVARIANT=1 in "
            "the environment asks for it, too",
            extra={"aliases": ("--enable-deterministic-inference",)},
        ),
    ] = False
    num_threads: Annotated[
        Count | None,
        Meta(
            description="CPU threads of the engine, with -tp of each rank",
            extra={"metavar": "N", "default": "all cores, of a rank its share"},
        ),
    ] = None
    max_model_len: Annotated[
        Count | None,
        Meta(
            description="longest sequence, prompt and answer",
            extra={
                "group": "KV cache and batching",
                "aliases": ("--context-length",),
                "metavar": "N",
                "parse": _parse_length,
                "default": "what the model says, less if the cache holds less",
            },
        ),
    ] = None
    max_source_len: Annotated[
        Count | None,
        Meta(
            description="longest prompt of an encoder-decoder, such as T5 or BART, whose encoder reads it; "
            "--max-model-len is of what its decoder writes",
            extra={"metavar": "N", "parse": _parse_length, "default": "what the model says"},
        ),
    ] = None
    kv_cache_dtype: Annotated[
        KVCacheDtype,
        Meta(
            description="type of the KV cache; fp8 is fp8_e4m3",
            extra={
                "spellings": KV_SHORT_NAMES,
                "default": "auto: what the checkpoint was calibrated for, else --dtype's",
            },
        ),
    ] = "auto"
    kv_cache_memory_bytes: Annotated[
        Count | None,
        Meta(
            description="memory of the KV cache, such as 4GiB",
            extra={
                "metavar": "SIZE",
                "parse": parse_size,
                "default": "on a CPU 4 GiB, at most half of what is free; on a GPU see --gpu-memory-utilization",
            },
        ),
    ] = None
    gpu_memory_utilization: Annotated[
        float,
        Meta(
            gt=0,
            le=1,
            description="share of a GPU's memory for weights and KV cache together",
            extra={"aliases": ("--mem-fraction-static", "--device-memory-utilization"), "metavar": "SHARE"},
        ),
    ] = 0.9
    num_blocks: Annotated[
        Count | None,
        Meta(
            description="size of the KV cache in blocks, instead of in bytes",
            extra={"flag": "--num-gpu-blocks-override", "metavar": "N"},
        ),
    ] = None
    block_size: Annotated[
        int, Meta(ge=1, description="tokens of a block", extra={"aliases": ("--page-size",), "metavar": "N"})
    ] = 16
    max_num_seqs: Annotated[
        int,
        Meta(
            ge=1,
            description="sequences that run at once",
            extra={"aliases": ("--max-running-requests",), "metavar": "N"},
        ),
    ] = 256
    max_num_batched_tokens: Annotated[
        int,
        Meta(
            ge=1,
            description="tokens of one step; longer prompts are prefilled in chunks",
            extra={"aliases": ("--chunked-prefill-size",), "metavar": "N", "parse": parse_count},
        ),
    ] = 2048
    enable_prefix_caching: Annotated[
        bool, Meta(description="keep the blocks of finished requests for prompts that begin in the same way")
    ] = True
    limit_mm_per_prompt: Annotated[
        MediaLimits,
        Meta(
            description="images that a prompt of a model that sees may have, such as '{\"image\": 4}'; 0: its tower "
            "is not loaded",
            extra={
                "aliases": ("--limit-mm-data-per-request",),
                "metavar": "JSON",
                "parse": configuration(MediaLimits, "media"),
                "default": "16 images",
            },
        ),
    ] = MediaLimits()
    kv_offloading_size: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(
            description="GiB of files in --kv-offloading-path that blocks of the prefix cache are kept in, of all "
            "engines together: a prompt that begins as an earlier one did is read from there where that is faster than "
            "computing it, also after a restart",
            extra={"metavar": "GIB", "default": "nothing is kept"},
        ),
    ] = None
    kv_offloading_path: Annotated[
        str | None,
        Meta(
            description="directory of those files, which nobody else should be able to read: they tell prompts",
            extra={"metavar": "DIR"},
        ),
    ] = None
    kv_events_config: Annotated[
        KVEventsConfig,
        Meta(
            description="tell gateways which blocks the prefix cache remembers and forgets, such as "
            '\'{"enable_kv_cache_events": true, "endpoint": "tcp://*:5557"}\'; also publisher, replay_endpoint, '
            "buffer_steps, hwm, max_queue_size, topic",
            extra={
                "metavar": "JSON",
                "parse": configuration(KVEventsConfig, "KV events"),
                "default": "nothing is told",
            },
        ),
    ] = KVEventsConfig()
    speculative_config: Annotated[
        SpeculativeConfig | None,
        Meta(
            description="guess next tokens, and check several in one step, on a CPU: "
            '\'{"method": "ngram"}\' out of the request\'s own text, suffix (or auto) also out of finished answers, '
            "draft_model by a second model, eagle3 and mtp by a head; also num_speculative_tokens, and vLLM's keys of "
            "each",
            extra={"flag": ("--speculative-config", "-sc"), "metavar": "JSON", "parse": parse_speculative},
        ),
    ] = None
    share_suffixes: Annotated[
        bool,
        Meta(
            description="with method suffix: finished answers to any API key make drafts for all, who could tell by "
            "the time that an answer takes what others were told"
        ),
    ] = False
    scheduling_policy: Annotated[
        Policy,
        Meta(
            description="who is computed first: who came first (fcfs), requests of lower `priority`, or, of the first "
            "128, those with the longest cached prefix (lpm)",
            extra={"aliases": ("--schedule-policy",)},
        ),
    ] = "fcfs"
    priority_aging: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(
            description="with --scheduling-policy priority: waiting so long weighs as much as one step of priority",
            extra={"metavar": "SECONDS", "default": "waiting counts among equals alone"},
        ),
    ] = None
    seed: Annotated[
        int,
        Meta(
            description="the seed of requests that bring none",
            extra={"group": "text and sampling", "aliases": ("--random-seed",), "metavar": "N"},
        ),
    ] = 0
    parallel: ParallelConfig = ParallelConfig()
    lora: LoraOptions = LoraOptions()
