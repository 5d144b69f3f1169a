"""Parses the config of a GPTQ checkpoint into a scheme for each linear layer.

Source: ModelCloud/GPTQModel, `quantization/config.py`; AutoGPTQ, `quantization/config.py`; transformers' GPTQConfig,
which adds keys of its own. Writers add more with each version, so keys that don't change the tensors are ignored.

The tensors tell which layers are quantized: those with a `qweight`, whatever the config lists. The config's lists
decide only if there are no files (--load-format dummy).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from octavo.quant.formats.compressed_tensors_config import INT_DTYPES
from octavo.quant.formats.config_reading import check_types
from octavo.quant.formats.format import FormatError
from octavo.quant.formats.gptq import GPTQFormat, Version
from octavo.quant.formats.patterns import Regexes
from octavo.quant.scheme import QuantScheme, SchemeError, WeightDtype, WeightScheme, group

VERSIONS: dict[str, Version] = {"gptq": 1, "gptq_v2": 2, "gptq_p": 2}  # the last: planes of bits, of 3 bits too
READ_BITS = (5, 6, 7)  # read and not written
DTYPES: dict[int, WeightDtype] = INT_DTYPES | {7: "int8"}  # 7 bits have no type of their own
IN_BLOCK = re.compile(r"(^|\.)layers\.\d+\.(?!.*(\.gate|router|shared_expert_gate)$)")


class _Override(msgspec.Struct):
    bits: int | None = None
    group_size: int | None = None
    desc_act: bool | None = None
    sym: bool | None = None


class _Config(msgspec.Struct):
    """The types of the keys, for checking only."""

    bits: int
    group_size: int
    desc_act: bool | None = None
    sym: bool | None = None
    lm_head: bool | None = None
    dynamic: dict[str, _Override] | None = None
    checkpoint_format: str | None = None
    format: str | None = None
    pack_dtype: str | None = None
    is_marlin_format: bool | None = None
    modules_in_block_to_quantize: list[str | list[str]] | None = None
    meta: dict[str, object] | None = None
    rotation: str | dict[str, object] | None = None
    adapter: dict[str, object] | None = None


@dataclass(frozen=True)
class DynamicRule:
    """One entry of `dynamic`."""

    pattern: str
    regexes: Regexes
    override: Mapping[str, Any] | None


@dataclass(frozen=True)
class GPTQConfig:
    """A scheme for each layer.

    base        bits, group_size, desc_act and sym of a layer without an override
    planar      the numbers of bits whose fields lie in planes
    dynamic     GPTQModel's: which layers, and what differs for them, in their order; None: they are not quantized
    listed      the layers' names in their block, or parts of names, where the config lists them
    """

    base: Mapping[str, Any]
    version: Version
    whole_words: bool = False
    planar: tuple[int, ...] = READ_BITS
    dynamic: tuple[DynamicRule, ...] = ()
    listed: tuple[str, ...] = ()
    lm_head: bool = False
    name: str = "gptq"
    kv_cache: str | None = None

    def format_of(self, module: str, suffixes: Collection[str] | None = None) -> GPTQFormat | None:
        """The format of a linear layer, given its full name; None if it is not quantized."""
        override = next((rule.override for rule in self.dynamic if rule.regexes.match(module)), {})
        quantized = self._expects(module, override) if suffixes is None else "qweight" in suffixes
        if not quantized:
            return None
        settings = _merge(self.base, override)
        return make_format(settings, self.version, f"{module}: ", whole_words=self.whole_words, planar=self.planar)

    def _expects(self, module: str, override: Mapping[str, Any] | None) -> bool:
        if override is None:
            return False
        if module.endswith("lm_head"):
            return self.lm_head
        return bool(IN_BLOCK.search(module)) and (not self.listed or any(part in module for part in self.listed))


def _merge(base: Mapping[str, Any], override: Mapping[str, Any] | None) -> dict[str, Any]:
    return {**base, **{key: value for key, value in (override or {}).items() if key in base and value is not None}}


def make_format(
    settings: Mapping[str, Any],
    version: Version,
    where: str,
    *,
    whole_words: bool = False,
    planar: Collection[int] = (),
) -> GPTQFormat:
    """The format for these bits, group_size, desc_act and sym.

    planar: the numbers of bits whose fields lie in planes. Raises FormatError, whose message begins with `where`.
    """
    bits = settings["bits"]
    size = settings["group_size"]
    if bits not in DTYPES:
        raise FormatError(f"{where}gptq with {bits} bits is not supported; {sorted(DTYPES)} are")
    try:
        scheme = QuantScheme(WeightScheme(DTYPES[bits], group(size), settings["sym"]))
    except SchemeError as e:
        raise FormatError(f"{where}{e}") from e
    read_bits = bits if bits in READ_BITS or bits in planar else None
    desc_act = settings["desc_act"]
    return GPTQFormat(scheme, version, desc_act, whole_words=whole_words, read_bits=read_bits, planar=bits in planar)


def parse_gptq(raw: Mapping[str, Any]) -> GPTQConfig:
    """A `quantization_config` with quant_method gptq, or a quantize_config.json. Raises FormatError."""
    config = check_types(raw, _Config)
    _refuse(raw)
    base = {"bits": config.bits, "group_size": config.group_size, "desc_act": bool(config.desc_act)}
    base["sym"] = True if config.sym is None else config.sym  # AutoGPTQ's default, when it didn't write it yet
    version = VERSIONS[stored_format(raw)]
    makers = str((config.meta or {}).get("quantizer"))  # 'gptqmodel:7.6.0', alone or in a list
    parsed = GPTQConfig(
        base=base,
        version=version,
        whole_words="gptqmodel" in makers,
        planar=(3, *READ_BITS) if stored_format(raw) == "gptq_p" else READ_BITS,
        dynamic=parse_dynamic(raw),
        listed=_flat(config.modules_in_block_to_quantize or []),
        lm_head=bool(config.lm_head),
        name=stored_format(raw),
    )
    make_format(base, version, "")
    for rule in parsed.dynamic:
        make_format(_merge(base, rule.override), version, f"dynamic {rule.pattern!r}: ")
    return parsed


def stored_format(raw: Mapping[str, Any]) -> str:
    """The tensors' layout: AutoGPTQ calls it checkpoint_format, GPTQModel also format; absent means version 1."""
    return str(raw.get("checkpoint_format") or raw.get("format") or "gptq").lower()


