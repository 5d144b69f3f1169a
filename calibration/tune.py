"""Tuning: a block's roundings and scales by gradients of its output, from where another algorithm has left them.

GPTQ and AWQ see one linear layer at a time. Here the block's output over the calibration text is compared with that of
the original model, whatever the blocks before have lost, and each weight that this moves may be rounded the other way
(`algorithms/learned_rounding.py`). Some samples are held back: what doesn't get better on them stays as it was.

A text's first token is special: most models make something very large of whichever it is, which all later tokens
attend to. Samples of calibration text have too few of them, so that tokens alone, each the first of a sequence, go
along where a text may begin with any.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from octavo.calibration.algorithms.learned_rounding import LearnedRounding
from octavo.calibration.hidden_states_file import Hidden
from octavo.calibration.layers import QuantizeError
from octavo.calibration.team import ALONE, Team, share_of, total, total_of_numbers
from octavo.quant.qparams import QuantizedWeight
from octavo.quant.scheme import WeightScheme

STEPS = 96
WIDE = 2048  # inputs of a layer, beyond which a block has twice the steps, each half as far
STEP_TOKENS = 1024  # whose gradients make a step
STEP_STARTS = 32  # first tokens beside them
START_SHARE = 0.125  # of first tokens' error, beside the text's
ROUNDING_RATE = 0.012  # of the first step at 2 bits, in codes; it falls to 0 linearly
SCALE_RATE = 0.006  # of the first step at 2 bits, as a part of the scale
HELD_BACK = 8  # every how many-th sample is held back
HELD_STARTS = 16  # every how many-th first token
ENOUGH = 64  # samples; of twice, three times as many it is every 16th, 24th, since 8 held back tell as much
LOOKS = 8  # at held-back samples if all were looked after; only those from the middle on are, as the best comes late


class Differentiable(Protocol):
    """`runtime/model/differentiable.py`: a block's forward with weights by their linear layer's name in the block."""

    def forward(self, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor: ...


@dataclass(frozen=True)
class Example:
    """A block's input over some sequences, and what the original's block gave for them."""

    hidden: Hidden
    target: Hidden


@dataclass(frozen=True)
class Tuned:
    """The weights that are best on the held-back samples, by module, and the error there before and after."""

    weights: dict[str, QuantizedWeight]
    error_before: float
    error: float


class BlockWeights:
    """A block's weights by its linear layers' names; some of their modules are on their way, the others as they are.

    layers   a linear layer's name in the block -> its modules, in the order of their rows
    tensors  what the block computes with, `MODULE.weight`, of those that aren't on their way
    learned  module -> its rounding
    kept     module -> the best so far, whose codes lie where those were that it began with
    dtype    of what linear layers multiply
    """

    def __init__(
        self,
        layers: Mapping[str, Sequence[str]],
        tensors: Mapping[str, Tensor],
        learned: Mapping[str, LearnedRounding],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.learned = learned
        self.kept = {module: rounding.start for module, rounding in learned.items()}
        self._layers = layers
        self.dtype = dtype
        self.device = device
        modules = {module for parts in layers.values() for module in parts}
        self._fixed = {m: tensors[f"{m}.weight"].to(device, dtype) for m in modules - learned.keys()}
        self._shapes = {m: learned[m].start.shape if m in learned else self._fixed[m].shape for m in modules}

    @property
    def widest(self) -> int:
        """The most inputs that one of the layers has."""
        return max(shape[1] for shape in self._shapes.values())

    def weights(self) -> dict[str, Tensor]:
        """Each layer's [N, K], which records its gradient if it is learned in part."""
        found = {}
        for name, modules in self._layers.items():
            num_rows = self._num_rows(name)
            weight = torch.empty(sum(num_rows), self._shapes[modules[0]][1], dtype=self.dtype, device=self.device)
            for module, part in zip(modules, torch.split(weight, num_rows), strict=True):
                if module in self.learned:
                    self.learned[module].write(part)
                else:
                    part.copy_(self._fixed[module])
            found[name] = weight.requires_grad_(any(m in self.learned for m in modules))
        return found

    def move(self, team: Team, weights: Mapping[str, Tensor], losses: Sequence[Tensor], share: float) -> None:
        """Move at a share of the rates against the gradients of all members' losses of what `weights` gave last."""
        if team.size == 1:
            self._move_in_backward(weights, share)
        if losses:
            torch.autograd.backward(losses)
        if team.size > 1:
            self._move_behind(team, weights, share)

    def _move_in_backward(self, weights: Mapping[str, Tensor], share: float) -> None:
        """Let a layer move as soon as the backward pass has its gradient, which is freed then: never are all there."""
        for name, weight in weights.items():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(partial(self._move, name, share))  # type: ignore[no-untyped-call]

    def _move_behind(self, team: Team, weights: Mapping[str, Tensor], share: float) -> None:
        """By the sums of all members' gradients: one that has none of a layer, whose tokens went to other experts, adds
        nothing to it.
        """
        moving = [name for name, weight in weights.items() if weight.requires_grad]
        seen = total(team, torch.tensor([float(weights[name].grad is not None) for name in moving]))
        for name, count in zip(moving, seen.tolist(), strict=True):
            weight = weights[name]
            if count:
                weight.grad = total(team, torch.zeros_like(weight) if weight.grad is None else weight.grad).to(weight)
                self._move(name, share, weight)

    def _move(self, name: str, share: float, weight: Tensor) -> None:
        gradient = weight.grad
        assert gradient is not None
        weight.grad = None
        for module, part in zip(self._layers[name], torch.split(gradient, self._num_rows(name)), strict=True):
            if module in self.learned:
                learned = self.learned[module]
                rate = share * _rate(learned.start.scheme.weight)
                learned.step(part, rate * ROUNDING_RATE, rate * SCALE_RATE)

    def _num_rows(self, name: str) -> list[int]:
        """Those of each of a layer's modules."""
        return [self._shapes[module][0] for module in self._layers[name]]

    def keep(self) -> None:
        """What there is now, in place of what was kept."""
        self.kept = {module: learned.result(self.kept[module].codes) for module, learned in self.learned.items()}


