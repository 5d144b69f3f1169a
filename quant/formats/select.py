"""Which format a checkpoint is in, by its config's `quant_method`: one table, a row per format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from octavo.quant.formats import compressed_tensors
from octavo.quant.formats.compressed_tensors_config import parse_config
from octavo.quant.formats.format import FormatError, QuantizationConfig

METHODS: dict[str, Callable[[Mapping[str, Any]], QuantizationConfig]] = {
    "compressed-tensors": parse_config,
}

# Tensors that belong to a linear layer, in any format.
SUFFIXES = tuple(dict.fromkeys(compressed_tensors.SUFFIXES))


def parse_quantization(raw: Mapping[str, Any]) -> QuantizationConfig:
    """A config.json's `quantization_config`. Raises FormatError for one that octavo doesn't read."""
    method = raw.get("quant_method")
    parse = METHODS.get(str(method).lower())
    if parse is None:
        raise FormatError(f"quant_method {method!r} is not supported; {', '.join(METHODS)} are")
    return parse(raw)
