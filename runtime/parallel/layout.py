"""Which rank of an engine holds what of a model: heads, inner columns, rows of the vocabulary, experts, layers.

Pure Python: a DecoderSpec and the units of its weights in, ranges out. Heads and units are never divided where that can
be helped, and shares are as even as whole units go, so that a rank count need not divide anything: 9 query heads over 2
ranks are 6 and 3. What can't be is refused with what works.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from octavo.quant.shard import UNIT, WHOLE, Range, Shard
from octavo.runtime.model.spec import AttentionSpec, DecoderSpec, LatentSpec

LEAST_UNIT = 8  # columns or rows: narrower groups of integers are not multiplied as integers by any kernel
UNEVEN = 1.25  # a note says where the largest share is more than so many times the smallest
SHARES = {
    "query_heads": "query heads",
    "inner": "inner columns",
    "expert_inner": "expert inner columns",
    "shared_inner": "shared inner columns",
    "experts": "experts",
}


class LayoutError(ValueError):
    """A model that can't be divided over so many ranks; the message says what works."""


@dataclass(frozen=True)
class Units:
    """Columns of each MLP that stay together: those that share a scale in the layers which are cut there."""

    inner: int = UNIT["columns"]
    expert_inner: int = UNIT["columns"]
    shared_inner: int = UNIT["columns"]


@dataclass(frozen=True)
class Sizes:
    """Bytes that a step reads: of each layer, and of the output head. Stages are made equal by these."""

    layers: tuple[int, ...]
    head: int = 0


@dataclass(frozen=True)
class RankLayout:
    """The share of one rank, as ranges. Of its layers it has these heads, columns and experts.

    place                  its number among the ranks that have the same layers
    query_heads, kv_heads  every query head finds its KV head here; each KV head here serves equally many query heads
    owns_kv_heads          False where another rank has the same KV head, and counts it
    inner                  columns between gate_up and down; expert_inner, shared_inner: the same of each expert, and of
                           the expert that every token goes to; (0, 0) where the model has none
    vocabulary             rows of the embedding, if its layers are the first, and of the output head, if the last
    experts                those that it has, or of which it has columns
    whole_experts          it has all columns of these, and other ranks have the other experts
    layers                 those of its stage; is_first, is_last: whether the model's first and last are among them
    """

    rank: int
    size: int
    place: int
    head_dim: int
    query_heads: Range
    kv_heads: Range
    owns_kv_heads: bool
    inner: Range
    expert_inner: Range
    shared_inner: Range
    vocabulary: Range
    experts: Range
    whole_experts: bool
    layers: Range
    is_first: bool
    is_last: bool

    def __str__(self) -> str:
        of_experts = "experts" if self.whole_experts else "expert_inner"
        names = ("query_heads", "kv_heads", "inner", of_experts, "shared_inner", "vocabulary")
        found = {name: getattr(self, name) for name in names}
        said = [f"{name.replace('_', ' ')} {b}-{e}" for name, (b, e) in found.items() if e > b]
        return f"rank {self.rank} of {self.size}: {', '.join([*self._stage(), *said])}"

    def _stage(self) -> list[str]:
        """What of a model it has beside other stages; nothing where there are none."""
        if self.is_first and self.is_last:
            return []
        layers = "layers {}-{}".format(*self.layers)
        return ["embedding"] * self.is_first + [layers] + ["output head"] * self.is_last

    def shards(self, kind: str, spec: DecoderSpec) -> tuple[Shard, ...]:
        """What this rank reads of each module of a linear layer, by the layer's name: 'qkv', 'experts.3.down'."""
        if kind == "qkv":
            return self._qkv(spec)
        mixer = spec.layers[0].mixer
        if kind == "o":
            size = mixer.value_dim if isinstance(mixer, LatentSpec) else self.head_dim
            return (Shard("columns", (_times(self.query_heads, size),), self.place == 0),)
        if isinstance(mixer, LatentSpec) and kind in ("qkv_a", "q_b"):
            queries = Shard("rows", (_times(self.query_heads, mixer.query_dim),))
            if kind == "q_b":
                return (queries,)
            return (queries if mixer.q_rank is None else WHOLE), WHOLE
        owner, _, name = kind.rpartition(".")
        if owner.startswith("experts") and self.whole_experts:
            return (WHOLE,) if name == "down" else (WHOLE, WHOLE)
        own = self.expert_inner if owner.startswith("experts") else self.shared_inner if owner else self.inner
        if name == "down":
            return (Shard("columns", (own,), self.place == 0),)
        if spec.fused_mlp and not owner:
            return (Shard("rows", (own, _behind(own, spec.layers[0].intermediate_size))),)
        return (Shard("rows", (own,)),) * 2

    def _qkv(self, spec: DecoderSpec) -> tuple[Shard, ...]:
        query = _times(self.query_heads, self.head_dim)
        key = _times(self.kv_heads, self.head_dim)
        if not spec.fused_qkv:
            return Shard("rows", (query,)), Shard("rows", (key,)), Shard("rows", (key,))
        width = spec.num_heads * self.head_dim
        kv_width = spec.layers[0].mixer.num_kv_heads * self.head_dim
        return (Shard("rows", (query, _behind(key, width), _behind(key, width + kv_width))),)

    @property
    def rows_of_vocabulary(self) -> Shard:
        return Shard("rows", (self.vocabulary,))


