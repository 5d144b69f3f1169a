"""Cases of GEMMs: FP8 by rows and by blocks, INT8, 2 to 4 bits with bf16, INT4 with FP8 activations (rows 1 to 5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from benchmarks import shapes
from benchmarks.gpu_case import FEW_BITS, Bodies, Case, Goal, some_rows, spread, to_fp8, to_ints
from torch import Tensor

from octavo.kernels.fp8.gpu import linear as fp8
from octavo.kernels.gemm.gpu import packed_linear, packing
from octavo.kernels.int8.gpu import linear as int8

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
ROWWISE, TENSORWISE, BLOCKWISE, DENSE = "_scaled_mm rows", "_scaled_mm tensor", "_scaled_mm blocks", "matmul bf16"
OUR_FP8, OUR_W4A16, TINYGEMM = "octavo fp8 rows", "octavo W4A16", "_weight_int4pack_mm"
LLAMA = shapes.linears(shapes.CONFIGS["llama-3.1-8b"])
LLAMA_70B = shapes.linears(shapes.CONFIGS["llama-3.3-70b"])
TINY = (24, 192, 256)  # M, N, K of a rehearsal
GROUP = 128


def inputs(m: int, n: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """x [M, K] and w [N, K] in bf16."""
    x, w = torch.randn(m, k, device=device), torch.randn(n, k, device=device)
    return x.bfloat16(), (w * 0.02).bfloat16()


def product(x: Tensor, w: Tensor, rows: Tensor) -> list[Tensor]:
    return [x.double()[rows] @ w.double().T]


def fp8_rows(m: int, n: int, k: int, device: torch.device) -> Bodies:
    x, w = inputs(m, n, k, device)
    (codes, x_scale), (w_codes, w_scale) = to_fp8(x), to_fp8(w)
    packed, rows = fp8.pack(w_codes, w_scale), some_rows(m, device)
    one = torch.ones((), device=device)
    return Bodies(
        run=lambda: [fp8.matmul(codes, x_scale, packed, BF16)],
        expected=lambda: product(codes[rows].double() * x_scale[rows], w_codes.double() * w_scale, slice(None)),
        baselines={
            ROWWISE: lambda: torch._scaled_mm(
                codes, w_codes.T, x_scale, w_scale.T.contiguous(), out_dtype=BF16, use_fast_accum=True
            ),
            TENSORWISE: lambda: torch._scaled_mm(codes, w_codes.T, one, one, out_dtype=BF16, use_fast_accum=True),
            DENSE: lambda: x @ w.T,
        },
        rows=rows,
    )


def fp8_blocks(m: int, n: int, k: int, device: torch.device) -> Bodies:
    x, w = inputs(m, n - n % 128, k, device)
    (codes, x_scale), (w_codes, w_scale) = to_fp8(x, 128), to_fp8(w, 128, 128)
    x_scale = x_scale.T.contiguous().T  # tokens of a group side by side, as `fp8.rounded` has them, and cuBLAS
    packed, rows = fp8.pack(w_codes, w_scale, blocks=True), some_rows(m, device)
    by_rows, by_row = fp8.pack(*to_fp8(w)), to_fp8(x)
    return Bodies(
        run=lambda: [fp8.matmul(codes, x_scale, packed, BF16)],
        expected=lambda: product(
            codes.double() * spread(x_scale, 128), w_codes.double() * spread(w_scale, 128, 128), rows
        ),
        baselines={
            BLOCKWISE: lambda: torch._scaled_mm(codes, w_codes.T, x_scale, w_scale.T, out_dtype=BF16),
            OUR_FP8: lambda: fp8.matmul(*by_row, by_rows, BF16),
            DENSE: lambda: x @ w.T,
        },
        rows=rows,
    )  # fmt: skip


def int8_rows(m: int, n: int, k: int, device: torch.device) -> Bodies:
    x, w = inputs(m, n, k, device)
    x_scale, w_scale = (t.float().abs().amax(1, keepdim=True) / 127 for t in (x, w))
    codes, w_codes = ((t / s).round().to(torch.int8) for t, s in ((x, x_scale), (w, w_scale)))
    packed, rows = int8.pack(w_codes, w_scale), some_rows(m, device)
    return Bodies(
        run=lambda: [int8.matmul(codes, x_scale, packed, BF16)],
        expected=lambda: product(codes.double() * x_scale, w_codes.double() * w_scale, rows),
        baselines={
            "_int_mm (no scales)": lambda: torch._int_mm(codes, w_codes.T),
            DENSE: lambda: x @ w.T,
        },
        rows=rows,
    )


def int8_weights(m: int, n: int, k: int, device: torch.device) -> Bodies:
    x, w = inputs(m, n, k, device)
    scale = (w.float().reshape(n, -1, GROUP).abs().amax(2) / 127).bfloat16()
    codes = (w.double() / spread(scale, GROUP)).round().clamp(-128, 127).to(torch.int8)
    packed, rows = packing.pack(codes, scale, None, GROUP, bits=8), some_rows(m, device)
    return Bodies(
        run=lambda: [packed_linear.linear(x, packed)],
        expected=lambda: product(x, codes.double() * spread(scale, GROUP), rows),
        baselines={DENSE: lambda: x @ w.T},
        rows=rows,
    )


def fp8_weights(m: int, n: int, k: int, device: torch.device) -> Bodies:
    x, w = inputs(m, n, k, device)
    codes, scale = to_fp8(w)
    packed, rows = packing.pack(codes, scale, None, k, bits=8), some_rows(m, device)
    return Bodies(
        run=lambda: [packed_linear.linear(x, packed)],
        expected=lambda: product(x, codes.double() * scale.double(), rows),
        baselines={DENSE: lambda: x @ w.T},
        rows=rows,
    )


@dataclass(frozen=True)
class Ints:
    """How a weight is integers: columns of a group in order, or (act-order) anywhere; zero points or none."""

    bits: int = 4
    group: int = GROUP
    has_zero: bool = False
    act_order: bool = False

    @property
    def num_bytes(self) -> float:
        """Of a weight, as octavo packs it: 3 bits take 4."""
        return (0.25 if self.bits == 2 else 0.5) + (4 if self.has_zero else 2) / self.group


INT4 = Ints()


@dataclass(frozen=True)
class IntWeight:
    """A weight as octavo's kernels read it, and out of what: codes [N, K], scale and zero [N, G], groups [K]."""

    packed: packing.PackedWords
    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    groups: Tensor

    def exact(self) -> Tensor:
        codes, groups = self.codes.double(), self.groups.to(self.codes.device)
        return (codes if self.zero is None else codes - self.zero[:, groups]) * self.scale.double()[:, groups]


