"""The report of a quantization or an evaluation: what was done, what it saved, what it cost. Frozen, and JSON.

The JSON is stable: `schema_version` counts up when a field changes its meaning or goes; new fields may come at any
time, and a reader ignores what it doesn't know. docs/evaluation.md describes every field.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec
import torch

from octavo.calibration.kv import KVRow
from octavo.calibration.report.verdict import Verdict
from octavo.calibration.report.weight_error import KindRow, LayerRow
from octavo.calibration.verify import Quality
from octavo.version import VERSION

SCHEMA_VERSION = 1

Option = str | int | float | bool | None


def _versions() -> dict[str, str]:
    return {"octavo": VERSION, "torch": str(torch.__version__), "python": platform.python_version()}


class ReportError(ValueError):
    """A file that is no report, or one of a later octavo."""


@dataclass(frozen=True)
class CalibrationText:
    """The text that an algorithm looked at. generated: by the model itself, since no data was given."""

    source: str
    samples: int
    tokens: int
    seed: int
    generated: bool
    fingerprint: str | None = None


@dataclass(frozen=True)
class Sizes:
    """Bytes of all tensors. bits_per_weight: of the quantized layers, scales and zero points counted."""

    before: int
    after: int
    saved: int
    ratio: float
    bits_per_weight: float | None


@dataclass(frozen=True)
class EmbeddingQuality:
    """Cosines of the quantized model's vectors to the original's: their mean, and the least. num_texts: of how many."""

    mean: float
    least: float
    num_texts: int

    def __str__(self) -> str:
        return f"cosine to the original over {self.num_texts} texts: {self.mean:.5f}, at the least {self.least:.5f}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was measured, as plain values; no path of this machine. `dataclasses.replace` adds a quality later.

    task          'quantize', or 'eval' (of a checkpoint that was there already)
    model         its name; base_model: its Hub id, where that is known
    source        what the original's weights were decoded from, where it is quantized itself: 'gptq (int4/g32)'
    scheme        as it was asked for; the layers' own are in `layers` and `kinds`
    options       of the algorithm: how scales were searched for and the like
    kv_cache      the KV cache's scheme, where it is quantized; kv_layers: what was seen of its keys and values
    kinds         `by_kind` of the layers; layers: `in_order`
    ignore        linear layers that were left as they are
    seconds       what each phase took
    embeddings    of an encoder, in place of quality: how near its vectors are to the original's
    rtn_kl        the mean KL that algorithm rtn would have had, where another was used and this was measured
    """

    task: Literal["quantize", "eval"] = "quantize"
    model: str
    base_model: str | None = None
    architecture: str | None = None
    scheme: str
    format: str
    algorithm: str
    options: dict[str, Option] = field(default_factory=dict)
    kv_cache: str | None = None
    calibration: CalibrationText | None = None
    sizes: Sizes
    quality: Quality | None = None
    embeddings: EmbeddingQuality | None = None
    verdict: Verdict | None = None
    kinds: tuple[KindRow, ...]
    layers: tuple[LayerRow, ...]
    ignore: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=_versions)
    seconds: dict[str, float] = field(default_factory=dict)
    kv_layers: tuple[KVRow, ...] = ()
    rtn_kl: float | None = None
    source: str | None = None
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """Indented, with a line's end at the end."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode() + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        """Raises ReportError."""
        try:
            version = msgspec.json.decode(text, type=_Version).schema_version
            if version != SCHEMA_VERSION:
                raise ReportError(f"the report is of schema {version}; this octavo {VERSION} reads {SCHEMA_VERSION}")
            return msgspec.json.decode(text, type=cls)
        except msgspec.MsgspecError as e:
            raise ReportError(f"this is no report that octavo wrote: {e}") from e


class _Version(msgspec.Struct):
    schema_version: int


def sizes_of(before: int, after: int, layers: Sequence[LayerRow]) -> Sizes:
    """Sizes of a checkpoint before and after, with the bits per weight of the quantized layers."""
    weights = sum(layer.out_features * layer.in_features for layer in layers)
    bits = 8 * sum(layer.bytes_after for layer in layers) / weights if weights else None
    return Sizes(before, after, before - after, before / after, bits)


def source_note(source: str) -> str:
    """A sentence on an original that is quantized itself."""
    return (
        f"The original is quantized itself, {source}: its weights were dequantized, and sizes, errors and quality are "
        "against those numbers, not against the model that they were once made from."
    )


def rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds as a report has them."""
    return {phase: round(value, 2) for phase, value in seconds.items()}


def read_report(path: Path) -> Report:
    """A quantization_report.json. Raises ReportError and OSError."""
    return Report.from_json(path.read_bytes())
