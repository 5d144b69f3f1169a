"""Flags of `vllm serve` and of SGLang's server that octavo has no option for: taken where they ask for what it does
anyway, and refused with what works instead.

So a start line copied from either's documentation starts, or dies with one line that names the flag. The table is about
vLLM 0.32 and SGLang 0.5.23, and names of older releases that their documentation still shows. A `*` at a name's end
stands for any characters; names that octavo's options have are looked up there first, unless a row takes the value.
"""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from typing import Literal, NamedTuple

ANY = "*"
Takes = Literal["nothing", "one", "some"]


class PeerFlag(NamedTuple):
    """A row: names, how many values follow, the values at which it changes nothing (ANY: all), and what to say.

    The text is a fact about octavo, which tells why nothing changes, and what to do where the flag is refused.
    """

    names: str
    takes: Takes
    accepted: str
    text: str


def _moot(names: str, text: str, takes: Takes = "nothing") -> PeerFlag:
    """octavo does what it asks for."""
    return PeerFlag(names, takes, ANY, text)


def _moot_at(names: str, values: str, text: str) -> PeerFlag:
    """octavo does what it asks for at these values, and refuses others."""
    return PeerFlag(names, "one", values, text)


def _refused(names: str, text: str) -> PeerFlag:
    """octavo does not do it."""
    return PeerFlag(names, "some", "", text)


NO_SUCH_ADAPTERS = "adapters change a text model's linear layers here, and nothing else: leave it out"
DRAFTS = (
    "--speculative-config with the methods ngram, suffix, auto, draft_model, eagle3 and mtp is what there is, and "
    "--speculative-algorithm NGRAM, STANDALONE, EAGLE3 or NEXTN; answers are the same without it"
)
NOTHING_FETCHED = "nothing is fetched for a request: images come in it, or lie below --allowed-local-media-path"
NO_MEDIA_KNOBS = "images are read as the checkpoint's processor says, and there is no other media: leave it out"
ONE_DEVICE = (
    "-dp runs several engines behind one server, -tp and -pp divide a model over the cores of a CPU, --nnodes over "
    "machines, --distributed-executor-backend ray over a Ray cluster's nodes; "
    "nothing else is divided yet: leave it out"
)
NO_OFFLOAD = "weights and KV cache stay on the device: --dtype int4 makes weights small, --kv-cache-dtype the cache"
OWN_FILE = (
    "--kv-offloading-size GIB and --kv-offloading-path DIR keep blocks of the prefix cache in a file of octavo's own: "
    "leave it out"
)
NO_KNOB = "octavo has no such setting, and answers are the same without it: leave it out"
NO_HYBRIDS = "models with a state cache (Mamba, linear attention) are not supported yet"
OWN_KERNELS = "octavo chooses the kernel of each layer itself, and prints it when it starts"
NOT_TRACED = "octavo sends no traces: GET /metrics is what it counts, --enable-log-requests what it logs"
EXACT_CHECKPOINT = "what the checkpoint says is what is served: change it in a copy of its config.json"
ONE_PROCESS = "--api-server-count says how many processes serve HTTP, with all that goes with it: leave it out"