@dataclass(frozen=True)
class ParallelLayout:
    """The shares of all ranks of an engine: of each of `pp` stages, `tp` ranks one behind the other.

    The first ranks have the last layers: rank 0 samples, and is where the logits are.
    """

    tp: int
    pp: int
    ranks: tuple[RankLayout, ...]

    @classmethod
    def build(
        cls,
        spec: DecoderSpec,
        tp: int,
        units: Units | None = None,
        *,
        pp: int = 1,
        sizes: Sizes | None = None,
        expert_parallel: bool = False,
    ) -> ParallelLayout:
        """Raises LayoutError with the numbers of ranks that work.

        sizes: None: all layers are equal, and the head is nothing.
        expert_parallel: each rank has whole experts instead of columns of all of them.
        """
        units = units or Units()
        expert_parallel = expert_parallel and spec.moe is not None
        _refuse_uneven(spec, tp, pp)
        most = _most_ranks(spec, expert_parallel)
        if tp > most.count:
            works = "" if tp > _most_ranks(spec, True).count else f", and {tp} with --enable-expert-parallel"
            raise LayoutError(f"-tp {tp}: the model has {most.why}; 1 to {most.count} work{works}")
        if pp > len(spec.layers):
            raise LayoutError(f"-pp {pp}: the model has {len(spec.layers)} layers; 1 to {len(spec.layers)} work")
        shares = [_shares(spec, tp, rank, units, expert_parallel) for rank in range(tp)]
        stages = even_stages(sizes or Sizes((1,) * len(spec.layers)), pp)
        ranks = [
            share(number * tp + place, tp * pp, layers)
            for number, layers in enumerate(reversed(stages))
            for place, share in enumerate(shares)
        ]
        return cls(tp, pp, tuple(ranks))

    def notes(self) -> list[str]:
        """What a person must know: shares so uneven that the largest one makes the step."""
        said = []
        for name, what in SHARES.items():
            sizes = [end - begin for begin, end in (getattr(rank, name) for rank in self.ranks)]
            if min(sizes) and max(sizes) > UNEVEN * min(sizes):
                instead = ", and --enable-expert-parallel keeps experts whole" if name == "expert_inner" else ""
                said.append(
                    f"-tp {self.tp}: ranks have {min(sizes)} to {max(sizes)} {what}, and a step takes as long as the "
                    f"largest share; another -tp may divide them more evenly{instead}"
                )
        return said


