"""`quant_method: mxfp4`, gpt-oss's: experts of MXFP4, whose tensors `split_experts` shows one expert at a time."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from octavo.quant.formats.format import FormatError
from octavo.quant.formats.microscaling import MicroscalingFormat
from octavo.quant.scheme import MXFP4, QuantScheme

EXPERT = re.compile(r"\.experts\.\d+\.")
KEYS = {"quant_method", "modules_to_not_convert", "dequantize"}


@dataclass(frozen=True)
class Mxfp4Config:
    """A checkpoint's quantization config: it says nothing but that experts are rounded."""

    name: ClassVar[str] = "mxfp4"
    kv_cache: ClassVar[str | None] = None

    def format_of(self, module: str, suffixes: Collection[str] | None = None) -> MicroscalingFormat | None:
        is_rounded = EXPERT.search(module) if suffixes is None else "weight_packed" in suffixes
        return MicroscalingFormat(QuantScheme(MXFP4)) if is_rounded else None


def parse_mxfp4(raw: Mapping[str, Any]) -> Mxfp4Config:
    """Raises FormatError for a key that isn't known."""
    if unknown := sorted(raw.keys() - KEYS):
        raise FormatError(f"quant_method mxfp4 has no {', '.join(unknown)}")
    return Mxfp4Config()