def num_steps(widest: int) -> int:
    """By how many inputs the block's widest layer has: the more weights an output depends on, the later it settles."""
    return STEPS if widest <= WIDE else 2 * STEPS


def _rate(weight: WeightScheme) -> float:
    """The share of the rates that a weight moves by: half of them at 3 bits and for floats, a quarter at 4 and more.

    The finer its grid, the less a weight gains on its way; what it learns of these samples alone doesn't get less
    (benchmarks/quality/results/README.md).
    """
    return 0.5 if weight.is_float else 2.0 ** (2 - min(weight.bits, 4))


def tune(
    block: Differentiable,
    own: BlockWeights,
    text: Example,
    starts: Example | None,
    reader: Tensor | None,
    *,
    seed: int,
    team: Team = ALONE,
) -> Tuned:
    """Tune a block towards the original's output for calibration text, and for `starts`, sequences of one token.

    The error is that of each token's output, relative to its size: the first token's, whose norm may be a thousand
    times the others', counts as one of them. reader [H]: the weight of the norm that reads this output, which channels
    may count by (`_counted`). The members of a team divide each step's sequences among them. Raises QuantizeError for a
    single sample.
    """
    count = text.hidden.shape.num_samples
    if count < 2:
        raise QuantizeError("algorithm tune holds samples back, so it needs 2 at least: --num-calibration-samples 2")
    device = own.device
    every = HELD_BACK * max(1, count // ENOUGH)
    parts = [_Part(text, 1.0, every, max(1, STEP_TOKENS // text.hidden.shape.seq_len), seed, team)]
    if starts is not None:
        parts.append(_Part(starts, START_SHARE, HELD_STARTS, STEP_STARTS, seed, team))
    factor = _counted(text.target, parts[0].held, reader).to(device)
    dtype = torch.float32 if device.type == "cpu" else own.dtype  # between products, which alone take long on a CPU

    def errors(example: Example, samples: Sequence[int], weights: Mapping[str, Tensor]) -> Tensor:
        output = block.forward(example.hidden.samples(samples).to(device, dtype), weights).float()
        wanted = example.target.samples(samples).to(device).float()
        return (((output - wanted) * factor).square().sum(-1) / _size(wanted)).mean(-1)

    @torch.no_grad()
    def look() -> float:
        weights = own.weights()
        error = 0.0
        for part in parts:
            found = sum(float(errors(part.example, some, weights).sum()) for some in part.looks)
            error += part.share * found / len(part.held)
        return total_of_numbers(team, error)

    @torch.enable_grad()
    def move(share: float) -> None:
        weights = own.weights()
        batches = [(part.example, *part.next_batch()) for part in parts]
        losses = [counts * errors(example, some, weights).mean() for example, some, counts in batches if some]
        own.move(team, weights, losses, share)

    best = before = look()
    steps = num_steps(own.widest)
    for step in range(steps):
        move((1 - step / steps) * STEPS / steps)
        left = steps - 1 - step
        if left < steps // 2 and left % (steps // LOOKS) == 0:
            error = look()
            if error < best:
                best = error
                own.keep()
    return Tuned(own.kept, before, best)


class _Part:
    """An example whose error counts by `share`: in each step `size` of its sequences, but every `every`-th is held
    back. Each member of a team has its own of either; held: those of all.
    """

    def __init__(self, example: Example, share: float, every: int, size: int, seed: int, team: Team) -> None:
        count = example.hidden.shape.num_samples
        self.example = example
        self.share = share
        self.held = list(range(0, count, every))
        self._order = _batches([i for i in range(count) if i % every], size, seed)
        self._team = team
        looks = [self.held[i : i + size] for i in range(0, len(self.held), size)]
        self.looks = [looks[i] for i in share_of(team, len(looks))]

    def next_batch(self) -> tuple[list[int], float]:
        """Sequences, and what their mean error counts for in the step's."""
        batch = next(self._order)
        own = [batch[i] for i in share_of(self._team, len(batch))]
        return own, self.share * len(own) / len(batch)


def _counted(target: Hidden, samples: Sequence[int], reader: Tensor | None) -> Tensor:
    """What each channel of an error is multiplied by, [H]: the weight of the norm behind, or 1.

    A row's error is about in proportion to its output, so that of a few channels may be most of what is counted. Of the
    two measures the one is taken that more channels have a share in, (sum e)^2 / sum e^2 of their mean squares e. In
    Gemma 3 one channel is up to 86 % of a token's square and its norms make little of it: counted by their weights, KL
    is 28 % less. In SmolLM2 they make more of such channels: it would be 5 % more.
    """
    shares = torch.zeros(target.shape.hidden_size)
    for sample in samples:
        wanted = target.samples([sample]).float().flatten(0, 1)
        shares += (wanted.square() / _size(wanted).unsqueeze(1)).sum(0)
    same = torch.ones_like(shares)
    if reader is None:
        return same
    weight = reader.float().cpu()
    return max(same, weight, key=lambda factor: _spread(shares * factor.square()))


def _spread(shares: Tensor) -> float:
    """How many channels share in a sum, as many as would if all shares were the same."""
    return float(shares.sum().square() / shares.square().sum())


def _size(output: Tensor) -> Tensor:
    """[..., H] -> [...]: the square of each token's norm, which divides well."""
    return output.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)


def _batches(samples: list[int], size: int, seed: int) -> Iterator[list[int]]:
    """Without end, each sample as often as the others, in an order that the seed says."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += [samples[i] for i in torch.randperm(len(samples), generator=generator).tolist()]
        yield waiting[:size]
        waiting = waiting[size:]
