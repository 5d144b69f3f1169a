"""What a case of `kernels` launches, found out on tensors without memory, as `gpu_model` takes it.

A case's inputs are made on `meta` and its kernel is called: launches are written down and not run. The case says how
many bytes are moved at the least, and how many products are made; they are shared out by the sizes of the tensors:

    bytes     of the case, by how much of its inputs a launch is the first to have. On top of them: tensors that an
              earlier launch had or made, and those that are left to a later one, each as a whole
    products  of the case, by how many M, N and K of each launch make, and what fills its tiles up beside them
    near      a launch that has more of what earlier ones had or made than of inputs; all, where a benchmark's inputs
              stay in L2 from one call to the next

What neither grid nor tensors nor machine code tell is written by hand, by kernel: `habits`. Sequences of a case are all
as long as its block table, with as many queries; experts are hit as often as they are where each token chooses evenly.
What time an operator of the library takes is modelled of products alone; another one raises NotImplementedError.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from benchmarks import kernels, shapes
from benchmarks.gpu_case import Case
from benchmarks.gpu_model import L2_BYTES, L2_LATENCY, LATENCY, Work
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.kernels.gemm.gpu import packing
from octavo.kernels.launching.launch import Launch, cdiv
from octavo.kernels.moe.gpu import router

PRODUCT = "matrix product"  # of torch's library
ALLOCATES = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::zeros")
_pack = packing.pack


@dataclass
class Started:
    """A launch, or a product of the library's, and its tensors by what memory they lie in."""

    launch: Launch | None
    tensors: dict[int, Tensor]
    products: float = 0.0

    @property
    def name(self) -> str:
        return self.launch.kernel.__name__.strip("_") if self.launch else PRODUCT

    @property
    def is_idle(self) -> bool:
        """Decoding attention among prompts, which leaves them to another kernel. Its programs ask and end."""
        if self.name != "decode" or self.launch is None:
            return False
        a = flat(self.launch.arguments)
        return bool(a["q"].shape[0] > a["sequences"] * a["QUERIES"])


@dataclass
class Recorder(TorchDispatchMode):
    """What a call starts, and which memory is allocated meanwhile."""

    started: list[Started] = field(default_factory=list)
    made: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        read, found = by_memory(args), by_memory(out if isinstance(out, tuple) else [out])
        fresh, name = {place: t for place, t in found.items() if place not in read}, op.name().split(".")[0]
        self.made |= fresh
        if name == "aten::mm":
            self.started.append(Started(None, read | found, out.numel() * args[0].shape[1]))
        elif (fresh or op._schema.is_mutable) and name not in ALLOCATES:  # no view
            raise NotImplementedError(f"{name} takes time that nothing predicts")
        return out

    def launch(self, launch: Launch) -> None:
        if all(launch.grid):
            self.started.append(Started(launch, by_memory(flat(launch.arguments).values()), products_of(launch)))


def flat(arguments: dict[str, Any]) -> dict[str, Any]:
    """A launch's arguments by name, the fields of named tuples among them."""
    fields: dict[str, Any] = {}
    for value in arguments.values():
        fields |= value._asdict() if hasattr(value, "_asdict") else {}
    return fields | {name: value for name, value in arguments.items() if not hasattr(value, "_asdict")}


def by_memory(values: Any) -> dict[int, Tensor]:
    """Tensors, and those behind descriptors, by the memory they lie in."""
    tensors = (getattr(value, "base", None) if hasattr(value, "block_shape") else value for value in values)
    return {t.untyped_storage()._cdata: t for t in tensors if isinstance(t, Tensor)}


def pack_on_meta(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    groups: Tensor | int,
    bias: Tensor | None = None,
    bits: int = 4,
) -> packing.PackedWords:
    """`packing.pack`, which looks at its numbers, of codes that have none: of a row of zeros, which is then N rows."""
    n, k = codes.shape
    codes, rows = torch.zeros(1, k).to(codes.dtype), torch.zeros(1, scale.shape[1], dtype=scale.dtype)
    zeros = None if zero_point is None else rows.to(torch.int8)
    one = _pack(codes, rows, zeros, groups, bits=bits)
    words, scales = (t.to("meta").repeat_interleave(n, 2) for t in (one.words, one.scale))
    order = None if one.order is None else one.order.to("meta")
    return replace(one, words=words, scale=scales, order=order, bias=bias)


