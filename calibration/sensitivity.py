"""How much each part of a model minds being rounded, for mixed precision under a budget.

Sensitivity of a unit (the layers of a block that share an input, or all of its experts) is the KL divergence of the
model's next-token distribution from the original's when that unit alone is rounded, its input too where the scheme says
so. It is measured with one scheme; for the others it is scaled by the unit's output error, since a small change of
logits costs KL in proportion to its square. Experts that are chosen for one by one share the KL of all by each one's
output error and by the tokens that the router sends to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.calibration.algorithms.gptq import gptq_loss, output_energy
from octavo.calibration.algorithms.input_statistics import InputStats, StatsCollector
from octavo.calibration.block import INPUT_ROWS, RecordKV, Runner
from octavo.calibration.candidates import own_candidate
from octavo.calibration.experts import rarely_chosen
from octavo.calibration.hidden_states_file import BATCH_TOKENS
from octavo.calibration.layers import EXPERT
from octavo.calibration.output import make_format, scale_dtype
from octavo.calibration.plan import Item, Plan
from octavo.calibration.prepare import Calibration, Prepared
from octavo.calibration.progress import Progress
from octavo.calibration.recipe import Recipe, parse_scheme
from octavo.calibration.rounded_inputs import rounding_of, with_rounded_inputs
from octavo.quant.block_map import StoredCache
from octavo.quant.checkpoint import Checkpoint
from octavo.quant.qparams import quantize_weight
from octavo.quant.scheme import QuantScheme

MAX_TOKENS = 1024  # whose KL is measured: units differ by far more than its error over so many
LOGIT_ROWS = 256
EXPERTS = "experts"  # the unit of all experts of a block
UNCOUNTED = ("weight_shape", "g_idx", "weight_global_scale", "input_global_scale")
"""Tensors that are no part of a weight's bits: W4A16@32 and NVFP4 have 4.5, to the bit."""


@dataclass(frozen=True)
class Choice:
    """The cost of a scheme for one unit: its bits, and the KL that it adds to the model."""

    scheme: str
    bits: int
    kl: float


@dataclass(frozen=True)
class Sensitivity:
    """A unit: its layers' modules, their weights in number, KL when it alone is rounded, and what could be chosen.

    layer    of an expert that is chosen for by itself: the name that all experts of its layer have together
    is_rare  the text says next to nothing of it: an expert with less than a tenth of an even share of the tokens
    """

    name: str
    modules: tuple[str, ...]
    weights: int
    choices: tuple[Choice, ...]
    layer: str | None = None
    is_rare: bool = False


def carried_bytes(runner: Runner) -> int:
    """Bytes that `measure` holds beside a block: the hidden states of one variant of the model for each unit."""
    units = 4 * runner.num_blocks  # qkv, o, gate_up and down
    return (units + 2) * MAX_TOKENS * runner.hidden_size * runner.dtype.itemsize


def measure(
    planned: Prepared,
    calibration: Calibration,
    schemes: Sequence[str],
    progress: Progress,
    *,
    each_expert: bool = False,
) -> list[Sensitivity]:
    """Sensitivity of every unit, one block in memory at a time, over the first MAX_TOKENS of the text.

    each_expert: an expert is a unit of its own; else all of a layer are one.
    """
    checkpoint = planned.checkpoint
    plan = planned.plan
    recipe = planned.recipe
    runner = calibration.runner
    original = first_hidden(checkpoint, calibration)
    variants: list[Tensor] = []
    measured: list[list[Sensitivity]] = []  # the units of each variant
    blocks = [unit for unit in plan.units if unit.index is not None]
    own = parse_scheme(own_candidate(recipe))
    num_rows = INPUT_ROWS if any(parse_scheme(scheme).activation is not None for scheme in schemes) else 0
    for number, unit in enumerate(blocks):
        progress(number * (number + 1), len(blocks) * (len(blocks) + 1), f"sensitivity of {unit.name}")
        tensors = {item.name: item.file.read(item.name) for item in unit.items}
        layer = runner.build(number, tensors)
        variants = [forward(runner, layer, hidden) for hidden in variants]
        stats, following = _observe(runner, layer, original, num_rows)
        counts = [] if runner.expert_counts is None else runner.expert_counts.tolist()
        for name, (modules, inputs) in _units(runner, number, layer, plan).items():
            changes: dict[str, Tensor] = {}
            parts: list[_Part] = []
            for expert, of_part in _parts(name, modules, each_expert).items():
                items = [item for item in unit.items if item.linear is not None and item.linear.module in of_part]
                new, errors = _round(items, tensors, {m: stats[inputs[m]] for m in of_part}, recipe, schemes)
                changes |= new
                bits = {scheme: layer_bits(items, recipe, scheme) for scheme in schemes}
                parts.append(_Part(expert, tuple(of_part), sum(item.spec.numel for item in items), bits, errors))
            changed = runner.build(number, tensors | changes)
            absmax = {module: stats[group].absmax for module, group in inputs.items()}
            changed = with_rounded_inputs(runner, number, changed, dict.fromkeys(modules, own), absmax)
            variants.append(forward(runner, changed, original))
            measured.append(_shares(f"{unit.name}.{name}", parts, counts, own_candidate(recipe)))
        original = following
    found = divergences(checkpoint, runner, original, variants, progress)
    return [_scaled(unit, kl) for units, kl in zip(measured, found, strict=True) for unit in units]


