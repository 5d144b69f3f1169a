"""The engine's configuration: frozen, resolved once, printed at start. Unknown keys are errors."""

from __future__ import annotations

from typing import Literal

import msgspec

Dtype = Literal["auto", "float32", "bfloat16", "float16", "fp8", "int8", "int4"]


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that the engine process needs to know; it crosses the process boundary as JSON.

    model                   a local directory; a Hub id has been resolved to its snapshot before this
    dtype                   what to compute in; fp8, int8 and int4 quantize a dense checkpoint at load and compute in
                            the checkpoint's own type
    model_impl              'octavo' is the decoder, 'hf' transformers' own code, 'auto' the decoder and, for a
                            model_type that it doesn't have, transformers' code
    lm_head_dtype           'int8' quantizes the output head's copy of its weight (per channel), also where it is tied
    kv_cache_dtype          'auto' is the computing type
    num_blocks              size of the KV cache in blocks; None: from kv_cache_memory_bytes, and if that is None
                            too, from the memory that is free (see runtime/worker/kv_cache.py)
    gpu_memory_utilization  share of a GPU's memory that weights and KV cache may take together
    max_model_len           None: what the model says, less if the cache can't hold that many tokens
    max_num_batched_tokens  tokens of one step; a longer prompt is prefilled in chunks
    enforce_eager           on a GPU, launch each kernel of a step by itself instead of replaying a CUDA graph
    num_threads             CPU threads of the engine; None: all cores
    """

    model: str
    dtype: Dtype = "auto"
    lm_head_dtype: Literal["auto", "int8"] = "auto"
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "float16", "fp8_e4m3", "int8"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    model_impl: Literal["auto", "octavo", "hf"] = "auto"
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    trust_remote_code: bool = False
    max_model_len: int | None = None
    block_size: int = 16
    num_blocks: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    num_threads: int | None = None
    seed: int = 0
