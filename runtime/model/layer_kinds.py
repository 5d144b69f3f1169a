"""What a config says of each layer by itself: windows, rotations, heads, whose cache it reads, and its inner columns.

`DecoderSpec.from_hf` makes the layers' specs of these.
"""

from __future__ import annotations

from typing import Any

from octavo.runtime.model.config_types import ModelConfigError
from octavo.runtime.model.families.family import (
    Architecture,
    Config,
    KVHeads,
    LayerKind,
    Ropes,
    UnsupportedModelError,
    has_window,
)
from octavo.runtime.model.rope import RopeSpec


def sliding_layers(settings: Config, row: Architecture, rotates: list[bool]) -> list[bool]:
    """Which layers have a window."""
    count = len(rotates)
    if row.windows == "none":
        return [False] * count
    if row.windows == "all":
        return [has_window(settings)] * count
    types = settings.get("layer_types")
    if types is None:
        return row.sliding_layers(settings, rotates)
    if len(types) != count:
        raise UnsupportedModelError(f"layer_types has {len(types)} entries for {count} layers")
    own = "chunked_attention" if row.windows == "chunks" else "sliding_attention"
    if unknown := sorted(set(types) - {own, "full_attention"}):
        raise UnsupportedModelError(f"layer type {unknown[0]!r} is unknown")
    if own == "sliding_attention" and own in types and not has_window(settings):
        raise UnsupportedModelError(
            "layer_types has sliding_attention, but use_sliding_window or sliding_window is off"
        )
    return [kind == own for kind in types]


def window_of(settings: Config, name: str, row: Architecture, sliding: list[bool]) -> int | None:
    """Of the layers that have one."""
    key = "attention_chunk_size" if row.windows == "chunks" else "sliding_window"
    window: int | None = settings.get(key)
    if any(sliding) and (not isinstance(window, int) or window < 1):
        raise UnsupportedModelError(f"{name}: layers have a sliding window, but {key} is {window!r}")
    return window


def heads_of(settings: Config, name: str, row: Architecture, sliding: list[bool]) -> list[KVHeads]:
    """Of each layer, heads of keys and values, and the size of these and of a query's."""
    heads = settings["num_attention_heads"]
    kv_heads = settings["num_key_value_heads"] or heads
    if row.latent:
        if kv_heads != heads:
            raise UnsupportedModelError(
                f"{name}: num_key_value_heads {kv_heads}: latents make keys and values of all {heads} heads"
            )
        if settings["q_lora_rank"] is None and settings["attention_bias"]:
            raise UnsupportedModelError(f"{name}: attention_bias without q_lora_rank")
    of_layers = row.heads(settings, sliding, (kv_heads, settings["head_dim"] or settings["hidden_size"] // heads))
    for kv_heads, _ in of_layers:
        if heads % kv_heads:
            raise UnsupportedModelError(
                f"num_attention_heads {heads} isn't a multiple of num_key_value_heads {kv_heads}"
            )
    return of_layers


def sources_of(settings: Config, row: Architecture, sliding: list[bool]) -> list[int | None]:
    """Of each layer, the one whose keys and values it reads; None: its own.

    The last num_kv_shared_layers read those of the last layer before them that has a window, or has none, as they do.
    """
    shared = (settings.get("num_kv_shared_layers") or 0) if "num_kv_shared_layers" in row.reads else 0
    first = len(sliding) - shared
    own = sliding[: max(first, 0)]
    if shared and not set(own) >= set(sliding):
        raise ModelConfigError(
            f"config.json: num_kv_shared_layers {shared} of {len(sliding)} layers leaves no layer of each kind whose "
            "keys and values the others read"
        )
    last = {slides: index for index, slides in enumerate(own)}
    return [None] * first + [last[slides] for slides in sliding[first:]] if shared else [None] * first


def inner_sizes(settings: Config, row: Architecture, sources: list[int | None]) -> list[int]:
    """Of each layer, the columns between gate, up and down of its dense MLP."""
    inner = row.dense_size(settings)
    if isinstance(inner, list):
        if "intermediate_size" not in row.reads or len(inner) != len(sources):
            raise ModelConfigError(
                f"config.json: intermediate_size {inner} isn't one number, nor one for each of {len(sources)} layers "
                "of an architecture that has several"
            )
        return inner
    widened = bool(settings.get("use_double_wide_mlp")) and "use_double_wide_mlp" in row.reads
    return [2 * inner if widened and source is not None else inner for source in sources]


def sparsities_of(settings: Config, row: Architecture) -> list[float]:
    """Of each layer, the share of gates that its MLP's activation leaves out; 0: none."""
    count: int = settings["num_hidden_layers"]
    if "activation_sparsity_pattern" not in row.reads:
        return [0.0] * count
    given = settings["activation_sparsity_pattern"]
    if given is None:
        sparse = 10 if count > 10 else 0
        return [0.95] * sparse + [0.0] * (count - sparse)
    if len(given) != count or not all(0 <= share < 1 for share in given):
        raise ModelConfigError(
            f"config.json: activation_sparsity_pattern {given} isn't a share from 0 to below 1 for each of {count} "
            "layers"
        )
    return [float(share) for share in given]


class LayerRopes:
    """The rope of each kind of layer. Transformers 5 has rope_parameters; 4 has rope_scaling."""

    def __init__(self, settings: Config, config: Config, name: str, row: Architecture) -> None:
        given = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
        self._max_position = settings["max_position_embeddings"]
        self._known: dict[tuple[LayerKind, int], RopeSpec] = {}
        self._kinds: Ropes = {}
        for kind, (own, theta) in row.ropes(config, settings, given).items():
            rope = dict(own)
            rope_type = str(rope.get("rope_type", rope.get("type")))
            if rope_type in row.rope_types:
                rope["rope_type"] = row.rope_types[rope_type]
            _spread(rope, settings, name, row)
            self._kinds[kind] = rope, theta

    def of(self, kind: LayerKind, head_dim: int) -> RopeSpec:
        """Raises RopeError."""
        if (kind, head_dim) not in self._known:
            rope, theta = self._kinds[kind]
            made = RopeSpec.parse(rope, theta=theta, head_dim=head_dim, max_position=self._max_position)
            self._known[kind, head_dim] = made
        return self._known[kind, head_dim]


def _spread(rope: dict[str, Any], settings: Config, name: str, row: Architecture) -> None:
    """Put into the rope's dictionary the keys that some configs have beside it."""
    rope_type = rope.get("rope_type", rope.get("type"))
    if rope_type in ("llama3", "yarn", "longrope") and (original := settings.get("original_max_position_embeddings")):
        rope["original_max_position_embeddings"] = original
    if factor := settings.get("partial_rotary_factor"):
        rope.setdefault("partial_rotary_factor", factor)
    is_read = "partial_rotary_factor" in row.reads or rope_type == "proportional"
    if not is_read and rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UnsupportedModelError(f"{name}: partial_rotary_factor = {rope['partial_rotary_factor']}")
