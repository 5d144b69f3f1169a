"""A decoder over the ranks of an engine: what of it a rank has, and the operators in which ranks meet.

The decoder itself doesn't change. Behind `o` and `down`, whose columns are cut, each rank's output is one more partial
sum, and `add_rms_norm` adds partial sums anyway; the embedding's and the head's rows are divided. Where each rank has
whole experts (--enable-expert-parallel), what these give is its partial sum. Ranks add the same numbers in the same
order, so their residual streams are equal, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import lcm

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.quantized_activation import ActivationQuant, Hidden
from octavo.kernels.sampling.best import Best, best_of, best_of_parts
from octavo.quant.head_name import head_name
from octavo.quant.linear import Linear, make_linear
from octavo.quant.qparams import QuantizedWeight, Weight
from octavo.quant.scheme import AT_LOAD, CHANNEL, HEAD_INT8, QuantScheme, SchemeError, scheme_at_load
from octavo.quant.shard import pad, unit_of
from octavo.quant.target import Target
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.layers import Head
from octavo.runtime.model.names import layer_linears
from octavo.runtime.model.operators import Ops
from octavo.runtime.model.sources import CheckpointSource, DummySource, LoadError
from octavo.runtime.model.spec import DecoderSpec
from octavo.runtime.model.stages import Stage
from octavo.runtime.parallel.group import Group
from octavo.runtime.parallel.layout import ParallelLayout, RankLayout, Sizes, Units


@dataclass(frozen=True)
class Rank:
    """One of an engine's ranks: the shares of all of them, and this one's ends of two groups.

    engine  all ranks, among which stages hand on the residual stream
    group   those that divide the same layers, and add up
    """

    layout: ParallelLayout
    engine: Group
    group: Group

    @property
    def own(self) -> RankLayout:
        return self.layout.ranks[self.engine.rank]

    @property
    def stage(self) -> Stage:
        """Each rank takes over from the one in its place in the stage before, which has a higher number."""
        own = self.own
        source = None if own.is_first else own.rank + self.layout.tp
        target = None if own.is_last else own.rank - self.layout.tp
        return Stage(own.layers, source, target, self.engine)

    def describe(self) -> list[str]:
        """A line for each rank, for the table at start."""
        return [f"{rank}; {self.engine.body}" for rank in self.layout.ranks]


def choose_rank(
    config: EngineConfig,
    spec: DecoderSpec,
    source: CheckpointSource | DummySource,
    group: Group,
    target: Target,
    notes: list[str],
) -> Rank | None:
    """This rank's share of a model; None where there is one rank. Raises LoadError and LayoutError."""
    expert_parallel = config.parallel.enable_expert_parallel
    if expert_parallel and spec.moe is None:
        raise LoadError(f"--enable-expert-parallel: {spec.architecture} has no experts; without the flag it is served")
    pp = config.parallel.pipeline_parallel_size
    tp = group.size // pp
    if tp == 1 and expert_parallel:
        notes.append("--enable-expert-parallel changes nothing: one rank has all experts; -tp N divides them")
    if group.size == 1:
        return None
    if spec.states:
        raise LoadError(
            f"{flags_of(config, group)}: {spec.states[0].title}, which {spec.architecture} has, is not divided over "
            "ranks; one rank works, and so does -dp"
        )
    if target.device.type != "cpu":
        raise LoadError(
            f"{flags_of(config, group)}: ranks of an engine compute on CPUs only, and this is {target.device}; "
            "--device cpu works, and so does one rank"
        )
    units = _units_of(config, spec, source)
    sizes = _sizes_of(config, spec, source, target.dtype) if pp > 1 else None
    layout = ParallelLayout.build(spec, tp, units, pp=pp, sizes=sizes, expert_parallel=expert_parallel)
    notes += layout.notes()
    return Rank(layout, group, group.part(tp))


