"""What transformers' models call instead of their own attention: over the paged cache when serving, watched at load.

transformers lets the attention of its models be replaced by name (AttentionInterface). Two names are registered here.
SERVE writes a layer's keys and values into that layer's cache and reads the whole sequence back from it. PROBE
computes no attention: it records how each layer calls it, for runtime/model/hf/checks.py to judge. The step travels as
a keyword argument of the model's forward down to the call, as every value does here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.linear_attention.states import Cache
from octavo.runtime.model.operators import Ops
from octavo.runtime.model.sources import LoadError

SERVE = "octavo_paged"
PROBE = "octavo_probe"
STEP = "octavo_step"  # the keyword that the step travels as

# Keywords of an attention call that `shape_of` reads, or that leave attention's result alone.
READ = frozenset({"scaling", "sliding_window", "softcap", STEP})
HARMLESS = frozenset({"dropout", "is_causal", "position_ids", "cache_position", "use_cache", "logits_to_keep"})


class HFModelError(LoadError):
    """A model of transformers that can't be served through its own code; the message says what is in the way."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"--model-impl hf: {reason}")


def describe(error: Exception) -> str:
    """Type and first line of an error that transformers raised."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@dataclass(frozen=True)
class Step:
    """One forward pass, as attention sees it. inputs: of each group of layers; shapes and caches: of each layer."""

    ops: Ops
    inputs: list[StepInputs]
    shapes: list[AttentionShape]
    caches: list[Cache]


@dataclass(frozen=True)
class MaskRule:
    """A mask that transformers was asked for, as the rule that it would have been made from.

    sees(batch, head, query, key) -> bool, on integer tensors that broadcast: whether a query sees a key.
    """

    sees: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Call:
    """One layer's call of attention."""

    module: Any
    shape: AttentionShape
    mask: MaskRule
    keywords: dict[str, Any]


@dataclass
class Probe:
    """The calls of one forward pass, by layer."""

    calls: dict[int, Call] = field(default_factory=dict)


def register() -> None:
    """Make both names known to transformers. May be called again."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(SERVE, _serve)
    AttentionInterface.register(PROBE, _probe)
    # only the probe has masks: for a name without, transformers makes none, which is what the cache wants
    AttentionMaskInterface.register(PROBE, _mask_rule)


def call(model: Any, token_ids: Tensor, positions: Tensor, step: Step | Probe, **keywords: Any) -> Tensor:
    """One forward pass over tokens [T], all in one row: logits [T, vocab_size]."""
    ids = token_ids.unsqueeze(0)
    position_ids = positions.unsqueeze(0)
    out = model(input_ids=ids, position_ids=position_ids, use_cache=False, **{STEP: step}, **keywords)
    logits: Tensor = out.logits[0]
    return logits


def attend(query: Tensor, key: Tensor, value: Tensor, step: Step, layer: int) -> Tensor:
    """Paged attention of one layer: query [1, Hq, T, D], key and value [1, Hkv, T, D] -> [1, T, Hq, D]."""
    _, num_heads, num_tokens, head_dim = query.shape
    cache = step.caches[layer]
    assert isinstance(cache, LayerCache)  # what is proven has attention in each layer
    inputs = step.inputs[cache.group]
    shape = step.shapes[layer]
    qkv = torch.cat([x[0].transpose(0, 1).reshape(num_tokens, -1) for x in (query, key, value)], dim=-1)
    attended = step.ops.rope_and_attention(qkv, inputs, cache, shape, None, None, None, 0.0)
    assert isinstance(attended, Tensor)  # no codes were asked for
    return attended.view(1, num_tokens, num_heads, head_dim)


def _serve(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **keywords: Any
) -> tuple[Tensor, None]:
    """The call as transformers makes it; what the checks found is served, so mask and keywords aren't looked at."""
    del attention_mask
    return attend(query, key, value, keywords[STEP], module.layer_idx), None


def _probe(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **keywords: Any
) -> tuple[Tensor, None]:
    """Record the call. The answer, q + k + v, mixes no tokens: see `hf_checks.check_tokens_stand_alone`."""
    name = type(module).__name__
    layer = getattr(module, "layer_idx", None)
    if STEP not in keywords:
        raise HFModelError(f"{name} doesn't pass its keyword arguments on to attention")
    probe: Probe = keywords[STEP]
    if not isinstance(layer, int):
        raise HFModelError(f"{name} has no layer_idx, so its cache can't be told")
    if layer in probe.calls:
        raise HFModelError(f"layer {layer} calls attention twice ({name}): its cache holds one set of keys and values")
    if key.shape != value.shape or query.shape[-1] != key.shape[-1] or query.shape[2] != key.shape[2]:
        raise HFModelError(
            f"{name} has values of another size than its keys, or keys of other tokens than its queries "
            f"(queries {list(query.shape)}, keys {list(key.shape)}, values {list(value.shape)})"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise HFModelError(f"{name} has queries, keys and values in {query.dtype}, {key.dtype} and {value.dtype}")
    if not isinstance(attention_mask, MaskRule):
        raise HFModelError(f"{name} makes its own mask, or none, instead of asking transformers for one")
    probe.calls[layer] = Call(module, _shape_of(name, query, key, keywords), attention_mask, keywords)
    repeat = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(repeat, dim=1)
    value = value.repeat_interleave(repeat, dim=1)
    return (query + key + value).transpose(1, 2), None


def _shape_of(name: str, query: Tensor, key: Tensor, keywords: dict[str, Any]) -> AttentionShape:
    for keyword, argument in keywords.items():
        if keyword not in READ | HARMLESS and argument is not None and argument is not False:
            raise HFModelError(f"{name} gives attention {keyword!r}, which the paged cache doesn't have")
    head_dim = query.shape[-1]
    scale, window, soft_cap = (keywords.get(keyword) for keyword in ("scaling", "sliding_window", "softcap"))
    for keyword, argument in (("scaling", scale), ("sliding_window", window), ("softcap", soft_cap)):
        if not isinstance(argument, int | float | None):
            raise HFModelError(f"{name} gives attention {keyword} = {argument!r}, which isn't a number")
    return AttentionShape(
        num_heads=query.shape[1],
        num_kv_heads=key.shape[1],
        head_dim=head_dim,
        scale=head_dim**-0.5 if scale is None else float(scale),
        window=window,
        soft_cap=soft_cap,
    )


def _mask_rule(*, mask_function: Callable[..., Tensor], **_: Any) -> MaskRule:
    """A mask as transformers asks for one (AttentionMaskInterface), except that it isn't a tensor."""
    return MaskRule(mask_function)