TABLE: tuple[PeerFlag, ...] = (
    # what octavo does anyway
    _moot("--enable-chunked-prefill", "long prompts are always prefilled in chunks of --max-num-batched-tokens"),
    _moot("--enable-mixed-chunk", "a step always holds prompts and answers together"),
    _moot("--async-scheduling", "steps are planned while others are computed wherever that is faster"),
    _moot("--scheduler-reserve-full-isl", "a prompt is always admitted only where all of it fits into the cache"),
    _moot("--max-num-partial-prefills --max-long-partial-prefills", "a step prefills as many prompts as fit", "one"),
    _moot("--enable-multimodal", "images are read wherever the model's tower is known"),
    _moot("--enable-reasoning", "reasoning is told from the answer wherever a model's way to write it is known"),
    _moot("--disable-frontend-multiprocessing", "the engine always has a process of its own, and answers are the same"),
    _moot("--use-v2-block-manager", "there is one block manager"),
    _moot("--swap-space", "a sequence that gives way is computed again, and never swapped", "one"),
    _moot("--enable-auto-tool-choice", "tool calls are read wherever a request brings tools"),
    _moot("--grammar-backend --guided-decoding-backend", "grammars are llguidance's, whatever it says", "one"),
    _moot("--disable-outlines-disk-cache", "grammars are llguidance's, and none are kept on a disk"),
    _moot("-O --optimization-level --compilation-config -cc --torch-compile-max-bs",
          "nothing is compiled by torch: kernels are octavo's own",
          "one"),
    _moot("--enable-torch-compile", "nothing is compiled by torch: kernels are octavo's own"),
    _moot("--cudagraph-capture-sizes --cuda-graph-bs --cuda-graph-bs-*",
          "CUDA graphs are captured for sizes of octavo's own; --enforce-eager does without", "some"),
    _moot("--max-cudagraph-capture-size --max-seq-len-to-capture --cuda-graph-max-* --cuda-graph-config "
          "--cuda-graph-prefill-max-context --context-bucket",
          "CUDA graphs are captured for sizes of octavo's own; --enforce-eager does without", "one"),
    _moot("--disable-prefill-cuda-graph", "a prompt's chunks are never replayed from CUDA graphs"),
    _moot("--attention-backend --decode-attention-backend --prefill-attention-backend --attention-config -ac "
          "--sampling-backend --moe-backend --moe-runner-backend --linear-backend --fp8-gemm-backend "
          "--fp4-gemm-backend --bf16-gemm-backend --fp8-gemm-runner-backend --fp4-gemm-runner-backend --kernel-config",
          OWN_KERNELS, "one"),
    _moot("--disable-cascade-attn --disable-flashinfer-autotune", OWN_KERNELS),
    _moot("--enable-metrics --enable-metrics-for-all-schedulers", "GET /metrics is always there"),
    _moot("--skip-server-warmup", "the server never sends itself a request to warm up"),
    _moot("--enable-cache-report --enable-prompt-tokens-details", "cached_tokens always stands in the usage"),
    _moot("--enable-request-id-headers", "X-Request-Id always comes back with the response"),
    _moot("--enable-server-load-tracking", "GET /load always counts"),
    _moot("--enable-tokenizer-info-endpoint", "GET /tokenizer_info is always there"),
    _moot("--disable-log-requests", "requests are logged with --enable-log-requests alone"),
    _moot("--max-log-len", "no text of a request is logged", "one"),
    _moot("--enable-log-deltas", "no text of an answer is logged"),
    _moot("--log-error-stack", "an unexpected error is always logged with its stack"),
    _moot("--use-tqdm-on-load", "how long each phase of the start took is printed at its end"),
    _moot("--disable-custom-all-reduce", "ranks of a CPU add up over shared memory"),
    _moot("--enable-ep-weight-filter", "with --enable-expert-parallel a rank never reads others' experts"),
    _moot("--all2all-backend", "all ranks of an engine have all tokens, and send none to experts", "one"),
    _moot("--schedule-low-priority-values-first", "lower values of `priority` always go first"),
    _moot("--exclude-tools-when-tool-choice-none", "a model is never shown tools that it may not call"),
    _moot("--cohere-is-reasoning-model", "/cohere is not served, which it is about"),
    _moot("--swa-bounded-replay", "a layer with a window always computes what it needs of a cached prefix"),
    # values that ask for nothing
    _moot_at("-q --quantization", "awq awq_marlin gptq gptq_marlin marlin compressed-tensors modelopt fbgemm_fp8 "
             "auto-round auto_gptq inc w8a8_int8 w8a8_fp8 torchao",
             "how a checkpoint is quantized is read from it"),
    _moot_at("--load-format", "pt npcache fastsafetensors safetensors_prefetch", "weights are read from safetensors"),
    _moot_at("--decode-context-parallel-size -dcp --dcp-size --prefill-context-parallel-size -pcp "
             "--attn-dp-size --attention-data-parallel-size "
             "--attn-cp-size --attention-context-parallel-size --moe-dp-size --moe-data-parallel-size --dwdp-size",
             "1", ONE_DEVICE),
    _moot_at("--base-gpu-id --data-parallel-rank -dpn", "0", ONE_DEVICE),
    _moot_at("--gpu-id-step", "1", ONE_DEVICE),
    _moot_at("--expert-placement-strategy", "linear", "--enable-expert-parallel deals experts out in their order"),
    _moot_at("--moe-a2a-backend", "none", "all ranks of an engine have all tokens: leave it out"),
    _moot_at("--cpu-offload-gb --ubatch-size --kv-offloading-size", "0", NO_OFFLOAD),
    _moot_at("--kv-offloading-backend", "native", OWN_FILE),
    _moot_at("--tokenizer-mode", "auto hf", "the tokenizer is the checkpoint's own: leave it out"),
    _moot_at("--tokenizer-backend", "huggingface", "the tokenizer is the checkpoint's own: leave it out"),
    _moot_at("--config-format --model-config-parser", "auto hf", "config.json is what is read: leave it out"),
    _moot_at("--hf-overrides --json-model-override-args --model-loader-extra-config", "{}", EXACT_CHECKPOINT),
    _moot_at("--ssl-cert-reqs", "0", "clients' certificates are not checked: leave it out, or check them in a proxy"),
    _moot_at("--allowed-methods --allowed-headers", '["*"]', "--allowed-origins allows all methods and headers"),
    _moot_at("--renderer-num-workers --tokenizer-worker-num --detokenizer-worker-num",
             "1", ONE_PROCESS),
    _moot_at("--num-scheduler-steps --num-continuous-decode-steps --prefill-schedule-interval", "1", NO_KNOB),
    _moot_at("--logprobs-mode", "raw_logprobs", "log-probabilities are the model's own: leave it out"),
    _moot_at("--response-role", "assistant", "answers are an assistant's: leave it out"),
    _moot_at("--chat-template-content-format", "auto",
             "whether a template takes parts or text is read from it: leave it out, or give --chat-template"),
    _moot_at("--preemption-mode", "recompute", "a sequence that gives way is computed again: leave it out"),
    _moot_at("--num-lookahead-slots", "0", DRAFTS),
    _moot_at("--performance-mode", "balanced", NO_KNOB),
    _moot_at("--schedule-conservativeness", "1 1.0", NO_KNOB),
    _moot_at("--radix-eviction-policy", "lru", "cached prefixes leave in the order of their last use: leave it out"),
    _moot_at("--long-prefill-token-threshold --sse-keep-alive-interval", "0", NO_KNOB),
    _moot_at("--prefix-caching-hash-algo", "sha256 builtin", "prefixes are named by SHA-256: leave it out"),
    _moot_at("--disaggregation-mode --decoupled-spec-role", "null", ONE_DEVICE),
    _moot_at("--fingerprint-mode", "none", "answers have no system_fingerprint: leave it out"),
    _moot_at("--lora-eviction-policy", "lru", NO_KNOB),
    _moot_at("--default-mm-loras --additional-config --override-neuron-config", "{}", NO_KNOB),
    # refused: model and weights
    _refused("--hf-token", "give the token in the variable HF_TOKEN, which no list of processes shows"),
    _refused("--code-revision --tokenizer-revision", "--revision is the whole repository's; --tokenizer DIR another's"),
    _refused("--hf-config-path --model-class-overrides --quantization-config --quantization-param-path "
             "--override-attention-dtype --rope-scaling --rope-theta --disable-sliding-window "
             "--calculate-kv-scales", EXACT_CHECKPOINT),
    _refused("--allow-deprecated-quantization --modelopt-* --quantize-and-serve --rl-quant-profile --torchao-config",
             "`octavo quantize` writes quantized checkpoints; -q fp8, int8 or int4 quantizes while loading"),
    _refused("--skip-tokenizer-init --tokens-only",
             "the tokenizer is always read; requests may bring token ids as `prompt`; return_token_ids sends ids"),
    _refused("--safetensors-* --ignore-patterns --pt-load-map-location --max-parallel-loading-workers "
             "--weight-loader-* --weight-cache-* --startup-weight-load-mode --custom-weight-loader --model-checksum "
             "--remote-instance-weight-loader-* --engine-info-bootstrap-port --modelexpress-config "
             "--delete-ckpt-after-loading --decrypted-* --checkpoint-engine-* "
             "--enable-weights-cpu-backup --enable-draft-weights-cpu-backup",
             "safetensors files are mapped and read once: leave it out"),
    _refused("--weight-transfer-config --weight-version",
             "--enable-weight-updates lets POST /update_weights name a directory, and its version"),
    _refused("--sleep-* --enable-cumem-allocator",
             "--enable-sleep-mode gives back the KV cache's memory at level 1, and all of an engine's at level 2"),
    _refused("--kv-cache-dtype-skip-layers --prefill-kv-cache-dequant-dtype --mm-encoder-attn-dtype "
             "--qsa-indexer-dtype --enable-fp32-lm-head --enable-tf32-matmul --use-fp64-gumbel",
             "--dtype, --kv-cache-dtype and --lm-head-dtype are the types there are"),
    # refused: parallel
    _refused("--data-parallel-* -dph -dpe -dpm --dp-* --dcp-* --cp-* --pp-* --enable-dbo --dbo-* "
             "--enable-hc-sp --enable-eplb "
             "--eplb-* --enable-elastic-ep --elastic-ep-* --max-ep-size "
             "--enable-batch-sharded-sampling --disable-nccl-* "
             "--cpu-distributed-timeout-seconds --dist-* --nccl-* --device-ids --numa-* --ray-workers-use-nsight "
             "--use-ray --worker-use-ray --engine-use-ray --enable-nccl-* --enable-fault-tolerance "
             "--fault-tolerance-config "
             "--load-balance-method --enable-dp-* --enable-tp-* --enable-attn-* --disable-attn-* --enable-prefill-cp "
             "--enable-shared-experts-attn-tp --shared-experts-tp-size --enable-dense-mlp-attn-tp "
             "--enable-layernorm-sp --enable-megamoe-* --enable-p2p-check --moe-dense-tp-size "
             "--enable-symm-mem --enable-mscclpp --enable-torch-symm-mem --enable-scattered-sconv --pre-warm-nccl "
             "--boundary-reduction --enable-quant-communications --enforce-disable-flashinfer-* "
             "--enable-flashinfer-allreduce-fusion --flashinfer-allreduce-* --enable-aiter-* --disable-aiter-* "
             "--enable-fused-moe-sum-all-reduce --deepep-* --fuseep-mode --flashinfer-a2a-* --ep-* "
             "--init-expert-location --expert-distribution-* --expert-balancedness-* --enable-elastic-* "
             "--mooncake-ib-device --enable-waterfill --enable-two-batch-overlap --enable-single-batch-overlap "
             "--tbo-* --enable-dsa-cache-layer-split --enable-cp-* --enable-kv-cache-sharding --gated-launch-port",
             ONE_DEVICE),
    _refused("--kv-transfer-config", OWN_FILE),
    _refused("--disaggregation-* --ec-transfer-config --ec-manager-config "
             "--num-reserved-decode-tokens --enable-pd-role-switch --optimistic-prefill-attempts --encoder-* "
             "--enable-adaptive-dispatch-to-encoder --enable-pdmux --pdmux-* --sm-group-num --decoupled-spec-*",
             "prompts and answers are computed by the same engine: leave it out"),
    # refused: caches and scheduling
    _refused("--enable-hierarchical-cache --enable-hicache --hicache-* --enable-lmcache --lmcache-* "
             "--enable-flexkv --flexkv-*", OWN_FILE),
    _refused("--offload-* --cpu-offload-* --enable-unified-* --unified-cache-* --enable-linker-mla-dedup "
             "--enable-hisparse --hisparse-config --hierarchical-sparse-* --ple-offload-* --enable-paged-experts "
             "--paged-experts-* --kt-*", NO_OFFLOAD),
    _refused("--max-total-tokens", "--kv-cache-memory-bytes or --num-gpu-blocks-override sets the cache's size"),
    _refused("--max-prefill-tokens --max-num-scheduled-tokens --prefill-max-requests",
             "--max-num-batched-tokens is the size of a step"),
    _refused("--max-num-active-seqs", "--max-num-seqs is how many run at once"),
    _refused("--enable-priority-scheduling --disable-priority-preemption --default-priority-value "
             "--abort-on-priority-when-disabled --priority-scheduling-preemption-threshold",
             "--scheduling-policy priority obeys `priority` in requests; lower values go first"),
    _refused("--scheduler-cls --worker-cls --worker-extension-cls --logits-processors --io-processor-plugin "
             "--tool-parser-plugin --reasoning-parser-plugin --enable-custom-logit-processor --forward-hooks "
             "--middleware --sidecar --sidecar-args", "code of others is not loaded into the server: leave it out"),
    _refused("--watchdog-timeout --soft-watchdog-timeout", "--engine-timeout says when a frozen engine is given up"),
    _refused("--allow-auto-truncate", "a request cuts its prompt itself: truncate_prompt_tokens"),
    _refused("--rl-on-policy-target",
             "no trainer's kernels are matched; --deterministic gives the same bits in any batch"),
    _refused("--disable-hybrid-kv-cache-manager --disable-hybrid-swa-memory --disable-chunked-mm-input "
             "--disable-chunked-prefix-cache --disable-overlap-schedule --scheduler-recv-interval "
             "--enable-dynamic-chunking --prefill-decode-* --prefill-delayer-* --enable-prefill-delayer "
             "--min-free-slots-delay --retraction-policy --watermark --c128-page-size --swa-* "
             "--prefill-only-disable-kv-cache --long-prefill-token-threshold-adaptive --prefix-cache-* "
             "--prefix-match-unit --kv-sharing-fast-prefill --enable-shm-tensor-arena --batch-notify-size "
             "--enable-page-major-kv-layout --enable-session-radix-cache --radix-cache-backend --radix-eviction-* "
             "--enable-dynamic-batch-tokenizer --dynamic-batch-* --enable-tokenizer-batch-encode "
             "--disable-tokenizer-batch-decode --gc-* --sleep-on-idle --dllm-* --diffusion-config -dc "
             "--engram-config --enable-mis --strip-thinking-cache --kv-canary* --disable-cuda-graph-padding "
             "--disable-decode-cuda-graph --enable-profile-cuda-graph --enable-cudagraph-gc --debug-cuda-graph "
             "--cuda-graph-backend-* --enable-torch-compile-debug-mode --jit-monitor-* --ir-op-priority "
             "--fail-on-environ-validation --enable-flash-late-interaction --enable-encoder-* --enable-decoder-* "
             "--enable-http-worker-reuseport --load-snapshot-publish-interval "
             "--http2-*", NO_KNOB),
    _refused("--triton-attention-* --flashinfer-* --enable-flashinfer-autotune --enable-fused-qk-norm-rope "
             "--enable-precise-embedding-interpolation --enable-lean-attention --enable-nvidia-megakernel "
             "--enable-amd-monokernel --monokernel-backend --dsa-* --dsv4-* --enable-deepseek-* --enable-dsa-* "
             "--sparse-indexer-* --disable-shared-experts-fusion --enforce-shared-experts-fusion "
             "--disable-flashinfer-cutlass-* --enable-w4a4-mxfp4-megamoe --mlx-enable-sampling", OWN_KERNELS),
    _refused("--mamba-* --enable-mamba-* --max-mamba-cache-size --enable-int8-mamba-checkpoint --int8-mamba-* "
             "--linear-attn-* --enable-linear-* --linear-replayssm-* --use-replayssm --replayssm-* --gdn-* --kda-*",
             NO_HYBRIDS),
    # refused: what is not supported, or not yet
    _refused("--lora-backend --lora-drain-wait-threshold --max-lora-chunk-size --enable-lora-overlap-loading "
             "--lora-strict-loading --fully-sharded-loras --specialize-active-lora", NO_KNOB),
    _refused("--max-lora-cls-labels --uno-lora-path --lora-use-virtual-experts --enable-mixed-moe-lora-format "
             "--enable-moe-shared-loras --enable-tower-connector-lora --experts-shared-outer-loras",
             NO_SUCH_ADAPTERS),
    _refused("--speculative-* --spec-* --num-speculative-tokens --speculative-model --enable-multi-layer-eagle",
             DRAFTS),
    _refused("--allowed-media-domains --media-*", NOTHING_FETCHED),
    _refused("--language-model-only --language-only", "--limit-mm-per-prompt '{\"image\": 0}' loads no tower"),
    _refused("--mm-* --enable-mm-* --interleave-mm-strings --skip-mm-profiling --video-pruning-* "
             "--trust-mm-* --trust-request-mm-kwargs --image-processor-backend --disable-fast-image-processor "
             "--enable-broadcast-mm-inputs-process --enable-prefix-mm-cache --asr-*", NO_MEDIA_KNOBS),
    _refused("--enable-prompt-embeds", "prompts are text or token ids: leave it out"),
    _refused("--enable-return-* --return-hidden-states-mode --return-aux-* --return-sampling-mask "
             "--sampling-mask-max-tokens --aux-output-config --enable-trace-replay",
             "hidden states, routes and masks are not sent: prompt_logprobs and logprobs are what a request can see"),
    _refused("--enable-watermark --watermark-config", "answers are not watermarked: leave it out"),
    _refused("--tool-server", "the server calls no tools itself: clients answer the calls"),
    _refused("--enable-strict-thinking --anthropic-disabled-thinking-effort --cohere-format --hf-chat-template-name "
             "--completion-template",
             "--chat-template FILE and a request's chat_template_kwargs say how a conversation is written"),
    _refused("--constrained-json-*",
             "--structured-outputs-config '{\"disable_any_whitespace\": true}', or whitespace_pattern in a request"),
    _refused("--preferred-sampling-params", "--override-generation-config JSON sets default sampling values"),
    # refused: HTTP and logs
    _refused("--admin-api-key", "--api-key guards all routes but those that --help names"),
    _refused("--allow-credentials", "browsers send no cookies here: leave it out; keys go in Authorization"),
    _refused("--ssl-ciphers --ssl-keyfile-password --enable-ssl-refresh --enable-http2 --h11-*",
             "--ssl-keyfile and --ssl-certfile are what there is; a proxy in front can do more"),
    _refused("--grpc --grpc-* --smg-*", "HTTP is what is spoken: leave it out"),
    _refused("--enable-force-include-usage --stream-response-default-include-usage --incremental-streaming-output "
             "--return-input-ids --return-output-ids --enable-per-request-metrics",
             "a request asks for it: stream_options with include_usage, return_token_ids"),
    _refused("--enable-streaming-session --enable-response-store --file-storage-path --enable-scale-out "
             "--enable-offline-docs --warmups", "octavo has no such route or page of its own: leave it out"),
    _refused("--fingerprint-value", "answers have no system_fingerprint: leave it out"),
    _refused("--log-config-file --logging-config --log-requests-* --enable-log-outputs --disable-access-log-* "
             "--uvicorn-access-log-* --aggregate-engine-logging --decode-log-interval --show-time-cost "
             "--enable-logging-iteration-details --enable-request-time-stats-logging --crash-dump-folder",
             "logs go to stderr without any text of requests: --uvicorn-log-level, --disable-uvicorn-access-log, "
             "--enable-log-requests, --disable-log-stats"),
    _refused("--otlp-* --collect-detailed-traces --kv-cache-metrics* --cudagraph-metrics --custom-histogram-buckets "
             "--show-hidden-metrics-for-version --enable-layerwise-nvtx-* --enable-mfu-metrics --profiler-config "
             "--enable-trace --trace-modules --export-metrics-* --tokenizer-metrics-* "
             "--extra-metric-labels --bucket-* --prompt-tokens-buckets --generation-tokens-buckets "
             "--load-publish-endpoint --enable-forward-pass-metrics --forward-pass-metrics-* --debug-tensor-* "
             "--msprobe-*", NOT_TRACED),
)  # fmt: skip