def _refuse(raw: Mapping[str, Any]) -> None:
    """Refuse keys that change the tensors, or what they mean, in an unsupported way."""
    found = "marlin" if raw.get("is_marlin_format") else stored_format(raw)
    if found not in VERSIONS:
        raise FormatError(f"checkpoint_format {found!r} is not supported; {', '.join(VERSIONS)} are")
    if raw.get("format") and raw.get("checkpoint_format") and raw["format"] != raw["checkpoint_format"]:
        raise FormatError(f"format {raw['format']!r} and checkpoint_format {raw['checkpoint_format']!r} contradict")
    if (raw.get("pack_dtype") or "int32") != "int32":
        raise FormatError(f"pack_dtype {raw['pack_dtype']!r} is not supported; int32 is")
    for key in ("rotation", "adapter"):
        if raw.get(key):
            raise FormatError(f"{key} {raw[key]!r} is not supported: the weights alone don't give its answers")


def parse_dynamic(raw: Mapping[str, Any]) -> tuple[DynamicRule, ...]:
    """GPTQModel's `dynamic`: '-:regex' leaves layers as they are, '+:regex' or 'regex' overrides settings."""
    rules = []
    for pattern, override in (raw.get("dynamic") or {}).items():
        regex = pattern.removeprefix("-:").removeprefix("+:")
        rules.append(DynamicRule(regex, Regexes([regex], "dynamic"), None if pattern.startswith("-:") else override))
    return tuple(rules)


def _flat(names: list[str | list[str]]) -> tuple[str, ...]:
    return tuple(name for entry in names for name in ([entry] if isinstance(entry, str) else entry))
