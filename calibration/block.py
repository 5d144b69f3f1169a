"""One block through calibration: its inputs' statistics, scales folded into the ops before, codes for its weights.

Pure data flow: tensors of the block in, quantized weights and changed tensors out. How a block is run is the
runner's (runtime/model/blocks.py), which knows architectures; this room only knows which layers share an input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from octavo.calibration.algorithms.awq import awq_clip, awq_scales
from octavo.calibration.algorithms.channel_scale_search import ScaleSearch
from octavo.calibration.algorithms.gptq import gptq_loss, gptq_weight
from octavo.calibration.algorithms.group_scales import static_input_scale
from octavo.calibration.algorithms.input_statistics import InputStats, StatsCollector
from octavo.calibration.algorithms.learned_rounding import LearnedRounding
from octavo.calibration.algorithms.scale_folding import fold_scales, tie_scales
from octavo.calibration.algorithms.smoothquant import smoothquant_scales
from octavo.calibration.experts import expert_of, rarely_chosen
from octavo.calibration.hidden_states_file import Hidden
from octavo.calibration.kv import KVCollector
from octavo.calibration.layers import QuantizeError
from octavo.calibration.output import scale_dtype
from octavo.calibration.recipe import Recipe
from octavo.calibration.team import ALONE, Team, own_rows, rows_of_all, total_of_counts
from octavo.calibration.tune import BlockWeights, Differentiable, Example, tune
from octavo.freed_memory import give_back_freed_memory
from octavo.kernels.native.cpu_features import multiplies_bfloat16
from octavo.quant.block_map import Fold, InputGroup, StoredCache
from octavo.quant.input_rounding import Round, input_rounding
from octavo.quant.qparams import QuantizedWeight, WeightError, global_scale_of, quantize_weight
from octavo.quant.scheme import QuantScheme

MAX_ROWS = 1 << 15  # of layers that are solved together, or one layer
# SmoothQuant's alpha behind a norm. The one with the least error of the layers' outputs is some 0.6, and is worse:
# Qwen2 0.5B in W8A8 with scales behind norms alone has a KL of 0.0114 with it, and 0.0081 with 0.8.
NORM_SMOOTHING = 0.8
INPUT_ROWS = 512  # tokens whose inputs are kept to see what rounding them costs
# Tokens for each of the widest layer's inputs that inputs are measured on where tuning goes on from there. With 4
# Qwen2.5's first block, of 4,864 inputs, ends with 1.12 times the KL that it has with 13; SmolLM2's, of 1,536, need no
# more than 11.
TUNED_TOKENS_PER_INPUT = 16
Tensors = dict[str, Tensor]
RecordKV = Callable[[Tensor, Tensor], None]  # keys and values
Step = Callable[[str], None]  # told what is done next, for the progress bar


@dataclass(frozen=True)
class Solved:
    """A linear layer's codes, the weight that they stand for, and the output's signal to noise in dB, where known."""

    module: str
    quantized: QuantizedWeight
    weight: Tensor
    output_snr_db: float | None


class Runner(Protocol):
    """The interface to runtime/model/blocks.py that calibration uses; only the runner knows what a layer is."""

    device: torch.device
    dtype: torch.dtype
    hidden_size: int
    num_blocks: int
    is_causal: bool  # what is computed of a token doesn't depend on those behind it, nor on how many they are
    expert_counts: Tensor | None  # of the block that was built last

    @property
    def embedding_name(self) -> str: ...
    def embed(self, token_ids: Tensor, embedding: Tensor) -> Tensor: ...
    def build(self, index: int, tensors: Mapping[str, Tensor]) -> Any: ...
    def groups(self, index: int, layer: Any) -> list[InputGroup]: ...
    def modules(self, index: int) -> dict[str, tuple[str, ...]]: ...
    def differentiable(self, layer: Any, rounds: Mapping[str, Round]) -> Differentiable: ...
    def rounding(self, layer: Any, rounds: Mapping[str, Round]) -> Any: ...
    def norm_behind(self, index: int, /) -> tuple[str, float] | None: ...
    def folds(self, index: int) -> list[Fold]: ...
    def head(self, tensor: Callable[[str], Tensor]) -> Callable[[Tensor], Tensor]: ...
    def forward(
        self,
        layer: Any,
        hidden: Tensor,
        record: Callable[[str, Tensor], None] | None = None,
        record_kv: RecordKV | None = None,
        stored: StoredCache | None = None,
    ) -> Tensor: ...


@dataclass
class Block:
    """One block's tensors on their way. What `tensors` holds is always what the block computes with so far.

    team: who share its samples, and the rows of its weights while they are rounded
    """

    index: int
    tensors: Tensors
    schemes: Mapping[str, QuantScheme]
    recipe: Recipe
    runner: Runner
    step: Step
    team: Team = ALONE
    expert_counts: Tensor | None = None  # [num_experts]: tokens that chose each expert, once inputs were measured

    def quantize(
        self,
        hidden: Hidden,
        target: Hidden | None = None,
        starts: Example | None = None,
        reader: Tensor | None = None,
    ) -> Iterator[Solved]:
        """Each linear layer that has a scheme, solved; `tensors` holds what it computes with from then on.

        target: the output of the original's block, for algorithms that tune towards it, and starts: sequences of one
        token. reader [H]: what the norm that reads this output multiplies it by, if one does.
        """
        if target is None:
            return self._solve_layers(hidden)
        return self._tune(list(self._solve_layers(hidden, is_tuned=True)), Example(hidden, target), starts, reader)

    def _enough(self, hidden: Hidden) -> int | None:
        """How many samples inputs are measured on before a block, built, is tuned; None: all, which experts share and
        stored scales cover.
        """
        stored = any(s.activation is not None and s.activation.has_stored_scale for s in self.schemes.values())
        if stored or self.runner.expert_counts is not None:
            return None
        widest = max((self.tensors[f"{module}.weight"].shape[1] for module in self.schemes), default=0)
        return -(-TUNED_TOKENS_PER_INPUT * widest // hidden.shape.seq_len)

    def _solve_layers(self, hidden: Hidden, *, is_tuned: bool = False) -> Iterator[Solved]:
        layer = self.runner.build(self.index, self.tensors)
        groups = self.runner.groups(self.index, layer)
        num_samples = self._enough(hidden) if is_tuned else None
        stats = self._capture(layer, hidden, groups, num_samples) if self.recipe.needs_statistics else {}
        del layer  # it takes as much as the tensors
        if self.recipe.scaling is not None:  # all folds first: none may reach into a layer that is solved already
            self._scale(groups, stats)
        stages = _stages(groups) if self.recipe.true_sequential else [groups]
        for number, stage in enumerate(stages):
            if number > 0:
                stats = self._capture(self.runner.build(self.index, self.tensors), hidden, stage, num_samples)
            for group in stage:
                yield from self._group(group, stats.get(group.name))

    def _capture(
        self, layer: Any, hidden: Hidden, wanted: list[InputGroup], num_samples: int | None
    ) -> dict[str, InputStats]:
        """Run samples through the block as it is, the first ones or all; the inputs' statistics of layers that have a
        scheme.
        """
        self.step("inputs")
        moments = self.recipe.algorithm != "rtn"  # static scales need the largest magnitudes alone
        num_rows = 0 if self.recipe.scaling is None else INPUT_ROWS
        modules = {group.name: next((m for m in group.modules if m in self.schemes), None) for group in wanted}
        widths = {name: self.tensors[f"{m}.weight"].shape[1] for name, m in modules.items() if m is not None}
        if not widths:
            return {}
        collectors = {
            name: StatsCollector(width, self.runner.device, moments=moments, num_rows=num_rows)
            for name, width in widths.items()
        }

        def record(name: str, x: Tensor) -> None:
            if name in collectors:
                collectors[name].add(x)

        for _, batch in hidden.batches(num_samples):
            self.runner.forward(layer, batch.to(self.runner.device), record)
        counts = self.runner.expert_counts
        self.expert_counts = None if counts is None else total_of_counts(self.team, counts)
        found = {name: collectors.pop(name).result(self.team) for name in widths}
        for group in wanted:
            if group.name in found and not bool(found[group.name].moments.isfinite().all()):
                raise QuantizeError(
                    f"{group.modules[0]}: its input holds NaN or infinity for the calibration text, or what overflows "
                    "when it is squared: the model's activations overflow, and no algorithm can learn from them; rtn "
                    "with a scheme whose activations are dynamic needs none"
                )
        return found

    def _scale(self, groups: list[InputGroup], stats: dict[str, InputStats]) -> None:
        """Fold AWQ's or SmoothQuant's scales into the ops before; `stats` are as they are afterwards."""
        readers = {group.name: group.modules for group in groups}
        for fold in self.runner.folds(self.index):
            modules = readers.get(fold.group, ())
            if fold.group not in stats or any(m not in self.schemes for m in modules):
                continue
            self.step(f"{self.recipe.scaling} {fold.group}")
            found = self._search(fold, modules, stats[fold.group])
            if found.gains or self._smoothing(fold) is not None:
                stats[fold.group] = fold_scales(self.tensors, fold, modules, found.scales, stats[fold.group])

    def _search(self, fold: Fold, modules: Sequence[str], stats: InputStats) -> ScaleSearch:
        """Scales for the input of some layers."""
        weights = [self.tensors[f"{m}.weight"].to(stats.moments.device) for m in modules]
        schemes = [self.schemes[m] for m in modules]
        search = self.recipe.search_of(schemes[0])
        stored = scale_dtype(self.recipe, weights[0].dtype)

        def tie(scales: Tensor) -> Tensor:
            return tie_scales(scales, fold)

        if self.recipe.scaling == "awq":
            return awq_scales(weights, schemes, stats, tie=tie, search=search, scale_dtype=stored)
        alpha = self._smoothing(fold)
        return smoothquant_scales(weights, schemes, stats, alpha=alpha, tie=tie, search=search, scale_dtype=stored)

    def _smoothing(self, fold: Fold) -> float | None:
        """SmoothQuant's alpha, where it isn't searched: always behind a norm, elsewhere when the recipe has one."""
        if self.recipe.scaling != "smoothquant":
            return None
        return NORM_SMOOTHING if self.recipe.smoothing is None and fold.kind == "norm" else self.recipe.smoothing

    def _group(self, group: InputGroup, stats: InputStats | None) -> Iterator[Solved]:
        """Codes of the layers that share an input; those of one scheme are solved together."""
        modules = [m for m in group.modules if m in self.schemes]
        for scheme in dict.fromkeys(self.schemes[m] for m in modules):
            self.step(modules[0].rpartition(".")[2])
            members = [m for m in modules if self.schemes[m] == scheme]
            whole = global_scale_of((self.tensors[f"{m}.weight"] for m in members), scheme.weight)
            for alike in self._runs(members):
                parts = [self.tensors[f"{m}.weight"] for m in alike]
                try:
                    solved = self._solve(parts, scheme, stats, whole)
                except WeightError as e:
                    raise QuantizeError(f"{alike[0]}.weight can't be quantized: {e}") from e
                for module, weight, quantized in zip(alike, parts, solved, strict=True):
                    rounded = quantized.dequantize()
                    output = None if stats is None or not stats.moments.numel() else _output_snr(weight, rounded, stats)
                    self.tensors[f"{module}.weight"] = rounded.to(weight.dtype)
                    yield Solved(module, quantized, weight, output)

    def _tune(
        self, solved: list[Solved], text: Example, starts: Example | None, reader: Tensor | None
    ) -> Iterator[Solved]:
        """The layers with what tuning made of them; an expert that hardly any token goes to stays as it is."""
        layers = self.runner.modules(self.index)
        rare = set() if self.expert_counts is None else set(rarely_chosen(self.expert_counts.tolist()))
        untuned = {m for name, modules in layers.items() if expert_of(name) in rare for m in modules}
        moving = [s for s in solved if s.module not in untuned]
        if not moving:
            yield from solved
            return
        self.step("tuning")
        device = self.runner.device
        rounds = _input_rounding(layers, {s.module: s.quantized for s in solved}, device)
        block = self.runner.differentiable(self.runner.build(self.index, self.tensors), rounds)
        learned = {}
        for s in moving:
            learned[s.module] = LearnedRounding(s.weight.to(device), s.quantized.to(device))
            del self.tensors[f"{s.module}.weight"]  # there is room for it once it is tuned
        give_back_freed_memory()  # what GPTQ took, in whose gaps tuning's large pieces don't fit
        own = BlockWeights(layers, self.tensors, learned, _product_dtype(self.runner), device)
        tuned = tune(block, own, text, starts, reader, seed=self.index, team=self.team)
        for layer in solved:
            quantized = tuned.weights.get(layer.module)
            if quantized is not None:
                self.tensors[f"{layer.module}.weight"] = quantized.dequantize().to("cpu", layer.weight.dtype)
                layer = replace(layer, quantized=quantized.to(torch.device("cpu")))
            yield layer

    def _runs(self, modules: list[str]) -> Iterator[list[str]]:
        """Layers that are solved together: all, but of a hundred experts no more than make a large layer."""
        run = list[str]()
        rows = 0
        for module in modules:
            count = self.tensors[f"{module}.weight"].shape[0]
            if run and rows + count > MAX_ROWS:
                yield run
                run = []
                rows = 0
            run.append(module)
            rows += count
        yield run

    def _solve(
        self, parts: list[Tensor], scheme: QuantScheme, stats: InputStats | None, whole: Tensor | None
    ) -> Iterable[QuantizedWeight]:
        """Codes of layers that share an input; whole: what divides the e4m3 scales of all of them."""
        recipe = self.recipe
        search = recipe.search_of(scheme)
        stored = scale_dtype(recipe, parts[0].dtype)
        input_scale = None
        if scheme.activation is not None and scheme.activation.has_stored_scale:
            assert stats is not None
            input_scale = static_input_scale(stats.absmax, scheme.activation)
        if recipe.algorithm == "awq":
            assert stats is not None
            solved = [
                awq_clip(part, stats, scheme, search=search, scale_dtype=stored, global_scale=whole) for part in parts
            ]
        elif recipe.solver == "rtn" or stats is None:
            solved = [quantize_weight(part, scheme, search, stored, whole) for part in parts]
        elif scheme.weight.granularity.kind in ("tensor", "block"):  # scales that rows of another layer mustn't share
            solved = [self._gptq(part, stats, scheme, None) for part in parts]
        else:
            joined = self._gptq_rows(torch.cat(parts), stats, scheme, whole)
            begins = [sum(p.shape[0] for p in parts[:i]) for i in range(len(parts))]
            solved = [joined.rows(b, b + p.shape[0]) for b, p in zip(begins, parts, strict=True)]
        return [replace(q, input_scale=input_scale) for q in solved]

    def _gptq_rows(
        self, weight: Tensor, stats: InputStats, scheme: QuantScheme, whole: Tensor | None
    ) -> QuantizedWeight:
        """Each member's rows by itself, as none depends on another, and then those of all."""
        if self.team.size == 1 or weight.shape[0] < self.team.size:
            return self._gptq(weight, stats, scheme, whole)
        begin, stop = own_rows(self.team, weight.shape[0])
        mine = self._gptq(weight[begin:stop], stats, scheme, whole)
        return replace(
            mine,
            codes=rows_of_all(self.team, mine.codes),
            scale=rows_of_all(self.team, mine.scale),
            zero_point=None if mine.zero_point is None else rows_of_all(self.team, mine.zero_point),
        )

    def _gptq(self, weight: Tensor, stats: InputStats, scheme: QuantScheme, whole: Tensor | None) -> QuantizedWeight:
        recipe = self.recipe
        return gptq_weight(
            weight.to(stats.moments.device),
            stats,
            scheme,
            act_order=recipe.act_order,
            search=recipe.search_of(scheme),
            dampening=recipe.dampening,
            scale_dtype=scale_dtype(recipe, weight.dtype),
            global_scale=whole,
        ).weight

    def advance(self, hidden: Hidden, target: Hidden) -> KVCollector | None:
        """All samples through the block as it is now, to `target`; keys and values on the way, when they are asked."""
        kv = None if self.recipe.kv is None else KVCollector(self.recipe.kv)
        self.run(hidden, target, None if kv is None else kv.add)
        return kv

    def run(self, hidden: Hidden, target: Hidden, record_kv: RecordKV | None = None) -> None:
        """All samples through the block as it is now, to `target`."""
        self.step("outputs")
        layer = self.runner.build(self.index, self.tensors)
        overflows = False
        for begin, batch in hidden.batches():
            output = self.runner.forward(layer, batch.to(self.runner.device), None, record_kv)
            overflows = not bool(output.isfinite().all())
            if overflows:
                break
            target.put(begin, output)
        if any(self.team.of_all(overflows)):  # once all have written, and may read
            raise QuantizeError(
                f"layer {self.index} gives NaN or infinity for the calibration text: the model's activations "
                "overflow; rtn with a scheme whose activations are dynamic needs none"
            )


