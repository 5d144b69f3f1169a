"""Rotary position embeddings: from a config's rope dictionary to the table of cosines and sines that kernels read.

The formulas are those of transformers' `modeling_rope_utils`, in the same float32 operations, so that the tables are
equal to the last bit. Two rope types depend on a sequence's length there, which a cache of rotated keys can't follow
(a key that has been written, and may be shared, would have to turn again when its sequence grows):

dynamic   is the plain rope up to max_position_embeddings; longer sequences are not served.
longrope  has two sets of factors. They are chosen once, by the longest sequence that is served (vLLM's rule): the
          short ones when it fits into original_max_position_embeddings, else the long ones for every sequence.

One isn't in transformers: ntk, of GTE's own code, which stretches every sequence (vLLM's NTKScalingRotaryEmbedding).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from octavo.runtime.model.config_types import ModelConfigError

PARAMETERS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "ntk": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
        | {"original_max_position_embeddings"}
    ),
    "longrope": frozenset(
        {"factor", "attention_factor", "short_factor", "long_factor", "original_max_position_embeddings"}
    ),
    "proportional": frozenset({"factor"}),
}
FIRST_ROWS = 4096  # of a RopeTable, computed when the model is loaded
ROWS_AT_ONCE = 1 << 14  # so that what is computed on the way stays small
MAX_ROTARY_DIM = 1 << 16
MAX_FREQUENCY = 1e6  # radians a position; a model's fastest pair turns by about 1, and float32 must hold the angles
_ALWAYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"})


class RopeError(ValueError):
    """A rope that the decoder doesn't know; the message names the key or the value."""