def flags_of(config: EngineConfig, group: Group) -> str:
    """What asks for the ranks of a group."""
    pp = config.parallel.pipeline_parallel_size
    said = {"-tp": group.size // pp, "-pp": pp}
    return " ".join(f"{flag} {size}" for flag, size in said.items() if size > 1)


def _sizes_of(
    config: EngineConfig, spec: DecoderSpec, source: CheckpointSource | DummySource, dtype: torch.dtype
) -> Sizes:
    """By what the files say: some weights are dequantized at load, which is not known yet."""

    def num_bytes(module: str, rows: int, columns: int, otherwise: QuantScheme | None) -> int:
        scheme = source.scheme(module) or otherwise
        bits = 8 * dtype.itemsize if scheme is None else scheme.weight.bits
        return rows * columns * bits // 8

    layers = [
        sum(
            num_bytes(module, rows, parts.in_features, _made_at_load(config, parts.in_features))
            for parts in layer_linears(spec, index, source.prefix, source.has).values()
            for module, rows in parts.modules.items()
        )
        for index in range(len(spec.layers))
    ]
    int8 = HEAD_INT8 if config.lm_head_dtype == "int8" else None
    head = num_bytes(head_name(source.prefix), spec.vocab_size, spec.hidden_size, int8)
    return Sizes(tuple(layers), head)


def _units_of(config: EngineConfig, spec: DecoderSpec, source: CheckpointSource | DummySource) -> Units:
    """Columns that share a scale in each layer that is cut there."""
    units = {"down": 1, "experts": 1, "shared": 1}
    for index in range(len(spec.layers)):
        for name, parts in layer_linears(spec, index, source.prefix, source.has).items():
            owner = name.partition(".")[0]
            if not name.endswith("down"):
                continue
            (module,) = parts.modules
            scheme = source.scheme(module) or _made_at_load(config, parts.in_features)
            units[owner] = lcm(units[owner], unit_of(scheme, "columns"))
    return Units(units["down"], units["experts"], units["shared"])


def _made_at_load(config: EngineConfig, columns: int) -> QuantScheme | None:
    """What --dtype fp8, int8 or int4 makes of a layer."""
    try:
        return scheme_at_load(config.dtype, columns) if config.dtype in AT_LOAD else None
    except SchemeError:  # which whoever quantizes raises with the layer's name
        return None


def over_ranks(ops: Ops, rank: Rank, spec: DecoderSpec) -> Ops:
    """The operators of one rank: as those of a device, with sums over all ranks."""
    group = rank.group
    first, stop = rank.own.vocabulary

    def embed(token_ids: Tensor, table: Tensor, factor: float) -> Tensor:
        """One rank has a token's row; the others add zeros."""
        is_own = (token_ids >= first) & (token_ids < stop)
        rows = ops.embed(torch.where(is_own, token_ids - first, 0), table, factor).float()
        return group.all_reduce(rows.masked_fill_(~is_own.unsqueeze(1), 0.0)).to(table.dtype)

    def add_rms_norm(
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        eps: float,
        after: Tensor | None = None,
        multiplier: float = 1.0,
        input_quant: ActivationQuant | None = None,
    ) -> tuple[Hidden, Tensor]:
        total = group.all_reduce(x.float().contiguous()).to(residual.dtype)
        return ops.add_rms_norm(total, residual, weight, eps, after, multiplier, input_quant)

    def of_driver(x: Tensor) -> Tensor:
        return group.all_reduce(x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)).to(x.dtype)

    recordable = ops.recordable and group.recordable
    name = f"{ops.name}, {group.size} ranks"
    bound = replace(ops, name=name, embed=embed, add_rms_norm=add_rms_norm, recordable=recordable, of_driver=of_driver)
    return _norming_over_ranks(bound, rank, spec) if spec.qk_norm == "width" else bound