class PeerFlagError(ValueError):
    """A flag of another server's that octavo can't honor; the message names it, and says what works."""


def without_peer_flags(arguments: Sequence[str], own: Container[str]) -> tuple[list[str], list[str]]:
    """(a command line of octavo's own flags, a line for each flag that was taken and changes nothing).

    own: the flags that octavo has. Raises PeerFlagError.
    """
    kept: list[str] = []
    notes: list[str] = []
    index = 0
    while index < len(arguments):
        argument = arguments[index]
        index += 1
        if argument == "--":
            return [*kept, *arguments[index - 1 :]], notes
        name, equals, value = _split(argument)
        row = _row_of(name)
        if row is None or (name in own and not row.accepted):
            kept.append(argument)
            continue
        following = [value] if equals else _values(arguments[index:], row.takes)
        if name.startswith("--no-"):
            notes.append(_without(name, row))
            continue
        if row.accepted != ANY and not (following and following[0] in row.accepted.split()):
            if name in own:
                kept.append(argument)
                continue
            shown = [name, *following] if row.accepted else [name]
            raise PeerFlagError(f"{' '.join(shown)}: {row.text}")
        index += 0 if equals else len(following)
        notes.append(f"{' '.join([name, *following])} changes nothing: {row.text}")
    return kept, notes


