"""Judges a quantized model; names the layers to blame and what would help."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from octavo.calibration.report.weight_error import LayerRow, worst_first
from octavo.calibration.verify import NotFiniteError, Quality, added_noise
from octavo.quant.scheme import GROUP_SIZES, ActivationScheme, QuantScheme

WORST = 3  # layers and blocks that are named

# What rounding may cost, nats per token; a scheme's limit is the sum of its parts. Behind each: mean KL of rounding to
# nearest over 2,040 tokens of the held-out text, on SmolLM2-135M and on Qwen2.5-Coder-0.5B. A limit is half as much
# again as the larger one, or more. Small models lose most: what a model of 7B loses at the same scheme is a fraction of
# it, so whoever quantizes one and knows what to expect says --max-kl.
MOST_OF_WEIGHTS: dict[str, float] = {
    "int8": 0.01,  # W8A16@64: 0.0022, 0.0008
    "int6": 0.04,  # W6A16@64: 0.025
    "int5": 0.18,  # W5A16@64: 0.117; @32, as Q5_0 has it, 0.081
    "fp8_e4m3": 0.02,  # with inputs below
    # W4A16@64: 0.38, 0.15; asymmetric 0.32, 0.08; W4A8@64 0.42; one scale a row 1.21, which is meant to fail
    "int4": 0.6,
    "fp4_e2m1": 0.6,
    "int3": 1.0,  # W3A16@32: 1.24, 0.47
    "int2": 1.0,  # W2A16@32: 14, 16
}
MOST_OF_INPUTS = 0.04  # W8A8: 0.032, 0.014; FP8_DYNAMIC: 0.026, 0.012; FP8_BLOCK: 0.024, 0.013
MOST_OF_FP4_INPUTS = 0.4
MOST_OF_STATIC_INPUTS = 0.06  # FP8: 0.032, 0.013
MOST_OF_KV_CACHE = 0.05  # fp8: 0.007, 0.026; int8: 0.007, 0.075 (Qwen2's keys have outliers: it is meant to fail)
MOST_OF_INT4_KV_CACHE = 0.2  # int4_per_token_head: 0.049, 1.91 (the same keys)
MOST = 1.0  # at 1.2, SmolLM2's perplexity has tripled: that is another model
EXACT = 1e-3  # for models that nothing was rounded in: other kernels and types of number

LARGER = {  # weights in so many bits -> what has more: (input as it is, int8 input, fp8 input)
    2: ("W3A16", "W4A8", "W4AFP8"),
    3: ("W4A16", "W4A8", "W4AFP8"),
    4: ("W8A16", "W8A8", "FP8_DYNAMIC"),
}


@dataclass(frozen=True)
class Verdict:
    """mean_kl against max_kl; why says where that limit is from. mean_kl is None where a model's numbers were NaN.

    worst_layers, worst_blocks, remedies: only of a model that did not pass
    """

    passed: bool
    mean_kl: float | None
    max_kl: float
    why: str
    worst_layers: tuple[str, ...] = ()
    worst_blocks: tuple[int, ...] = ()
    remedies: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """For a person."""
        if self.mean_kl is None:
            return [f"FAILED: {self.why}"] + [f"what would help: {remedy}" for remedy in self.remedies]
        if self.passed:
            return [f"passed: mean KL {self.mean_kl:.4f} is not above {self.max_kl:g} ({self.why})"]
        lines = [f"FAILED: mean KL {self.mean_kl:.4f} is above {self.max_kl:g} ({self.why})"]
        if self.worst_blocks:
            lines.append(f"most of the noise comes from the blocks {', '.join(map(str, self.worst_blocks))}")
        if self.worst_layers:
            lines.append(f"worst layers: {', '.join(self.worst_layers)}")
        return lines + [f"what would help: {remedy}" for remedy in self.remedies]


def judge(
    quality: Quality,
    schemes: Collection[QuantScheme],
    max_kl: float | None = None,
    *,
    layers: Sequence[LayerRow] = (),
    algorithm: str = "rtn",
    kv_cache: str | None = None,
) -> Verdict:
    """Compare a measured mean KL with max_kl, by default with what the coarsest of the schemes may cost.

    layers: the quantized layers, to name the worst of. algorithm: the one that was used, so that it isn't advised.
    """
    coarsest = max(schemes, key=default_max_kl, default=None)
    why = "--max-kl"
    if max_kl is None:
        max_kl = default_max_kl(coarsest, kv_cache)
        why = f"the default for {coarsest or 'unquantized weights'}"
        why += f" with a KV cache in {kv_cache}" if kv_cache else ""
    if quality.mean_kl <= max_kl:
        return Verdict(True, quality.mean_kl, max_kl, why)
    worst = tuple(layer.module for layer in worst_first(layers)[:WORST])
    blocks = tuple(block for block, noise in added_noise(quality.blocks)[:WORST] if noise > 0)
    remedies = _remedies(coarsest, algorithm, layers, worst, blocks, kv_cache)
    return Verdict(False, quality.mean_kl, max_kl, why, worst, blocks, tuple(remedies))


def broken(error: NotFiniteError) -> Verdict:
    """The verdict on a quantized model that gives NaN or infinity."""
    remedies = (
        "--dtype float32 or bfloat16, if the weights or activations are beyond what float16 holds",
        "a KV cache that is not quantized, if keys or values are beyond what it holds",
    )
    return Verdict(False, None, 0.0, str(error), remedies=remedies)


def default_max_kl(scheme: QuantScheme | None, kv_cache: str | None = None) -> float:
    """Nats per token that a scheme may cost before something must be wrong with the model or the choice."""
    limit = 0.0
    if scheme is not None:
        limit = MOST_OF_WEIGHTS[scheme.weight.dtype]
        if scheme.activation is not None:
            limit += _most_of_inputs(scheme.activation)
    if kv_cache is not None:
        limit += MOST_OF_INT4_KV_CACHE if kv_cache.startswith("int4") else MOST_OF_KV_CACHE
    return min(limit, MOST) or EXACT


def _most_of_inputs(activation: ActivationScheme) -> float:
    if activation.dtype == "fp4_e2m1":
        return MOST_OF_FP4_INPUTS
    return MOST_OF_INPUTS if activation.dynamic else MOST_OF_STATIC_INPUTS


def _remedies(
    scheme: QuantScheme | None,
    algorithm: str,
    layers: Sequence[LayerRow],
    worst: tuple[str, ...],
    blocks: tuple[int, ...],
    kv_cache: str | None,
) -> list[str]:
    """Remedies to try, the cheapest first."""
    remedies = []
    if scheme is not None:
        remedies += _other_ways(scheme, algorithm, layers)
    if worst:
        remedies.append(f"--ignore {' '.join(worst)} leaves the worst layers as they are")
    elif blocks and scheme is not None:
        names = " ".join(f"'*.layers.{block}.*'" for block in blocks)
        remedies.append(f"--ignore {names} leaves the worst blocks as they are")
    if kv_cache is not None:
        remedies.append("octavo eval --kv-cache-dtype bfloat16 shows whether the KV cache is to blame")
        remedies.append("--kv-cache-scheme k=bf16,v=fp8 is for keys with outliers, as Qwen2's have")
        if kv_cache != "int8_per_token_head":
            remedies.append("--kv-cache-dtype int8_per_token_head has a scale for each token")
    return remedies


def _other_ways(scheme: QuantScheme, algorithm: str, layers: Sequence[LayerRow]) -> list[str]:
    ways = []
    weight = scheme.weight
    activation = scheme.activation
    integers = weight.dtype.startswith("int")
    if weight.bits < 8 and "gptq" not in algorithm:
        ways.append("--algorithm gptq rounds by what the layers' inputs are, at the same size")
    if activation is not None and activation.dtype == "int8" and "smoothquant" not in algorithm:
        ways.append("--algorithm smoothquant moves outliers of the inputs into the weights")
    if activation is not None and not activation.dynamic:
        ways.append("--scheme FP8_DYNAMIC finds the inputs' scales while running")
    smaller = _smaller_group(scheme, layers) if integers and weight.bits < 8 else None
    if smaller is not None:
        ways.append(f"--group-size {smaller} has more scales")
    if weight.bits in LARGER:
        name = LARGER[weight.bits][0 if activation is None else 1 if activation.dtype == "int8" else 2]
        ways.append(f"--scheme {name} has more bits")
    elif activation is not None:
        ways.append("--scheme W8A16 leaves the inputs as they are")
    return ways


def _smaller_group(scheme: QuantScheme, layers: Sequence[LayerRow]) -> int | None:
    """The next smaller group size that all layers' in_features allow."""
    granularity = scheme.weight.granularity
    if granularity.kind not in ("group", "channel"):
        return None
    fitting = [
        size
        for size in GROUP_SIZES
        if (granularity.group_size is None or size < granularity.group_size)
        and all(layer.in_features % size == 0 for layer in layers)
    ]
    return max(fitting, default=None)
