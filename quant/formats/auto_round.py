"""AutoRound's own dialect (quant_method auto-round): GPTQ's or AWQ's tensors, each layer's settings by its name.

Fields of 5 to 7 bits lie in the dense stream, where GPTQModel's lie in planes. Source: intel/auto-round,
`inference/backend.py` (which packing_format stores which zero points), `inference/convert_model.py` and
`utils/bit_packing.py`; vLLM's `inc.py`. Exports named auto_gptq and auto_awq have quant_method gptq and awq and
don't come here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from octavo.quant.formats.awq import AWQFormat, make_awq
from octavo.quant.formats.config_reading import check_types
from octavo.quant.formats.format import FormatError
from octavo.quant.formats.gptq import GPTQFormat
from octavo.quant.formats.gptq_config import IN_BLOCK, make_format
from octavo.quant.formats.patterns import Regexes

# packing_format: which tensors, and how GPTQ's zero points are stored (minus 1 is version 1).
PACKINGS: dict[str, int | str] = {
    "auto_round:auto_gptq": 1,
    "auto_round": 2,
    "auto_round:gptqmodel": 2,
    "auto_round:auto_awq": "awq",
}
REGEX_CHARACTERS = re.compile(r"[*+?^$()\[\]{}|\\]")


class _Layer(msgspec.Struct):
    bits: int | None = None
    group_size: int | None = None
    sym: bool | None = None
    data_type: str | None = None
    act_bits: int | None = None


class _Config(msgspec.Struct):
    """The types of the keys, for checking only."""

    bits: int
    group_size: int
    sym: bool | None = None
    data_type: str | None = None
    act_bits: int | None = None
    packing_format: str | None = None
    extra_config: dict[str, _Layer] | None = None


@dataclass(frozen=True)
class AutoRoundConfig:
    """A scheme for each layer: extra_config's entry by name, else by regex, on top of the base."""

    base: Mapping[str, Any]
    packing: int | str
    extra: Mapping[str, Mapping[str, Any]]
    extra_regexes: tuple[tuple[Regexes, Mapping[str, Any]], ...] = ()
    name: str = "auto-round"
    kv_cache: str | None = None

    def format_of(self, module: str, suffixes: Collection[str] | None = None) -> GPTQFormat | AWQFormat | None:
        """The format of a linear layer, given its full name; None if it is not quantized."""
        settings = {**self.base, **{k: v for k, v in self._extra(module).items() if v is not None}}
        in_block = bool(IN_BLOCK.search(module)) or module in self.extra
        if not (in_block and settings["bits"] < 16 if suffixes is None else "qweight" in suffixes):
            return None
        return self._make(settings, f"{module}: ")

    def _extra(self, module: str) -> Mapping[str, Any]:
        if module in self.extra:
            return self.extra[module]
        return next((settings for regexes, settings in self.extra_regexes if regexes.search(module)), {})

    def _make(self, settings: Mapping[str, Any], where: str) -> GPTQFormat | AWQFormat:
        if settings["data_type"] != "int":
            raise FormatError(f"{where}data_type {settings['data_type']!r} is not supported; 'int' is")
        if settings["act_bits"] < 16:
            raise FormatError(f"{where}act_bits {settings['act_bits']}: quantized activations are not supported here")
        if self.packing == "awq":
            return make_awq(settings["bits"], settings["group_size"], not settings["sym"], "gemm", where)
        return make_format(settings, 1 if self.packing == 1 else 2, where)


def parse_auto_round(raw: Mapping[str, Any]) -> AutoRoundConfig:
    """A `quantization_config` with quant_method auto-round. Raises FormatError."""
    config = check_types(raw, _Config)
    packing = config.packing_format or "auto_round:auto_gptq"
    if packing not in PACKINGS:
        raise FormatError(f"packing_format {packing!r} is not supported; {', '.join(PACKINGS)} are")
    extra = raw.get("extra_config") or {}
    regexes = tuple(
        (Regexes([name], "extra_config"), settings) for name, settings in extra.items() if REGEX_CHARACTERS.search(name)
    )
    base = {
        "bits": config.bits,
        "group_size": config.group_size,
        "sym": True if config.sym is None else config.sym,
        "data_type": config.data_type or "int",
        "act_bits": config.act_bits or 16,
        "desc_act": False,
    }
    parsed = AutoRoundConfig(base, PACKINGS[packing], extra, regexes)
    parsed._make(base, "")
    return parsed
