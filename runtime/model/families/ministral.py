"""Ministral 3: Mistral's layer, with queries that grow with positions; and text parts of Mistral 3's checkpoints."""

from __future__ import annotations

from typing import Any

from octavo.kernels.attention.cache import QueryScale
from octavo.runtime.model.config_types import Index
from octavo.runtime.model.families.family import Architecture, Config, Family, LayerKind, one_rope

_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
_OF_NO_ROTATION = ("llama_4_scaling_beta", "max_position_embeddings")


def _given(config: Config) -> dict[str, Any]:
    return dict(config.get("rope_scaling") or config.get("rope_parameters") or _ROPE)


def _ropes(config: Config, settings: Config, given: dict[str, Any]) -> dict[LayerKind, tuple[dict[str, Any], float]]:  # noqa: ARG001
    """Without what its dictionary has beside the rotation."""
    rope = {key: value for key, value in _given(config).items() if key not in _OF_NO_ROTATION}
    return one_rope(config, settings, rope)


def _query_scale(config: Config, settings: Config) -> QueryScale | None:
    rope = _given(config)
    slope = rope.get("llama_4_scaling_beta")
    period = rope.get("original_max_position_embeddings") or settings["max_position_embeddings"]
    return None if slope is None else QueryScale(float(slope), period)


FAMILY = Family(
    architectures={
        "ministral3": Architecture(
            defaults={
                "num_key_value_heads": 8,
                "head_dim": 128,
                "max_position_embeddings": 262144,
                "rms_norm_eps": 1e-5,
                "sliding_window": None,
            },
            windows="all",
            reads={"sliding_window": Index},
            ropes=_ropes,
            query_scale=_query_scale,
        ),
    },
    vision={"mistral3": ("mistral", "ministral3")},
)
