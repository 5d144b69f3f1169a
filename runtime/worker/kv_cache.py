"""The paged KV cache of a model: how many blocks there is memory for, their type and scales, and the tensors.

Layout and meaning of a LayerCache are stated in kernels/attention/cache.py; which block belongs to whom is decided
in block_pool.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from octavo.kernels.attention import token_rows
from octavo.kernels.attention.cache import LayerCache
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.attention.token_rows import CacheType, TokenRows
from octavo.kernels.linear_attention.states import Cache, StateCache, StateShape
from octavo.kernels.native.huge_memory import huge_tensor
from octavo.quant import scheme
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.model import KVScales, KVShape, Model, unscaled
from octavo.runtime.parallel.group import ALONE, Group
from octavo.runtime.scheduling.kv_groups import capacity, most_blocks
from octavo.runtime.scheduling.plan import MAX_PROMPT_LOGITS
from octavo.runtime.worker.device import free_memory, give_back_unused, peak_memory, total_memory
from octavo.runtime.worker.kv_layout import KVLayout, choose_layout, one_group
from octavo.runtime.worker.state_memory import StatePlan, plan_states

DTYPES: dict[str, CacheType] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "int8": torch.int8,
} | {str(rows): rows for rows in token_rows.TYPES}
LARGEST: dict[CacheType, float] = {
    DTYPES[name]: largest for name, largest in scheme.LARGEST.items()
}  # of types that need scales from elsewhere

CPU_BUDGET = 4 << 30  # vLLM's default for CPUs (VLLM_CPU_KVCACHE_SPACE), so that a comparison is one of equals
MOST_NAMES = 1 << 18  # blocks where all layers have states: they only name prefixes, and take some 150 bytes each
CPU_SHARE = 0.5  # of the memory that is free once the weights are there

# Measured scales: how many tokens are looked at, and what the largest value seen is multiplied by. fp8 is floating:
# a wide margin costs no precision. An int8 cache pays log2(margin) bits for what the measurement didn't see.
MEASURED_TOKENS = 256
MARGIN: dict[CacheType, float] = {torch.float8_e4m3fn: 2.0, torch.int8: 1.5}


LISTED_BYTES = 4 + 4 + 4  # of a logit whose row's log-probabilities are wanted: itself, a copy, its own
SAMPLED_BYTES = LISTED_BYTES + 4 + 4 + 8  # of one that is sampled from: where graphs leave it, a copy, `draw.scratch`


class CacheError(ValueError):
    """A cache that can't be had; the message has the figures."""


@dataclass(frozen=True)
class CachePlan:
    """What is to be allocated. num_bytes covers all layers, and states. wide_keys: of how many layers keys stay as
    computed. states: None: there is no model with states.

    A block is one group's: with G groups of layers, a sequence has G tables of blocks.
    """

    dtype: CacheType
    num_blocks: int
    block_size: int
    num_bytes: int
    layout: KVLayout
    wide_keys: int = 0
    states: StatePlan | None = None

    def capacity(self, longest: int) -> int:
        """How many tokens one sequence can have when it has the cache to itself, up to `longest`."""
        return capacity(self.num_blocks, self.block_size, self.layout.windows, longest)


def create(model: Model, config: EngineConfig, notes: list[str], group: Group = ALONE) -> tuple[list[Cache], CachePlan]:
    """The caches that a config asks for; what a person should know about them is added to notes.

    Ranks of a group have equally many blocks, and the plan has the bytes of all of them: they share a machine's memory.
    """
    give_back_unused(model.device)  # what rounding weights took, say
    group.of_all(0)  # once all ranks have their weights, what is left is free for caches
    free = free_memory(model.device)
    if model.device.type == "cuda" and config.num_blocks is None and config.kv_cache_memory_bytes is None:
        free -= step_bytes(model, config)
    plan = plan_cache(model, config, free, notes, group)
    scales = choose_scales(model, plan.dtype, notes)
    num_states = 0 if plan.states is None else plan.states.num_rows
    caches = allocate(model, plan.num_blocks, plan.block_size, plan.dtype, scales, plan.layout, num_states)
    return caches, plan