@dataclass(frozen=True)
class _Part:
    """What gets one scheme: a unit, or one of its experts. bits and errors: by scheme."""

    expert: int | None
    modules: tuple[str, ...]
    weights: int
    bits: Mapping[str, int]
    errors: Mapping[str, float]


def _parts(name: str, modules: Sequence[str], each_expert: bool) -> dict[int | None, list[str]]:
    """A unit's modules as what gets one scheme, by the number of the expert."""
    if name != EXPERTS or not each_expert:
        return {None: list(modules)}
    parts: dict[int | None, list[str]] = {}
    for module in modules:
        found = EXPERT.search(module)
        assert found is not None  # as `_unit_of` has it
        parts.setdefault(int(found[0].split(".")[2]), []).append(module)
    return parts


def _shares(name: str, parts: Sequence[_Part], counts: Sequence[int], own: str) -> list[Sensitivity]:
    """A unit's parts with choices whose `kl` is a share of what the unit's is measured to be.

    An expert's share is that of its error times its tokens. A rare one is taken to have an even share of them: what
    octavo is asked later may choose it as often as others.
    """
    if parts[0].expert is None:
        (part,) = parts
        choices = tuple(Choice(s, bits, part.errors[s] / part.errors[own]) for s, bits in part.bits.items())
        return [Sensitivity(name, part.modules, part.weights, choices)]
    rare = set(rarely_chosen(counts))
    even = sum(counts) / len(counts)
    total = sum(counts[part.expert] * part.errors[own] for part in parts if part.expert is not None) or 1.0
    units = []
    for part in parts:
        assert part.expert is not None
        tokens = max(counts[part.expert], even) if part.expert in rare else counts[part.expert]
        choices = tuple(Choice(s, bits, tokens * part.errors[s] / total) for s, bits in part.bits.items())
        of_expert = f"{name}.{part.expert}"
        units.append(Sensitivity(of_expert, part.modules, part.weights, choices, name, part.expert in rare))
    return units


def _scaled(unit: Sensitivity, kl: float) -> Sensitivity:
    return replace(unit, choices=tuple(replace(choice, kl=choice.kl * kl) for choice in unit.choices))


def _units(runner: Runner, index: int, layer: Any, plan: Plan) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Unit -> its modules, and the input group of each.

    The experts of a block are one, EXPERTS: engines that stack them, as vLLM does, have one scheme for all of a stack
    and of the next.
    """
    units: dict[str, tuple[list[str], dict[str, str]]] = {}
    for group in runner.groups(index, layer):
        for module in group.modules:
            if module in plan.schemes:
                modules, inputs = units.setdefault(_unit_of(module, group.name), ([], {}))
                modules.append(module)
                inputs[module] = group.name
    return units


def _unit_of(module: str, group: str) -> str:
    if EXPERT.search(module):
        return EXPERTS
    return group.replace("experts.", "shared_experts.", 1) if group.startswith("experts.") else group


def _observe(runner: Runner, layer: Any, hidden: Tensor, num_rows: int) -> tuple[dict[str, InputStats], Tensor]:
    """Statistics of the inputs of a block's layers, with some of these inputs, and its output."""
    collectors: dict[str, StatsCollector] = {}

    def record(name: str, x: Tensor) -> None:
        collectors.setdefault(name, StatsCollector(x.shape[1], x.device, num_rows=num_rows)).add(x)

    output = forward(runner, layer, hidden, record)
    return {name: collector.result() for name, collector in collectors.items()}, output