def is_known(name: str) -> bool:
    """Whether the table has a row for this flag."""
    return _row_of(name) is not None


def _split(argument: str) -> tuple[str, bool, str]:
    """(name, whether its value is in the same word, that value): '--a=b', '-O3'."""
    if argument.startswith("-O") and not argument.startswith("-O="):
        return "-O", len(argument) > 2, argument[2:]
    name, equals, value = argument.partition("=")
    return (name, bool(equals), value) if name.startswith("-") else (argument, False, "")


def _row_of(name: str) -> PeerFlag | None:
    """The first row for this flag, or for the one that it switches off; exact names before patterns."""
    if not re.match(r"-[A-Za-z-]", name):
        return None
    for found in (name, name.replace("--no-", "--", 1)):
        exact = next((row for row in TABLE if found in row.names.split()), None)
        row = exact or next((row for row in TABLE if any(_fits(found, it) for it in row.names.split())), None)
        if row is not None:
            return row
    return None


def _fits(name: str, pattern: str) -> bool:
    """Whether a name begins as a pattern does; `fnmatch` would compile each pattern at each start, for 0.06 s."""
    return pattern.endswith("*") and name.startswith(pattern[:-1])


def _values(following: Sequence[str], takes: Takes) -> list[str]:
    values: list[str] = []
    for word in following:
        if takes == "nothing" or (takes == "one" and values) or re.match(r"-[A-Za-z-]", word):
            break
        values.append(word)
    return values


def _without(name: str, row: PeerFlag) -> str:
    """A switch is off: nothing to do where octavo has no such thing; refused where it always does it."""
    if row.accepted == ANY:
        raise PeerFlagError(f"{name}: {row.text}")
    return f"{name} changes nothing: octavo does not do it"
