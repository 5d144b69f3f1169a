"""Static 8-bit scales of a KV cache, from the keys (after rope) and values that real text makes, and what they cost.

A scale covers everything that was seen: amax / 448 for e4m3, amax / 127 for int8. Longer text may go beyond it and is
clipped then, so what the model card says of it comes from here too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from octavo.calibration.team import ALONE, Team, largest, rows_of_all
from octavo.kernels.fp8.reference import round_to_e4m3
from octavo.quant.scheme import LARGEST, KVScheme

SAMPLES = 2048  # tokens that are kept for measuring the rounding: noise is known to 2% after them
LEAST_SNR = 20.0  # dB; e4m3 gives 31.5 and int8 20 to 40 where no channel is far larger than the rest
ABOVE_ONE = 1.0 + 2.0**-7  # the next bfloat16


class KVError(ValueError):
    """Keys or values that no scale can be made of; the message says which and why."""


@dataclass(frozen=True)
class KVSide:
    """Keys or values of one layer.

    scale     [1], or [num_kv_heads, 1, 1], float32; None where they stay bf16
    amax      the largest magnitude of each KV head
    beyond    the share of numbers that e4m3 without a scale (or int8 with one of 1) would clip
    clipped   the share of the sampled numbers that this scale clips; 0 unless the cache has a margin below amax
    snr_db    signal to noise of rounding with this scale, the worst head's. Of keys, what all tokens have in common is
              no signal: softmax doesn't see it
    """

    scale: Tensor | None
    amax: list[float]
    beyond: float
    clipped: float
    snr_db: float


@dataclass(frozen=True)
class KVReport:
    """One layer's keys and values under a scheme."""

    scheme: KVScheme
    key: KVSide
    value: KVSide

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Without the scales, which the checkpoint has; JSON has no infinity."""
        sides = {"key": self.key, "value": self.value}
        return {
            name: {
                "amax": side.amax,
                "beyond": side.beyond,
                "clipped": side.clipped,
                "snr_db": side.snr_db if math.isfinite(side.snr_db) else None,
            }
            for name, side in sides.items()
        }

    @classmethod
    def from_json(cls, scheme: KVScheme, sides: Mapping[str, Mapping[str, Any]]) -> KVReport:
        """Read the result of `to_json`."""
        key, value = (
            KVSide(
                None, **{**sides[name], "snr_db": math.inf if sides[name]["snr_db"] is None else sides[name]["snr_db"]}
            )
            for name in ("key", "value")
        )
        return cls(scheme, key, value)

    def scales(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint stores: k_scale and v_scale, but for a side that stays bf16."""
        named = {"k_scale": self.key.scale, "v_scale": self.value.scale}
        return {name: scale for name, scale in named.items() if scale is not None}


@dataclass(frozen=True)
class KVRow:
    """Keys or values of one block, for the report.

    dtype     what they are stored in; limit: the largest number that it has
    amax      the largest magnitude in the calibration text
    beyond    the share of numbers that would be clipped without a scale; clipped: with the scale that was found
    """

    block: int
    side: Literal["keys", "values"]
    dtype: str
    limit: float | None
    amax: float
    beyond: float
    clipped: float
    snr_db: float | None


def kv_rows(layers: Sequence[KVReport]) -> list[KVRow]:
    """Two rows for each layer, in the order of the blocks."""
    rows = []
    for block, layer in enumerate(layers):
        sides: list[tuple[Literal["keys", "values"], str, KVSide]] = [
            ("keys", layer.scheme.key, layer.key),
            ("values", layer.scheme.value, layer.value),
        ]
        for name, dtype, side in sides:
            snr = None if dtype == "bf16" else side.snr_db
            rows.append(KVRow(block, name, dtype, LARGEST.get(dtype), max(side.amax), side.beyond, side.clipped, snr))
    return rows


def kv_advice(layers: Sequence[KVReport]) -> str | None:
    """Advise another KV cache, with the reason; None when rounding is harmless in every layer."""
    bad = {}
    for name in ("key", "value"):
        found = {i: getattr(x, name).snr_db for i, x in enumerate(layers) if getattr(x.scheme, name) != "bf16"}
        bad[name] = {i: snr for i, snr in found.items() if snr < LEAST_SNR}
    if not any(bad.values()):
        return None
    kind = next(k for x in layers for k in (x.scheme.key, x.scheme.value) if k != "bf16")
    short = {"fp8_e4m3": "fp8"}.get(kind, kind)
    sides = [f"{name[0]}={'bf16' if bad[name] else short}" for name in ("key", "value")]
    words = []
    for name, layers_of in bad.items():
        if layers_of:
            worst = min(layers_of, key=lambda i, of=layers_of: of[i])  # type: ignore[misc]
            words.append(
                f"{name}s of {len(layers_of)} layers keep less than {LEAST_SNR:.0f} dB of signal in {kind} (layer "
                f"{worst}: {layers_of[worst]:.0f} dB)"
            )
    wanted = "bf16" if all(bad.values()) else ",".join(sides)
    return f"{' and '.join(words)}: --kv-cache-scheme {wanted}"