def plan_cache(
    model: Model, config: EngineConfig, free_bytes: int, notes: list[str], group: Group = ALONE
) -> CachePlan:
    """Choose type and number of blocks; `free_bytes` is what the device has left. Raises CacheError."""
    check_budget(config, free_bytes)
    dtype = choose_dtype(model, config.kv_cache_dtype, notes)
    layout = _layout_for(model, config, dtype, group)
    per_block = sum(group.of_all(bytes_per_block(model, config.block_size, dtype, layout)))
    budget = _budget_of(model, config, free_bytes)
    states = plan_states(model, config, budget, notes)
    num_blocks = config.num_blocks
    if num_blocks is not None:
        _check_num_blocks(num_blocks, per_block, free_bytes - states.num_bytes)
    else:
        num_blocks = min(group.of_all(_blocks_for(model, config, budget - states.num_bytes, per_block, layout)))
    wide = sum(
        key_dtype(model, layer, dtype) != dtype
        for layer, shape in enumerate(model.kv_shapes)
        if isinstance(shape, KVShape)
    )
    num_bytes = num_blocks * per_block + states.num_bytes
    return CachePlan(
        dtype, num_blocks, config.block_size, num_bytes, layout, wide, states if states.row_bytes else None
    )


def _layout_for(model: Model, config: EngineConfig, dtype: CacheType, group: Group) -> KVLayout:
    """Groups of layers share memory, so all layers must have equal blocks; otherwise all of them hold all tokens."""
    num_layers = len(model.kv_shapes)
    kinds = {(shape, key_dtype(model, layer, dtype)) for layer, shape in enumerate(model.kv_shapes)}
    if max(group.of_all(len(kinds))) > 1:  # as where some of them have states
        return one_group(num_layers)
    layout = choose_layout(model.kv_windows, config.max_model_len or model.max_position)
    if len(model.kv_windows) == num_layers:
        return layout
    return layout.of_stage(model.first_layer, model.first_layer + num_layers)


def check_budget(config: EngineConfig, free_bytes: int) -> None:
    """Raise CacheError where the device has less memory than the cache was given."""
    budget = config.kv_cache_memory_bytes
    if budget is not None and budget > free_bytes:
        raise CacheError(
            f"--kv-cache-memory-bytes {budget}: {budget / 1e9:,.1f} GB, and {free_bytes / 1e9:,.1f} GB of memory are "
            f"free; --kv-cache-memory-bytes {_most(free_bytes) >> 20}MiB works"
        )


def _check_num_blocks(num_blocks: int, per_block: int, free_bytes: int) -> None:
    if num_blocks * per_block > free_bytes:
        raise CacheError(
            f"--num-gpu-blocks-override {num_blocks}: blocks of {per_block / 1e6:,.2f} MB take "
            f"{num_blocks * per_block / 1e9:,.1f} GB, and {free_bytes / 1e9:,.1f} GB of memory are free; "
            f"--num-gpu-blocks-override {_most(free_bytes) // per_block} works"
        )


def _most(free_bytes: int) -> int:
    """The budget that an error proposes, which leaves some memory for the steps themselves."""
    return int(0.9 * free_bytes)


def choose_dtype(model: Model, name: str, notes: list[str]) -> CacheType:
    """`auto` is the type that the checkpoint was calibrated for; without one, the type that the model computes in.

    Raises CacheError for a type that the device's attention doesn't read.
    """
    if name != "auto":
        if isinstance(DTYPES[name], TokenRows):
            _check_rows(model, name)
        return DTYPES[name]
    if model.kv_dtype is None:
        return model.dtype
    notes.append(f"the checkpoint asks for a KV cache in {model.kv_dtype}; --kv-cache-dtype chooses another")
    return DTYPES[model.kv_dtype]