def _norming_over_ranks(ops: Ops, rank: Rank, spec: DecoderSpec) -> Ops:
    """For norms of queries and keys over all heads, whose sums of squares are those of all ranks."""
    counts = float(rank.own.owns_kv_heads)  # each KV head once
    mixer = spec.layers[0].mixer  # as of all layers of a model that is divided
    num_heads = torch.tensor([spec.num_heads, mixer.num_kv_heads])

    def rope_and_attention(
        qkv: Tensor,
        step: StepInputs,
        cache: LayerCache,
        shape: AttentionShape,
        cos_sin: Tensor | None,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        input_quant: ActivationQuant | None = None,
    ) -> Hidden:
        assert q_norm is not None
        assert k_norm is not None
        query, key, value = torch.split(qkv.float(), [len(q_norm), len(k_norm), len(k_norm)], dim=1)
        squares = torch.stack([query.square().sum(1), key.square().sum(1) * counts], dim=1)
        mean = rank.group.all_reduce(squares) / num_heads / mixer.head_dim
        factors = torch.rsqrt(mean + eps)
        normed = torch.cat([query * factors[:, :1] * q_norm, key * factors[:, 1:] * k_norm, value], dim=1)
        return ops.rope_and_attention(normed.to(qkv.dtype), step, cache, shape, cos_sin, None, None, eps, input_quant)

    return replace(ops, rope_and_attention=rope_and_attention)


class RoundedTogether(Linear):
    """A linear layer over this rank's columns, whose input is rounded token by token, as that of the whole layer is.

    The scale is that of the largest number in the columns of all ranks, which stands in columns that were added to the
    input; those of the weight are zeros.
    """

    def __init__(self, own: Linear, added: int, group: Group) -> None:
        super().__init__(own.scheme, own.parts, own.bias, own.out_dtype)
        self.whole_bias = own.whole_bias
        self._added = added
        self._group = group

    def forward(self, x: Hidden, step: StepInputs | None) -> Tensor:
        assert isinstance(x, Tensor)
        largest = torch.zeros(self._group.size, len(x))
        largest[self._group.rank] = x.abs().amax(1)
        of_all = self._group.all_reduce(largest).amax(0).to(x.dtype)
        out = super().forward(torch.cat([x, of_all.unsqueeze(1).expand(-1, self._added)], 1), None)
        return self.adapted(out, x, step)


def make_part(weights: list[Weight], biases: list[Tensor | None], target: Target, rank: Rank) -> Linear:
    """A layer over this rank's columns, whose outputs are summed over ranks, in float32, and rounded only then.

    All ranks run it at the same time, since they may meet to round its input.
    """
    (weight,) = weights
    activation = weight.scheme.activation if isinstance(weight, QuantizedWeight) else None
    if activation is None or activation.has_stored_scale or activation.granularity != CHANNEL:
        return make_linear(weights, biases, target, out_dtype=torch.float32)
    assert isinstance(weight, QuantizedWeight)
    padded, added = pad(weight)
    return RoundedTogether(make_linear([padded], biases, target, out_dtype=torch.float32), added, rank.group)


class RankHead:
    """A `Head` over this rank's rows of the vocabulary, whose logits the driver gathers."""

    def __init__(self, own: Head, rank: Rank) -> None:
        self.linear: Linear = own.linear
        self._own = own
        self._group = rank.group
        self._first = rank.own.vocabulary[0]
        of_stage = rank.layout.ranks[: rank.group.size]
        self._widths = [stop - begin for begin, stop in (each.vocabulary for each in of_stage)]

    def forward(self, hidden: Hidden, step: StepInputs | None) -> Tensor:
        """[L, vocab] float32 on the driver; this rank's columns of it, filled up with zeros, on the others."""
        own = self._own.forward(hidden, step)
        widest = F.pad(own, (0, max(self._widths) - own.shape[1])).contiguous()
        gathered = self._group.gather(widest)
        if gathered is None:
            return widest
        return torch.cat([part[:, :width] for part, width in zip(gathered, self._widths, strict=True)], dim=1)

    def best(self, hidden: Hidden, step: StepInputs | None) -> Best:
        """The best of each row on the driver, of this rank's columns on the others: 8 bytes a row and rank."""
        own = best_of(self._own.forward(hidden, step))
        own = Best(own.ids + self._first, own.logits)
        sent = torch.from_numpy(np.stack([own.ids.astype(np.int32).view(np.float32), own.logits]))
        gathered = self._group.gather(sent)
        if gathered is None:
            return own
        of_ranks = gathered.numpy()
        return best_of_parts(of_ranks[:, 0].view(np.int32).astype(np.int64), of_ranks[:, 1])