def int_weight(w: Tensor, ints: Ints = INT4) -> IntWeight:
    """w [N, K] rounded; what zero points there are move it by up to two steps."""
    codes, scale = to_ints(w, ints.group, ints.bits)
    zero = torch.randint(-2, 3, scale.shape, device=w.device).to(torch.int8) if ints.has_zero else None
    groups = (torch.randperm if ints.act_order else torch.arange)(w.shape[1]) // ints.group
    return IntWeight(packing.pack(codes, scale, zero, groups, bits=ints.bits), codes, scale, zero, groups)


def tinygemm(weight: IntWeight) -> tuple[Tensor, Tensor]:
    """A weight as torch's own int4 operator reads it on a GPU: two codes a byte, scale and zero point of groups."""
    fields = (weight.codes + 8).to(torch.uint8)
    pairs = (fields[:, ::2] << 4) | fields[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), 8)
    shift = torch.zeros_like(weight.scale) if weight.zero is None else -weight.zero * weight.scale
    return packed, torch.stack([weight.scale.T, shift.T], -1).contiguous()


def int_rows(m: int, n: int, k: int, device: torch.device, ints: Ints = INT4) -> Bodies:
    """bf16 tokens; beside torch's operator where it has one, and other weights than INT4 beside that."""
    x, w = inputs(m, n, k, device)
    weight, rows = int_weight(w, ints), some_rows(m, device)
    baselines: dict[str, Callable[[], object]] = {DENSE: lambda: x @ w.T}
    if ints.bits == 4 and not ints.act_order:
        stock = tinygemm(weight) if device.type == "cuda" else None

        def their() -> Tensor:
            assert stock is not None, "the operator for GPUs"
            return torch.ops.aten._weight_int4pack_mm(x, stock[0], ints.group, stock[1])

        baselines[TINYGEMM] = their
    if ints != INT4:
        plain = int_weight(w).packed
        baselines[OUR_W4A16] = lambda: packed_linear.linear(x, plain)
    return Bodies(
        lambda: [packed_linear.linear(x, weight.packed)], lambda: product(x, weight.exact(), rows), baselines, rows=rows
    )


def w4a8(m: int, n: int, k: int, device: torch.device) -> Bodies:
    x, w = inputs(m, n, k, device)
    weight, (x_codes, x_scale), rows = int_weight(w), to_fp8(x), some_rows(m, device)
    return Bodies(
        run=lambda: [packed_linear.matmul(x_codes, weight.packed, x_scale, BF16)],
        expected=lambda: product(x_codes.double() * x_scale, weight.exact(), rows),
        baselines={OUR_W4A16: lambda: packed_linear.linear(x, weight.packed), DENSE: lambda: x @ w.T},
        rows=rows,
    )


