"""The scales of a quantized KV cache that a checkpoint brings with it."""

from __future__ import annotations

from torch import Tensor

from octavo.quant.checkpoint import Checkpoint
from octavo.runtime.model.model import KVScales, unscaled
from octavo.runtime.model.sources import LoadError
from octavo.runtime.model.spec import DecoderSpec
from octavo.runtime.parallel.layout import RankLayout


def read_kv_scales(
    checkpoint: Checkpoint, spec: DecoderSpec, prefix: str, own: RankLayout | None
) -> tuple[KVScales | None, str | None]:
    """(scales of each layer with a cache, one per head; the cache's type that the checkpoint asks for), else None.

    own: the rank whose layers and heads are wanted; None: all. Raises LoadError where a layer's scales are missing.
    """
    heads = slice(None) if own is None else slice(*own.kv_heads)
    layers = slice(None) if own is None else slice(*own.layers)
    num_heads = [(f"{prefix}layers.{index}.self_attn", mixer.num_kv_heads) for index, mixer in spec.caches]
    found = [checkpoint.kv_scales(name) for name, _ in num_heads]
    if not any(found):
        return None, checkpoint.kv_cache_dtype
    scales: KVScales = []
    for (name, count), pair in zip(num_heads, found, strict=True):
        if count == 0:  # it has a state
            scales.append(unscaled())
            continue
        if pair is None:
            raise LoadError(f"{name} has no KV scales although other layers have")
        key, value = pair
        of_key = None if key is None else _by_head(name, key, count)[heads]
        scales.append((of_key, _by_head(name, value, count)[heads]))
    dtype = checkpoint.kv_cache_dtype
    if dtype is None and any(key is None for key, _ in scales):
        dtype = "fp8_e4m3"  # what values alone are quantized to: no config has a word for it
    return scales[layers], dtype


def _by_head(attention: str, scale: Tensor, heads: int) -> Tensor:
    if scale.numel() not in (1, heads) or not bool((scale.isfinite() & (scale > 0)).all()):
        raise LoadError(f"{attention}: KV scales {scale.tolist()}; one or {heads} positive numbers are needed")
    return scale.expand(heads).clone()