def forward(
    runner: Runner,
    layer: Any,
    hidden: Tensor,
    record: Callable[[str, Tensor], None] | None = None,
    record_kv: RecordKV | None = None,
    stored: StoredCache | None = None,
) -> Tensor:
    """hidden [S, T, H] through one block, a few samples at a time; see `Runner.forward`."""
    batch = max(1, BATCH_TOKENS // hidden.shape[1])
    return torch.cat([runner.forward(layer, part, record, record_kv, stored) for part in torch.split(hidden, batch)])


def _round(
    items: Sequence[Item],
    tensors: Mapping[str, Tensor],
    stats: Mapping[str, InputStats],
    recipe: Recipe,
    schemes: Sequence[str],
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """A unit's weights rounded with the recipe's scheme, and the energy of its output's error with each scheme."""
    changes: dict[str, Tensor] = {}
    errors = dict.fromkeys(schemes, 1e-30)  # a unit that is exact with one scheme has a ratio all the same
    for item in items:
        assert item.linear is not None
        weight = tensors[item.name]
        seen = stats[item.linear.module]
        signal = output_energy(weight.float(), seen.moments)
        for spelled in schemes:
            scheme = parse_scheme(spelled)
            back = rounded(weight, scheme, recipe)
            if len(seen.rows):  # whose rounding counts, too
                errors[spelled] += _output_error(weight, back, scheme, seen)
            else:
                errors[spelled] += gptq_loss(weight, back, seen) * signal
            if spelled == own_candidate(recipe):
                changes[item.name] = back.to(weight.dtype)
    return changes, errors


def _output_error(weight: Tensor, back: Tensor, scheme: QuantScheme, seen: InputStats) -> float:
    """Energy for a token of what a layer's output is off by, its input rounded as the scheme says, over kept inputs."""
    rounds = rounding_of(scheme, seen.absmax, seen.rows.device)
    inputs = seen.rows if rounds is None else rounds(seen.rows)
    off = inputs @ back.to(inputs).t() - seen.rows @ weight.to(inputs).t()
    return float(off.square_().sum(dtype=torch.float64)) / len(inputs)


def rounded(weight: Tensor, scheme: QuantScheme, recipe: Recipe) -> Tensor:
    """A weight [N, K] rounded to nearest, float32."""
    stored = scale_dtype(recipe, weight.dtype)
    return quantize_weight(weight, scheme, recipe.search_of(scheme), scale_dtype=stored).dequantize()


def layer_bits(items: Sequence[Item], recipe: Recipe, scheme: str) -> int:
    """Bits that the unit's layers take on the disk: codes, scales and zero points."""
    total = 0
    for item in items:
        assert item.linear is not None
        format_ = make_format(recipe, parse_scheme(scheme), item.spec.dtype)
        tensors = format_.tensors(item.linear.out_features, item.linear.in_features)
        total += sum(spec.nbytes for name, spec in tensors.items() if name not in UNCOUNTED)
    return 8 * total


def divergences(
    checkpoint: Checkpoint, runner: Runner, original: Tensor, variants: Sequence[Tensor], progress: Progress
) -> list[float]:
    """Mean KL of each variant's next-token distribution from the original's, in nats."""
    head = runner.head(checkpoint.tensor)
    sums = [0.0] * len(variants)
    rows = torch.split(original.flatten(0, 1), LOGIT_ROWS)
    others = [torch.split(variant.flatten(0, 1), LOGIT_ROWS) for variant in variants]
    for number, part in enumerate(rows):
        truth = F.log_softmax(head(part), dim=-1)
        probabilities = truth.exp()
        for i, other in enumerate(others):
            guess = F.log_softmax(head(other[number]), dim=-1)
            sums[i] += float((probabilities * (truth - guess)).sum())
        progress(number + 1, len(rows), "sensitivity")
    return [max(total, 0.0) / original.shape[0] / original.shape[1] for total in sums]


def first_hidden(checkpoint: Checkpoint, calibration: Calibration) -> Tensor:
    """The first block's input over the first MAX_TOKENS of the text."""
    token_ids = calibration.token_ids
    samples = token_ids[: max(1, MAX_TOKENS // token_ids.shape[1])]
    return calibration.runner.embed(samples, checkpoint.tensor(calibration.runner.embedding_name))