OTHER_INTS = {
    "W4A16 in groups of 32": Ints(group=32),
    "W4A16 in groups of 64": Ints(group=64),
    "W4A16 with zero points": Ints(has_zero=True),
    "W4A16 in act-order": Ints(act_order=True),
    "W3A16": Ints(bits=3),
    "W2A16": Ints(bits=2),
}
KINDS = {  # a body, bytes of a weight and of an input, and what a sum may be off
    "fp8 rows": (fp8_rows, 1.0, 1, FEW_BITS),
    "fp8 blocks": (fp8_blocks, 1.0, 1, FEW_BITS),
    "int8 rows": (int8_rows, 1.0, 1, 5e-3),
    "W8A16": (int8_weights, 1 + 2 / GROUP, 2, 5e-3),
    "fp8 weights": (fp8_weights, 1.0, 2, 5e-3),
    "W4A16": (int_rows, shapes.WEIGHT_BYTES["int4"], 2, 5e-3),
    "W4A8": (w4a8, shapes.WEIGHT_BYTES["int4"], 1, FEW_BITS),
    **{kind: (partial(int_rows, ints=ints), ints.num_bytes, 2, 5e-3) for kind, ints in OTHER_INTS.items()},
}


def cases(tiny: bool = False) -> list[Case]:
    """Rows 1 to 5; INT8 has no row in the plan."""
    made: list[Case] = []

    def add(row: str, kind: str, m: int, name: str, goals: list[Goal], first: bool = False) -> None:
        n, k = SHAPES[name]
        m, n, k = (min(m, TINY[0]), *TINY[1:]) if tiny else (m, n, k)
        body, weight, x, tolerance = KINDS[kind]
        made.append(
            Case(
                row, kind, f"M {m}, {name} {n} x {k}", shapes.gemm_bytes(m, n, k, weight, x),
                shapes.gemm_flops(m, n, k),
                lambda device: body(m, n, k, device), tolerance, tuple(goals), first,
            )
        )  # fmt: skip

    _many(add)
    _few(add)
    _int4(add)
    for m in (16, 4096):
        add("-", "int8 rows", m, "gate_up", [Goal(DENSE, 1.5)], m == 4096)
    for kind in ("W8A16", "fp8 weights"):
        add("-", kind, 16, "gate_up", [Goal(DENSE, 1.5)])
    return made


SHAPES = {**LLAMA, "8192": (8192, 8192), "70B gate_up": LLAMA_70B["gate_up"], "70B down": LLAMA_70B["down"]}


def _many(add) -> None:  # type: ignore[no-untyped-def]
    """Rows 1 and 3 with many tokens."""
    square = [Goal(ROWWISE, 0.95), Goal(DENSE, 1.5), Goal("TFLOP/s", 1200)]
    add("1", "fp8 rows", 8192, "8192", square, True)
    for m in (1024, 4096):
        for name in LLAMA:
            add("1", "fp8 rows", m, name, [Goal(ROWWISE, 0.95)], m == 4096 and name == "gate_up")
    for m in (2048, 8192):
        for name in ("gate_up", "down"):
            goals = [Goal(BLOCKWISE, 1.0), Goal(OUR_FP8, 0.8), Goal(DENSE, 1.2)]
            add("3", "fp8 blocks", m, name, goals, m == 2048 and name == "gate_up")


def _few(add) -> None:  # type: ignore[no-untyped-def]
    """Rows 2 and 3 in a step of decoding."""
    for m in (1, 16, 64):
        for name in LLAMA:
            goals = [Goal("copy", 0.8 if name in ("gate_up", "down") else 0.6), Goal(ROWWISE, 1.0), Goal(DENSE, 1.6)]
            add("2", "fp8 rows", m, name, goals, m == 16)
    add("2", "fp8 rows", 16, "70B down", [Goal("copy", 0.8), Goal(ROWWISE, 1.0), Goal(DENSE, 1.6)])
    for m in (4, 64):
        add("3", "fp8 blocks", m, "gate_up", [Goal("copy", 0.8), Goal(BLOCKWISE, 1.0)], m == 64)


def _int4(add) -> None:  # type: ignore[no-untyped-def]
    """Rows 4 and 5."""
    stock = {1: [Goal(TINYGEMM, 1.0)], 16: [Goal(TINYGEMM, 2.0)]}
    for m in (1, 16):
        for name in LLAMA:
            large = name in ("gate_up", "down")
            goals = [Goal(DENSE, 2.6), Goal("copy", 0.65)] if large else []
            add("4", "W4A16", m, name, goals + stock[m], name == "gate_up")
    for m, wanted in ((32, 2.3), (64, 1.6), (128, 1.0), (512, 0.8), (2048, 0.8)):
        for name in ("gate_up", "down"):
            add("4", "W4A16", m, name, [Goal(DENSE, wanted)], name == "gate_up" and m in (64, 2048))
    for m in (128, 512, 2048):
        goals = ([Goal(OUR_W4A16, 1.3)] if m <= 512 else []) + ([Goal(DENSE, 1.2)] if m >= 512 else [])
        add("5", "W4A8", m, "gate_up", goals, m == 512)
    add("5", "W4A8", 16, "gate_up", [])
    for kind in OTHER_INTS:
        add("4", kind, 16, "gate_up", [Goal(DENSE, 2.0)])
    for kind in ("W4A16 in groups of 32", "W4A16 with zero points", "W4A16 in act-order", "W2A16"):
        add("4", kind, 2048, "gate_up", [Goal(DENSE, 0.8)])