def _check_rows(model: Model, name: str) -> None:
    if model.device.type != "cpu":
        raise CacheError(f"--kv-cache-dtype {name}: only a CPU's attention reads such rows; fp8 and int8 work here")
    if any(isinstance(shape, KVShape) and shape.is_latent for shape in model.kv_shapes):
        raise CacheError(f"--kv-cache-dtype {name}: latent attention doesn't read such rows; fp8 and int8 work here")


def key_dtype(model: Model, layer: int, dtype: CacheType) -> CacheType:
    """The type of a layer's keys in a cache of `dtype`: another where the checkpoint has scales for values alone."""
    wide = dtype in LARGEST and model.kv_scales is not None and model.kv_scales[layer][0] is None
    return model.dtype if wide else dtype


def bytes_per_block(model: Model, block_size: int, dtype: CacheType, layout: KVLayout) -> int:
    """Bytes of one block in all layers of the largest group, keys and values."""
    of_layers = [
        0 if isinstance(shape, StateShape) else shape.num_bytes(key_dtype(model, layer, dtype), dtype) * block_size
        for layer, shape in enumerate(model.kv_shapes)
    ]
    return max(sum(of_layers[layer] for layer in layers) for layers in layout.layers)


def step_bytes(model: Model, config: EngineConfig) -> int:
    """The memory that steps need beside weights and cache on a GPU: the peaks of the largest prefill and decode step.

    Both are run. Prefills use torch's memory, decode steps that of their graphs. The sampler's copies of the logits of
    all sequences, and of the prompt logits of one step, are added.
    """
    length = min(config.max_num_batched_tokens, model.max_position)
    caches = allocate(model, 1, length, model.dtype)
    prefill = StepInputs.prefill([length], length).to(model.device)
    longest = config.max_model_len or model.max_position
    decode = StepInputs.empty([1] * config.max_num_seqs, longest, length).to(model.device)
    prefills = peak_memory(lambda: model.forward(prefill, caches), model.device)
    decodes = peak_memory(lambda: model.forward(decode, caches), model.device)
    of_logits = config.max_num_seqs * SAMPLED_BYTES + MAX_PROMPT_LOGITS * LISTED_BYTES
    return prefills * -(-config.max_num_batched_tokens // length) + decodes + of_logits * model.vocab_size


def _budget_of(model: Model, config: EngineConfig, free_bytes: int) -> int:
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    if model.device.type == "cpu":
        return min(CPU_BUDGET, int(free_bytes * CPU_SHARE) // len(config.parallel.local_engines))
    return free_bytes - int(total_memory(model.device) * (1 - config.gpu_memory_utilization))


def _blocks_for(model: Model, config: EngineConfig, budget: int, per_block: int, layout: KVLayout) -> int:
    longest = config.max_model_len or model.max_position
    chunk = min(longest, config.max_num_batched_tokens)
    usable = config.max_num_seqs * most_blocks(longest, config.block_size, layout.windows, chunk)
    least = per_block * len(layout.windows)
    if budget < least:
        raise CacheError(
            f"{budget / 1e6:.0f} MB for the KV cache don't hold one block of {config.block_size} tokens "
            f"({least / 1e6:.2f} MB); --kv-cache-memory-bytes gives it more"
        )
    return min(usable, budget // per_block if per_block else MOST_NAMES)


def allocate(
    model: Model,
    num_blocks: int,
    block_size: int,
    dtype: CacheType,
    scales: KVScales | None = None,
    layout: KVLayout | None = None,
    num_states: int = 1,
) -> list[Cache]:
    """Empty caches of all layers. Without scales they are 1, and keys without one are in the computing type.

    num_states: rows of the state caches, in layers that have states instead of keys and values.
    Without a layout each layer has memory of its own; with one, layer i of every group has the same.
    Zeroed, not just reserved: a kernel may multiply a masked slot by 0, and what memory happens to hold may be NaN.
    On a CPU the zeros come from the system, page by page at the first write: an unused cache costs nothing.
    """
    layout = layout or one_group(len(model.kv_shapes))
    tensors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    caches: list[Cache] = []
    for layer, of_layer in enumerate(model.kv_shapes):
        if isinstance(of_layer, StateShape):
            parts = (zeros((num_states, *part), torch.float32, model.device) for part in of_layer.parts)
            caches.append(StateCache(tuple(parts)))
            continue
        heads, head_dim, is_latent = of_layer
        group, place = layout.place_of[layer]
        shape = (num_blocks, heads, block_size)
        one = torch.ones(heads, device=model.device)
        key_scale, value_scale = scales[layer] if scales is not None else (one, one)
        if place not in tensors:
            key = rows(shape, model.dtype if key_scale is None else dtype, head_dim, model.device)
            tensors[place] = key, key if is_latent else rows(shape, dtype, head_dim, model.device)
        key_scale = one if key_scale is None else key_scale.to(model.device)
        value_scale = key_scale if is_latent else value_scale.to(model.device)
        caches.append(LayerCache(*tensors[place], key_scale, value_scale, group))
    return caches


def rows(shape: tuple[int, ...], dtype: CacheType, head_dim: int, device: torch.device) -> torch.Tensor:
    """Empty rows of heads: shape + [the row's length in the tensor's type]."""
    if isinstance(dtype, TokenRows):
        return zeros((*shape, dtype.row_bytes(head_dim)), torch.uint8, device)
    return zeros((*shape, head_dim), dtype, device)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """torch.zeros writes its zeros at once on a CPU: three seconds for 4 GiB; the system has them at hand."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return huge_tensor(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


def choose_scales(model: Model, dtype: CacheType, notes: list[str]) -> KVScales | None:
    """Scales for a cache of that type: the checkpoint's, else measured; None where stored numbers need none."""
    if dtype not in LARGEST:
        return None
    if model.kv_scales is None:
        return measure_scales(model, dtype, notes)
    if wide := sum(key is None for key, _ in model.kv_scales):
        notes.append(
            f"the checkpoint has KV scales for the values alone in {wide} of {len(model.kv_scales)} layers: keys stay "
            f"in {_name(model.dtype)} there"
        )
    ratio = LARGEST[DTYPES[model.kv_dtype or "fp8_e4m3"]] / LARGEST[dtype]
    if ratio == 1:
        return model.kv_scales
    notes.append(f"the checkpoint's KV scales are for {model.kv_dtype}; restated for {_name(dtype)}")
    return [(None if key is None else key * ratio, value * ratio) for key, value in model.kv_scales]


def measure_scales(model: Model, dtype: CacheType, notes: list[str]) -> KVScales:
    """Scales per head from a forward pass over fixed tokens into a cache of the computing type.

    The runtime knows no text, so the tokens are drawn (always the same ones), low ids more often than high ones as
    in a tokenizer's own order of frequency.
    """
    length = min(MEASURED_TOKENS, model.max_position)
    uniform = torch.rand(length, generator=torch.Generator().manual_seed(0))
    token_ids = (uniform**3 * model.vocab_size).long().clamp(max=model.vocab_size - 1)
    caches = allocate(model, 1, length, model.dtype)
    model.forward(StepInputs.prefill([length], length, token_ids=token_ids).to(model.device), caches)
    full_range = LARGEST[dtype] / MARGIN[dtype]

    def scale(stored: torch.Tensor) -> torch.Tensor:
        largest = stored.float().abs().amax(dim=(0, 2, 3))
        return (largest / full_range).clamp(min=torch.finfo(torch.float32).tiny)  # 0 / 0 where a head is all zero

    notes.append(
        f"KV cache in {_name(dtype)}: the checkpoint has no scales, so they were measured over {length} drawn tokens "
        f"with a margin of {MARGIN[dtype]}; check the quality, or take a checkpoint with k_scale and v_scale"
    )
    return [unscaled() if isinstance(cache, StateCache) else (scale(cache.key), scale(cache.value)) for cache in caches]


def _name(dtype: CacheType) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)
