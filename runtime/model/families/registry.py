"""All families, as found beside this file: a family that is added is a module that is added."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Mapping
from importlib import import_module
from types import MappingProxyType

from octavo.quant.model_layout import Layouts, ModelLayout
from octavo.runtime.model import families
from octavo.runtime.model.families.encoding import EncoderArchitecture
from octavo.runtime.model.families.family import Architecture, Family
from octavo.runtime.model.families.translating import EncDecArchitecture


def find_families() -> Iterator[Family]:
    """Of every module of the package that has one."""
    for module in pkgutil.iter_modules(families.__path__):
        family = getattr(import_module(f"{families.__name__}.{module.name}"), "FAMILY", None)
        if family is not None:
            yield family


FAMILIES = tuple(find_families())
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {model_type: row for family in FAMILIES for model_type, row in family.architectures.items()}
)
ENCODERS: Mapping[str, EncoderArchitecture] = MappingProxyType(
    {model_type: row for family in FAMILIES for model_type, row in family.encoders.items()}
)
VISION: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {outer: texts for family in FAMILIES for outer, texts in family.vision.items()}
)
SPEECH = frozenset(model_type for family in FAMILIES for model_type in family.speech)
ENCODER_DECODERS: Mapping[str, EncDecArchitecture] = MappingProxyType(
    {model_type: row for family in FAMILIES for model_type, row in family.encoder_decoders.items()}
)


TEXT_DEFAULTS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {outer: defaults for family in FAMILIES for outer, defaults in family.text_defaults.items()}
)
TIED_OUTSIDE = frozenset(outer for family in FAMILIES for outer in family.tied_outside)
TEXT_OF_IMAGES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {outer: keys for family in FAMILIES for outer, keys in family.of_images.items()}
)
OF_IMAGES = frozenset(
    {
        "image_token_id",
        "model_type",
        "video_token_id",
        "vision_config",
        "vision_end_token_id",
        "vision_start_token_id",
        "vision_token_id",
    }
)
"""Keys of a vision checkpoint's config.json that its text half doesn't have, where both stand in one dictionary."""


def _layout(row: Architecture) -> ModelLayout:
    """What an architecture's files hold; some rules put experts into some blocks and a dense MLP into others."""
    return ModelLayout(
        experts=None if row.experts == "none" else row.expert_names,
        blocks_alike=row.blocks_alike and row.experts in ("none", "all"),
    )


LAYOUTS: Layouts = MappingProxyType(
    {model_type: _layout(row) for model_type, row in ARCHITECTURES.items()}
    | {outer: _layout(ARCHITECTURES[texts[0]]) for outer, texts in VISION.items()}
    | dict.fromkeys(ENCODERS, ModelLayout(blocks_alike=True, is_encoder=True))
    | dict.fromkeys(SPEECH, ModelLayout(has_encoder=True))
    | dict.fromkeys(ENCODER_DECODERS, ModelLayout(has_encoder=True, reads_text=True))
)
