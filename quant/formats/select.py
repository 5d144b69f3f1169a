"""Selects a checkpoint's format by its config's `quant_method`, in a table with one row per format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from octavo.quant.formats import awq, bitsandbytes, compressed_tensors, fp8, gguf, gptq, microscaling, torchao
from octavo.quant.formats.auto_round import parse_auto_round
from octavo.quant.formats.awq import parse_awq
from octavo.quant.formats.compressed_tensors_config import parse_config
from octavo.quant.formats.format import FormatError, QuantizationConfig
from octavo.quant.formats.fp8 import parse_fp8
from octavo.quant.formats.gguf import parse_gguf
from octavo.quant.formats.gptq_config import parse_gptq
from octavo.quant.formats.hqq import parse_hqq
from octavo.quant.formats.modelopt import parse_modelopt
from octavo.quant.formats.mxfp4 import parse_mxfp4
from octavo.quant.formats.quark import parse_quark

METHODS: dict[str, Callable[[Mapping[str, Any]], QuantizationConfig]] = {
    "compressed-tensors": parse_config,
    "gguf": parse_gguf,
    "gptq": parse_gptq,
    "awq": parse_awq,
    "auto-round": parse_auto_round,
    "intel/auto-round": parse_auto_round,  # before auto-round 0.5
    "fp8": parse_fp8,
    "modelopt": parse_modelopt,
    "bitsandbytes": bitsandbytes.parse_bitsandbytes,
    "hqq": parse_hqq,
    "quark": parse_quark,
    "torchao": torchao.parse_torchao,
    "modelopt_fp4": parse_modelopt,  # vLLM's names of what `quant_algo` says
    "modelopt_mxfp8": parse_modelopt,
    "mxfp4": parse_mxfp4,
}

# The suffixes of a linear layer's tensors, in any format.
SUFFIXES = tuple(
    dict.fromkeys(
        compressed_tensors.SUFFIXES
        + gptq.SUFFIXES
        + awq.SUFFIXES
        + fp8.SUFFIXES
        + microscaling.MODELOPT_SUFFIXES
        + gguf.SUFFIXES
        + bitsandbytes.SUFFIXES
        + torchao.SUFFIXES
    )
)


def parse_quantization(raw: Mapping[str, Any]) -> QuantizationConfig:
    """Parse a config.json's `quantization_config`. Raises FormatError for one that octavo doesn't support."""
    method = raw.get("quant_method")
    parse = METHODS.get(str(method).lower())
    if parse is None:
        named = ", ".join(name for name, parse in METHODS.items() if parse is not parse_gguf)
        raise FormatError(f"quant_method {method!r} is not supported; {named} are")
    return parse(raw)