@contextmanager
def on_meta(recorder: Recorder) -> Iterator[None]:
    """Launches are written down, and what asks numbers, or where they are, is answered as on a GPU."""

    def logits(x: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(x, weight.T, out_dtype=torch.float32)

    with ExitStack() as stack:
        stack.enter_context(patch.object(packing, "pack", pack_on_meta))
        stack.enter_context(patch.object(router, "_logits", logits))
        stack.enter_context(patch.object(Launch, "__call__", lambda launch: recorder.launch(launch)))
        yield


def started_by(case: Case) -> Recorder:
    """What a case's kernel, as it is timed, starts."""
    recorder = Recorder()
    with on_meta(recorder):
        bodies = case.make(torch.device("meta"))
        with recorder:
            (bodies.timed or bodies.run)()
    return recorder


def works(case: Case) -> list[Work]:
    """A case's launches in order, with what each moves and computes: see the module's docstring."""
    recorder = started_by(case)
    busy = [one for one in recorder.started if not one.is_idle]
    hit, warm = experts_hit(busy), kernels.is_warm(case, L2_BYTES)
    moved = list(movements(busy, recorder.made))
    inputs, products = sum(m.first for m in moved), sum(one.products for one in busy) or 1.0
    found = [Work("decode", None, 0, trips=1)] * (len(recorder.started) - len(busy))
    for one, m in zip(busy, moved, strict=True):
        h = habits(one.launch, hit) if one.launch else Habits()
        found.append(
            Work(
                one.name, one.launch, case.num_bytes * m.first / inputs + m.again + m.left + h.num_bytes,
                case.flops * one.products / products * h.padding, peak_of(one),
                h.blocks, h.turns, h.trips, warm or h.near or m.first < m.again,
            )
        )  # fmt: skip
    return found


@dataclass(frozen=True)
class Movement:
    """Bytes of a launch's tensors: inputs that none before it had, what one before had or made, and what it leaves."""

    first: int
    again: int
    left: int


def movements(started: list[Started], made: dict[int, Tensor]) -> Iterator[Movement]:
    """What only one launch has of memory that was allocated meanwhile is the output, or is hardly used."""
    uses, known = Counter(place for one in started for place in one.tensors), set[int]()
    for one in started:
        new = {place: t.nbytes for place, t in one.tensors.items() if place not in known}
        first = sum(size for place, size in new.items() if place not in made)
        left = sum(size for place, size in new.items() if place in made and uses[place] > 1)
        yield Movement(first, sum(t.nbytes for place, t in one.tensors.items() if place in known), left)
        known |= one.tensors.keys()


def products_of(launch: Launch) -> float:
    """How many a GEMM makes; 1 of attention, which is alone in its case; 0 of what makes none."""
    name, a = launch.kernel.__name__, launch.arguments
    if name in ("_gemm_swap_ab", "_gemm_persistent"):
        return float(a["M"] * a["N"] * a["K"])
    return float(name in ("_decode", "_rope_decode", "_prefill"))


def peak_of(one: Started) -> str:
    """Which rate of tensor cores, int8's taken for fp8's; attention multiplies 16 bits, and so does the library."""
    if not one.products:
        return ""
    x = one.launch.arguments.get("x") if one.launch else None
    (x,) = by_memory([x]).values() or (None,)
    return "bf16" if x is None or x.element_size() > 1 else "fp8"


@dataclass(frozen=True)
class Habits:
    """What a launch does that its grid and its code don't say; blocks, turns, trips, near as of `Work`.

    padding    products that are made for each that is wanted
    num_bytes  that its own blocks leave to each other
    """

    turns: int = 1
    blocks: int | None = None
    trips: float = 2
    near: bool = False
    padding: float = 1.0
    num_bytes: float = 0.0


def habits(launch: Launch, hit: float = 0.0, length: int = 0) -> Habits:
    """hit: experts, of a mixture; length: tokens of a sequence, where its block table has room for more."""
    name, a = launch.kernel.__name__, flat(launch.arguments)
    if name == "_gemm_swap_ab" and a["order"] is None:
        return Habits(cdiv(a["columns"], a["TILE"]), padding=filled_up(a))
    if name == "_gemm_persistent":
        tiles = cdiv(a["M"], a["BLOCK_M"]) * cdiv(a["N"], a["BLOCK_N"])
        return Habits(cdiv(a["K"], a["BLOCK_K"]) * cdiv(tiles, launch.grid[0]), padding=filled_up(a))
    if name == "_gemm_swap_ab":
        tiles = used_tiles(hit, a["M"], a["BLOCK_M"])
        blocks = tiles * cdiv(a["N"], a["BLOCK_N"])
        return Habits(cdiv(a["columns"], a["TILE"]), blocks, trips=3, padding=tiles * a["BLOCK_M"] / a["M"])
    if name == "_router":  # its parts are merged, and its blocks of tokens; the weight's way from memory is two
        return Habits(trips=5 if launch.grid[0] == 1 else 8, near=True, num_bytes=2 * a["partial"].nbytes)
    if name == "_choose":
        return Habits(trips=6)
    if name == "_prefill":
        return prompts(a)
    return decoding(a, length or a["block_tables"].shape[1] * a["BLOCK_SIZE"]) if "MERGED_ROWS" in a else Habits()


def filled_up(a: dict[str, Any]) -> float:
    """Rows of whole tiles for each of x."""
    return cdiv(a["M"], a["BLOCK_M"]) * a["BLOCK_M"] / a["M"]


def decoding(a: dict[str, Any], length: int) -> Habits:
    """Splits of sequences, merged where there are several; with rope, and where rows are quantized, it waits."""
    seen = min(length, a["window"]) if a["HAS_WINDOW"] else length
    tokens = cdiv(max(cdiv(seen, a["MAX_SPLITS"]), a["MIN_SPLIT_TOKENS"]), a["BLOCK_N"]) * a["BLOCK_N"]
    pairs, parts = a["sequences"] * a["kv_heads"], cdiv(seen, tokens)
    between = parts * pairs * a["GROUP"] * (a["HEAD_DIM"] + 1) * 4 if parts > 1 else 0
    trips = (3 if "q" in a else 5) + 3 * (a["codes"] is not None) * L2_LATENCY / LATENCY + 2 * (parts > 1)
    turns = cdiv(min(tokens, seen), a["BLOCK_N"])
    return Habits(turns, pairs * parts, trips, padding=a["ROWS"] / a["GROUP"], num_bytes=2 * between)


def prompts(a: dict[str, Any]) -> Habits:
    """Prompts of the same length; a block has as many turns as all have on average."""
    queries, tokens = a["q"].shape[0] // a["sequences"], a["BLOCK_M"] // a["GROUP"]
    prefix = a["block_tables"].shape[1] * a["BLOCK_SIZE"] - queries
    seen = shapes.prefill_flops(1, 1, queries, prefix, a["window"] or None) / (4 * queries)
    blocks = a["sequences"] * a["kv_heads"] * cdiv(queries, tokens)
    return Habits(cdiv(round(seen), a["BLOCK_N"]), blocks, 3, padding=a["BLOCK_M"] / (tokens * a["GROUP"]))


def used_tiles(hit: float, pairs: int, block_m: int) -> int:
    """Tiles of rows that a mixture's pairs fill, each expert's on average the same."""
    return round(hit * max(1, cdiv(cdiv(pairs, max(round(hit), 1)), block_m)))


def experts_hit(started: list[Started]) -> float:
    """By what the router of a mixture among them chooses; all tokens go to a shared expert's slices."""
    for one in started:
        if one.launch and one.name in ("router", "route"):
            a = one.launch.arguments
            config = {"num_experts": a["num_experts"] - a["SHARED"], "num_experts_per_tok": a["TOP_K"]}
            return shapes.experts_hit(config, a["num_tokens"]) + float(a["SHARED"])
    return 0.0