def even_share(length: int, rank: int, size: int, unit: int = 1) -> Range:
    """The range of one of `size` ranks, in whole units as evenly as they go: the first ranks have the larger shares.

    Where there are fewer units than ranks, units are halved until there are enough.
    """
    while -(-length // unit) < size and unit > LEAST_UNIT:
        unit = LEAST_UNIT if unit % 2 else max(unit // 2, LEAST_UNIT)
    units = -(-length // unit)
    if units < size:
        raise ValueError(f"{length} in units of {unit} are too few for {size} ranks")
    share, rest = divmod(units, size)
    begin = rank * share + min(rank, rest)
    stop = begin + share + (rank < rest)
    return begin * unit, min(stop * unit, length)


def even_stages(sizes: Sizes, count: int) -> list[Range]:
    """Consecutive layers for each stage: the largest stage is as small as can be, and the last one, which samples too,
    has as few layers as that allows.
    """
    num_layers = len(sizes.layers)
    sums = {sum(sizes.layers[begin:stop]) for begin in range(num_layers) for stop in range(begin + 1, num_layers + 1)}
    limits = sorted(sums | {sum(sizes.layers[begin:]) + sizes.head for begin in range(num_layers)})
    least = bisect_left(limits, True, key=lambda limit: bool(_stages_within(sizes, count, limit)))
    return _stages_within(sizes, count, limits[least])


def _stages_within(sizes: Sizes, count: int, limit: int) -> list[Range]:
    """Stages of at most so many bytes, each filled before the next one; none where they can't be so small."""
    stages: list[Range] = []
    begin = 0
    for left in range(count - 1, 0, -1):
        stop = begin
        total = 0
        while stop < len(sizes.layers) - left and total + sizes.layers[stop] <= limit:
            total += sizes.layers[stop]
            stop += 1
        if stop == begin:
            return []
        stages.append((begin, stop))
        begin = stop
    is_small = sum(sizes.layers[begin:]) + sizes.head <= limit
    return [*stages, (begin, len(sizes.layers))] if is_small else []


def _refuse_uneven(spec: DecoderSpec, tp: int, pp: int) -> None:
    """Layers of a stage are divided alike, and a stage has the residual stream of the one before alone."""
    flag = f"-tp {tp}" if tp > 1 else f"-pp {pp}"
    if tp * pp > 1 and spec.reads_more is not None:
        raise LayoutError(f"{flag}: {spec.architecture} has {spec.reads_more}; one rank works, and -dp has several")
    sizes = {(x.mixer.num_kv_heads, x.mixer.head_dim, x.intermediate_size) for x in spec.layers}
    if tp > 1 and spec.moe is not None and spec.moe.beside_mlp:
        raise LayoutError(
            f"{flag}: {spec.architecture} has experts beside an MLP, which are not divided; -pp and -dp have several "
            "whole ranks"
        )
    from_keys = any(isinstance(x.mixer, AttentionSpec) and x.mixer.values_are_keys for x in spec.layers)
    if tp > 1 and (len(sizes) > 1 or from_keys):
        what = "values made of keys" if from_keys else "layers of several sizes"
        raise LayoutError(
            f"{flag}: {spec.architecture} has {what}, which are not divided; -pp and -dp have several whole ranks"
        )


@dataclass(frozen=True)
class _Most:
    count: int
    why: str


def _most_ranks(spec: DecoderSpec, expert_parallel: bool) -> _Most:
    """The largest tp, and what of the model allows no more."""
    limits = [
        _Most(spec.num_heads, f"{spec.num_heads} query heads"),
        _Most(_units(spec.vocab_size), f"{spec.vocab_size} tokens, and a rank takes {LEAST_UNIT} at least"),
    ]
    for name, width in _widths(spec).items():
        if width and not (name == "expert_inner" and expert_parallel):
            what = "experts" if name == "expert_inner" else "MLPs"
            limits.append(_Most(_units(width), f"{what} of {width} columns, and a rank takes {LEAST_UNIT} at least"))
    if spec.moe is not None and expert_parallel:
        limits.append(_Most(spec.moe.num_experts, f"{spec.moe.num_experts} experts, and a rank takes one at least"))
    return min(limits, key=lambda limit: limit.count)


def _units(length: int) -> int:
    return max(1, length // LEAST_UNIT)


def _widths(spec: DecoderSpec) -> dict[Literal["inner", "expert_inner", "shared_inner"], int]:
    """Columns of each kind of MLP that the model has; 0: it has none."""
    moe = spec.moe
    return {
        "inner": 0 if all(layer.sparse for layer in spec.layers) else spec.layers[0].intermediate_size,
        "expert_inner": 0 if moe is None else moe.intermediate_size,
        "shared_inner": 0 if moe is None else moe.shared_intermediate_size or 0,
    }


def _shares(
    spec: DecoderSpec, tp: int, rank: int, units: Units, expert_parallel: bool
) -> Callable[[int, int, Range], RankLayout]:
    """The share of a rank of a stage, but for its number and its layers."""
    mixer = spec.layers[0].mixer
    query_heads, kv_heads, owns = _heads(spec.num_heads, mixer.num_kv_heads, rank, tp)
    widths = _widths(spec)
    whole = {"expert_inner"} if expert_parallel else set()
    inner = {
        name: even_share(width, rank, tp, getattr(units, name)) if width and name not in whole else (0, width)
        for name, width in widths.items()
    }
    experts = (0, 0) if spec.moe is None else (0, spec.moe.num_experts)
    if expert_parallel:
        experts = even_share(experts[1], rank, tp)
    vocabulary = even_share(spec.vocab_size, rank, tp, UNIT["rows"])

    def share(number: int, size: int, layers: Range) -> RankLayout:
        return RankLayout(
            number,
            size,
            rank,
            mixer.head_dim,
            query_heads,
            kv_heads,
            owns,
            **inner,
            vocabulary=vocabulary,
            experts=experts,
            whole_experts=expert_parallel,
            layers=layers,
            is_first=layers[0] == 0,
            is_last=layers[1] == len(spec.layers),
        )

    return share


def _heads(num_heads: int, num_kv_heads: int, rank: int, tp: int) -> tuple[Range, Range, bool]:
    """(query heads, KV heads, whether it counts these) of a rank.

    Up to as many ranks as KV heads: whole KV heads with all of their queries. More: ranks are dealt out to KV heads,
    and those of one KV head each have it, and a share of its queries.
    """
    queries = num_heads // num_kv_heads
    if tp <= num_kv_heads:
        kv_heads = even_share(num_kv_heads, rank, tp)
        return _times(kv_heads, queries), kv_heads, True
    for head in range(num_kv_heads):
        first, stop = even_share(tp, head, num_kv_heads)
        if first <= rank < stop:
            own = even_share(queries, rank - first, stop - first)
            return _behind(own, head * queries), (head, head + 1), rank == first
    raise AssertionError("every rank has a KV head")


def _times(each: Range, factor: int) -> Range:
    begin, stop = each
    return begin * factor, stop * factor


def _behind(each: Range, offset: int) -> Range:
    begin, stop = each
    return begin + offset, stop + offset