class KVCollector:
    """Sees one layer's keys and values, batch by batch."""

    def __init__(self, scheme: KVScheme) -> None:
        self.scheme = scheme
        self._key = _Seen(scheme.key)
        self._value = _Seen(scheme.value)

    def add(self, k: Tensor, v: Tensor) -> None:
        """k (after rope) and v, [T, num_kv_heads, head_dim]."""
        self._key.add(k)
        self._value.add(v)

    def result(self, team: Team = ALONE) -> KVReport:
        """Of what all members have seen. Raises KVError when that is nothing, only zeros, or isn't finite."""
        per_head = self.scheme.per_head
        sides = [side.of_all(team) for side in (self._key, self._value)]
        return KVReport(
            self.scheme,
            sides[0].result("keys", self.scheme.key, per_head, centered=True),
            sides[1].result("values", self.scheme.value, per_head, centered=False),
        )


class _Seen:
    """Largest magnitudes of all tokens, and an even sample of the tokens themselves."""

    def __init__(self, kind: str) -> None:
        self._limit = LARGEST.get(kind, LARGEST["fp8_e4m3"])
        self._amax: Tensor | None = None
        self._beyond = self._count = self._tokens = 0
        self._every = 1
        self._kept = list[Tensor]()

    def add(self, x: Tensor) -> None:
        magnitudes = x.float().abs()
        amax = magnitudes.amax((0, 2)).cpu()
        self._amax = amax if self._amax is None else torch.maximum(self._amax, amax)
        self._beyond += int((magnitudes > self._limit).sum())
        self._count += x.numel()
        first = -self._tokens % self._every
        self._kept += torch.split(x[first :: self._every].float().cpu(), 256)
        self._tokens += x.shape[0]
        while sum(t.shape[0] for t in self._kept) > SAMPLES:  # keep every second of them, and take half as many
            self._kept = list(torch.split(torch.cat(self._kept)[::2].contiguous(), 256))
            self._every *= 2

    def of_all(self, team: Team) -> _Seen:
        """What all members have seen, each of whom has seen something."""
        if team.size == 1 or self._amax is None:
            return self
        self._amax = largest(team, self._amax)
        self._beyond, self._count, self._tokens = (
            sum(team.of_all(count)) for count in (self._beyond, self._count, self._tokens)
        )
        self._kept = [rows_of_all(team, torch.cat(self._kept)[:: team.size])]
        return self

    def result(self, name: str, kind: str, per_head: bool, *, centered: bool) -> KVSide:
        if self._amax is None or self._tokens == 0:
            raise KVError(f"no {name} were seen: there is no text to take scales from")
        amax = self._amax if per_head else self._amax.amax().view(1)
        if not bool(self._amax.isfinite().all()):
            raise KVError(f"{name} hold NaN or infinity: no scale covers them")
        beyond = self._beyond / self._count
        heads = self._amax.tolist()
        if kind == "bf16":
            return KVSide(None, heads, beyond, 0.0, math.inf)
        if not bool((amax > 0).all()):
            where = f"of KV head {int(amax.argmin())} " if per_head else ""
            what = (
                f"they have no scale; --kv-cache-scheme {'fp8 has one for all heads' if per_head else 'left out works'}"
            )
            raise KVError(f"{name} {where}are all zero: {what}")
        scale = amax / LARGEST[kind]
        # Engines take a scale of 1 for one that was never measured. The next larger number clips nothing.
        scale = torch.where(scale.bfloat16() == 1, torch.full_like(scale, ABOVE_ONE), scale)
        clipped, snr = self._measure(scale, kind, centered)
        shape = (-1, 1, 1) if per_head else (1,)
        return KVSide(scale.view(shape), heads, beyond, clipped, snr)

    def _measure(self, scale: Tensor, kind: str, centered: bool) -> tuple[float, float]:
        x = torch.cat(self._kept)
        spread = scale.view(1, -1, 1)
        clipped = float(((x / spread).abs() > LARGEST[kind] * (1 + 2.0**-20)).double().mean())  # a unit of the division
        if kind == "fp8_e4m3":
            rounded = round_to_e4m3(x, spread)
        else:
            rounded = (x / spread).round().clamp(-LARGEST[kind], LARGEST[kind]) * spread
        signal = (x - x.mean(0)) if centered else x
        noise = (rounded - x).square().sum((0, 2), dtype=torch.float64)
        ratio = signal.square().sum((0, 2), dtype=torch.float64) / noise.clamp(min=1e-300)
        return clipped, 10 * math.log10(max(float(ratio.min()), 1e-30))