def _product_dtype(runner: Runner) -> torch.dtype:
    """The type that tuning multiplies matrices in: float32 on CPUs that multiply it faster."""
    in_float32 = runner.device.type == "cpu" and not multiplies_bfloat16()
    return torch.float32 if in_float32 else runner.dtype


def _stages(groups: list[InputGroup]) -> list[list[InputGroup]]:
    """Return the stages that a block computes one after another; all experts' second layers are one stage."""
    stages: dict[str, list[InputGroup]] = {}
    for group in groups:
        stages.setdefault(group.name.rpartition(".")[2] if "." in group.name else group.name, []).append(group)
    return list(stages.values())


def _input_rounding(
    layers: Mapping[str, Sequence[str]], solved: Mapping[str, QuantizedWeight], device: torch.device
) -> dict[str, Round]:
    """How the inputs of a block's linear layers are rounded, by the layers' names in it; one in part is as a whole."""
    found = {}
    for name, modules in layers.items():
        quantized = next((solved[m] for m in modules if m in solved), None)
        if quantized is not None:
            rounds = input_rounding(quantized.scheme.activation, quantized.input_scale, device)
            if rounds is not None:
                found[name] = rounds
    return found


def _output_snr(weight: Tensor, rounded: Tensor, stats: InputStats) -> float | None:
    """Signal to noise of the layer's output over the calibration text, in dB; None when nothing was lost."""
    device = stats.moments.device
    loss = gptq_loss(weight.to(device), rounded.to(device), stats)
    return None if loss == 0 else -10 * math.log10(loss)