@dataclass(frozen=True)
class RopeSpec:
    """One kind of rotation. Fields that its type doesn't use keep their defaults.

    rotary_dim             elements of each head that turn; the rest pass
    max_position           the config's max_position_embeddings
    original_max_position  positions of pretraining, before scaling
    attention_factor       what cosines and sines are multiplied by
    turning_pairs          of "proportional": all elements are paired, and so many first pairs turn
    """

    rope_type: str
    theta: float
    rotary_dim: int
    max_position: int
    original_max_position: int
    factor: float = 1.0
    attention_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    turning_pairs: int = 0

    @property
    def longest(self) -> int:
        """Positions that the rotation is meant for: the config's own number, and more where `factor` stretches it."""
        if self.rope_type == "yarn":
            return max(self.max_position, int(self.original_max_position * self.factor))
        if self.rope_type == "linear":
            return int(self.max_position * self.factor)
        return self.max_position

    @classmethod
    def parse(cls, rope: dict[str, Any], *, theta: float, head_dim: int, max_position: int) -> RopeSpec:
        """Read one rope dictionary (`rope_parameters`, or transformers 4's `rope_scaling`); theta is the fallback.

        Raises RopeError on an unknown type, on a key that the type doesn't have (it would change the rotation), and on
        an odd number of rotating elements; and ModelConfigError on numbers that give no rotation.
        """
        spec = cls._read(rope, theta, head_dim, max_position)
        if spec.rotary_dim % 2:
            raise RopeError(f"{spec.rotary_dim} rotating elements can't be paired")
        _refuse_impossible(spec, head_dim)
        return spec

    @classmethod
    def _read(cls, rope: dict[str, Any], theta: float, head_dim: int, max_position: int) -> RopeSpec:
        rope = {key: value for key, value in rope.items() if value is not None}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in PARAMETERS:
            raise RopeError(f"rope type {rope_type!r} is unknown; known are {', '.join(PARAMETERS)}")
        if unknown := sorted(rope.keys() - PARAMETERS[rope_type] - _ALWAYS):
            raise RopeError(f"rope type {rope_type!r} has no parameter {', '.join(map(repr, unknown))}")
        rotary_dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
        original = int(rope.get("original_max_position_embeddings", max_position))
        common = (rope_type, float(rope.get("rope_theta", theta)), rotary_dim, max_position, original)
        try:
            match rope_type:
                case "linear" | "dynamic" | "ntk":
                    return cls(*common, factor=float(rope["factor"]))
                case "proportional":
                    turning = int(rope.get("partial_rotary_factor", 1.0) * head_dim // 2)
                    factor = float(rope.get("factor", 1.0))
                    return replace(cls(*common, factor=factor, turning_pairs=turning), rotary_dim=head_dim)
                case "llama3":
                    low = float(rope["low_freq_factor"])
                    high = float(rope["high_freq_factor"])
                    return cls(*common, factor=float(rope["factor"]), low_freq_factor=low, high_freq_factor=high)
                case "yarn":
                    return cls(
                        *common,
                        factor=float(rope["factor"]),
                        attention_factor=_yarn_attention_factor(rope),
                        beta_fast=float(rope.get("beta_fast") or 32),
                        beta_slow=float(rope.get("beta_slow") or 1),
                        truncate=bool(rope.get("truncate", True)),
                    )
                case "longrope":
                    return cls(*common, **_longrope_fields(rope, rotary_dim, max_position, original))
        except KeyError as missing:
            raise RopeError(f"rope type {rope_type!r} needs the parameter {missing}") from None
        return cls(*common)


def _yarn_attention_factor(rope: dict[str, Any]) -> float:
    if "attention_factor" in rope:
        return float(rope["attention_factor"])
    factor = float(rope["factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return yarn_magnitude(factor, rope["mscale"]) / yarn_magnitude(factor, rope["mscale_all_dim"])
    return yarn_magnitude(factor)


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """What queries and keys of a stretched context are multiplied by (arXiv 2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope_fields(rope: dict[str, Any], rotary_dim: int, max_position: int, original: int) -> dict[str, Any]:
    short = tuple(rope["short_factor"])
    long = tuple(rope["long_factor"])
    for name, factors in (("short_factor", short), ("long_factor", long)):
        if len(factors) != rotary_dim // 2:
            raise RopeError(f"longrope: {name} has {len(factors)} entries; rotary_dim {rotary_dim} needs half as many")
    factor = float(rope.get("factor", max_position / original))
    attention_factor = rope.get("attention_factor")
    if attention_factor is None:
        attention_factor = _longrope_attention_factor(factor, original)
    return {"factor": factor, "attention_factor": float(attention_factor), "short_factor": short, "long_factor": long}


def _longrope_attention_factor(factor: float, original: int) -> float:
    if factor <= 1:
        return 1.0
    if original < 2:
        raise ModelConfigError(
            f"config.json: longrope: original_max_position_embeddings {original} gives no attention factor, which "
            "divides by its logarithm; 2 or more does, or an attention_factor of its own"
        )
    return math.sqrt(1 + math.log(factor) / math.log(original))


def _refuse_impossible(spec: RopeSpec, head_dim: int) -> None:
    """Raise ModelConfigError for numbers that are of the right type, but give no rotation."""
    if not 1 <= spec.rotary_dim <= head_dim:
        raise ModelConfigError(
            f"config.json: partial_rotary_factor rotates {spec.rotary_dim} of the head's {head_dim} elements; above 0 "
            "to 1 works"
        )
    if spec.rotary_dim > MAX_ROTARY_DIM:
        raise ModelConfigError(
            f"config.json: head_dim {head_dim} is more than any model's; at most {MAX_ROTARY_DIM} elements rotate"
        )
    if not 0 <= spec.turning_pairs <= head_dim // 2:
        raise ModelConfigError(
            f"config.json: partial_rotary_factor turns {spec.turning_pairs} of {head_dim // 2} pairs; 0 to 1 works"
        )
    if spec.rope_type == "yarn":
        if spec.theta <= 1:
            raise ModelConfigError(
                f"config.json: yarn: rope_theta {spec.theta} must be above 1, since its logarithm is divided by"
            )
        for name, beta in (("beta_fast", spec.beta_fast), ("beta_slow", spec.beta_slow)):
            if not 1e-6 <= beta <= 1e6:
                raise ModelConfigError(
                    f"config.json: yarn: {name} {beta} is not from 1e-6 to 1e6; 32 for beta_fast and 1 for beta_slow"
                )
    lengths = (spec.original_max_position, spec.original_max_position + 1)  # longrope's short and long factors
    turning = spec.turning_pairs if spec.rope_type == "proportional" else spec.rotary_dim // 2
    for frequencies in (inverse_frequencies(spec, length)[:turning] for length in lengths):
        if not bool(((frequencies > 0) & (frequencies <= MAX_FREQUENCY)).all()):
            raise ModelConfigError(
                f"config.json: rope type {spec.rope_type!r} with rope_theta {spec.theta} and factor {spec.factor} "
                f"rotates by up to {float(frequencies.max()):.3g} radians a position; above 0 to {MAX_FREQUENCY:.0e} "
                "works"
            )


def cos_sin_table(spec: RopeSpec, length: int) -> Tensor:
    """Cosines in the first half of the columns, sines in the second: [length, rotary_dim] float32.

    length is the longest sequence that is served: it chooses longrope's factors.
    """
    return _rows(spec, inverse_frequencies(spec, length), 0, length)


def _rows(spec: RopeSpec, frequencies: Tensor, begin: int, end: int) -> Tensor:
    """The table's rows of these positions."""
    angles = torch.arange(begin, end, dtype=torch.float32).unsqueeze(1) * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1) * spec.attention_factor


class RopeTable:
    """The table of `cos_sin_table`, computed as far as sequences have come: there may be ten million positions.

    values [length, rotary_dim] lie on the CPU, whose system gives memory page by page when it is written. Rows from
    num_rows on hold nothing yet.
    """

    def __init__(self, spec: RopeSpec, length: int) -> None:
        self.values = torch.empty((length, spec.rotary_dim), dtype=torch.float32)
        self.num_rows = 0
        self._spec = spec
        self._frequencies = inverse_frequencies(spec, length)

    def cover(self, num_rows: int) -> None:
        """Compute rows up to `num_rows` and beyond: at least as many new rows as there are already."""
        if num_rows <= self.num_rows:
            return
        end = min(max(num_rows, 2 * self.num_rows), self.values.shape[0])
        for begin in range(self.num_rows, end, ROWS_AT_ONCE):
            stop = min(begin + ROWS_AT_ONCE, end)
            self.values[begin:stop] = _rows(self._spec, self._frequencies, begin, stop)
        self.num_rows = end


def inverse_frequencies(spec: RopeSpec, length: int) -> Tensor:
    """Radians per position of each pair, [rotary_dim / 2] float32."""
    exponents = torch.arange(0, spec.rotary_dim, 2, dtype=torch.float32) / spec.rotary_dim
    plain = 1.0 / (spec.theta**exponents)
    match spec.rope_type:
        case "linear":
            return plain / spec.factor
        case "proportional":
            plain[spec.turning_pairs :] = 0
            return plain / spec.factor
        case "llama3":
            return _llama3(spec, plain)
        case "yarn":
            return _yarn(spec, spec.theta**exponents)
        case "longrope":
            factors = spec.long_factor if length > spec.original_max_position else spec.short_factor
            return 1.0 / (torch.tensor(factors, dtype=torch.float32) * spec.theta**exponents)
        case "ntk":
            stretched: float = spec.factor ** (2 / spec.rotary_dim)
            return 1.0 / ((spec.theta * spec.factor) ** exponents) / stretched
    return plain


def _llama3(spec: RopeSpec, plain: Tensor) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones stay, those between are mixed (Llama 3.1)."""
    wavelength = 2 * math.pi / plain
    stretched = torch.where(wavelength > spec.original_max_position / spec.low_freq_factor, plain / spec.factor, plain)
    smooth = (spec.original_max_position / wavelength - spec.low_freq_factor) / (
        spec.high_freq_factor - spec.low_freq_factor
    )
    mixed = (1 - smooth) * stretched / spec.factor + smooth * stretched
    between = ~(wavelength < spec.original_max_position / spec.high_freq_factor) & ~(
        wavelength > spec.original_max_position / spec.low_freq_factor
    )
    return torch.where(between, mixed, stretched)


def _yarn(spec: RopeSpec, frequencies: Tensor) -> Tensor:
    """Interpolated where a pair turns less than beta_slow times in pretraining's length, as it is above beta_fast."""

    def correction_dim(rotations: float) -> float:
        turns = math.log(spec.original_max_position / (rotations * 2 * math.pi))
        return (spec.rotary_dim * turns) / (2 * math.log(spec.theta))

    low = correction_dim(spec.beta_fast)
    high = correction_dim(spec.beta_slow)
    if spec.truncate:
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, spec.rotary_dim - 1)
    if low == high:
        high += 0.001  # the ramp divides by their difference
    ramp = torch.arange(spec.rotary_dim // 2, dtype=torch.float32)
    keep = 1 - ((ramp - low) / (high - low)).clamp(0, 1)
    return 1.0 / (spec.factor * frequencies) * (1 - keep) + 1.0 / frequencies * keep


def rope_notes(rope: RopeSpec, max_position: int) -> list[str]:
    """What a person must know about a rope that depends on the length."""
    if rope.rope_type == "dynamic":
        return [f"rope type dynamic: sequences end at {rope.max_position} tokens, where its scaling would begin"]
    if rope.rope_type == "longrope" and max_position > rope.original_max_position:
        return [
            f"rope type longrope: the long factors serve every request, since {max_position} tokens are allowed; "
            f"--max-model-len {rope.original_max_position} serves with the short ones"
        ]
    return []
