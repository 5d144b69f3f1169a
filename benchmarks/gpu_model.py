"""A kernel's time out of bytes, FLOPs and what the compiler made of it, on a GPU that isn't there.

    time      gap + trips * latency + max(memory, arithmetic, issue)
    memory    max(bytes / copy, bytes of the busiest SM / its rate), its rate = min(64 B a clock, in flight / latency)
    in flight resident blocks * what a block has asked for: its stages of shared memory but one; without stages half its
              registers; never more than the block reads in all (Little's law)
    resident  by registers (65,536 an SM, by 8 a thread), shared memory (227 KiB, 1 KiB of each block the system's),
              2,048 threads, 32 blocks
    issue     instructions of the busiest SM over 4 a clock: all once, those of its loop of products in each turn

Assumptions, to be replaced by what is measured: copy 3.0 TB/s; a loaded memory's latency 0.8 us, 0.35 us
where the kernel before has just written what is read (norms, activations, rope: in L2, though their bytes are counted
as memory's); 1.0 us between two kernels of a graph; 2 trips in a row for each kernel, 3 in attention (lengths, block
table, keys), 5 where shares are merged (counter, shares), 3 more of 0.35 us where it rounds its rows (counter, the row
twice); tensor cores at 800 (bf16) and 1300 TFLOP/s (8 bits); 1.7 GHz. bf16 GEMMs, and an argmax, are the library's:
bytes at 85 % of copy. Kernels don't overlap. Blocks are spread evenly over the SMs, ceil(blocks / 132) on the busiest.
What the host does between steps isn't in it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from torch import Tensor

from octavo.kernels.launching.launch import Launch, cdiv

sys.path.append(str(Path(__file__).parents[1] / "tests/kernels/compile"))
from ahead import compile_ahead

SMS, CLOCK = 132, 1.7e9
COPY, LATENCY, L2_LATENCY, GAP = 3.0e12, 0.8e-6, 0.35e-6, 1.0e-6
SM_RATE = 64 * CLOCK  # bytes/s that an SM can take in
PEAK = {"bf16": 800e12, "fp8": 1300e12, "": float("inf")}
LIBRARY = 0.85  # of copy, for the library's bf16 GEMMs with few tokens
L2_BYTES = 50 << 20
REGISTERS, SHARED, THREADS, BLOCKS = 65536, 227 << 10, 2048, 32


@dataclass(frozen=True)
class Resources:
    """What the compiler made of a launch."""

    registers: int
    shared: int
    instructions: int
    loop: int


@dataclass(frozen=True)
class Work:
    """A kernel of a step. launch None: the library's.

    blocks  that do anything; None: all of the grid
    turns   of its loop, in a block
    trips   to memory, one after another, before there is a result
    near    what it reads was written just before
    """

    name: str
    launch: Launch | None
    num_bytes: float
    flops: float = 0.0
    peak: str = ""
    blocks: int | None = None
    turns: int = 1
    trips: float = 2
    near: bool = False


@dataclass(frozen=True)
class Prediction:
    """Seconds, and what they are made of; bound is which part of the maximum it is."""

    seconds: float
    overhead: float
    bound: str
    resident: int = 0
    waves: float = 0.0
    resources: Resources | None = None


def resident_blocks(resources: Resources, num_warps: int) -> int:
    """How many blocks an SM holds at once."""
    threads = 32 * num_warps
    registers = cdiv(resources.registers, 8) * 8 * threads
    return max(1, min(REGISTERS // registers, SHARED // (resources.shared + 1024), THREADS // threads, BLOCKS))


def in_flight(launch: Launch, resources: Resources, read: float) -> float:
    """Bytes that a block which reads so many has asked for at a time."""
    stages = launch.num_stages
    piped = resources.shared * (stages - 1) / stages if stages > 1 and resources.shared > 4096 else 0
    return min(read, piped or 2 * resources.registers * 32 * launch.num_warps)


def predict(work: Work, compiled: Callable[[Launch], Resources]) -> Prediction:
    """The model of the module's docstring."""
    latency = L2_LATENCY if work.near else LATENCY
    overhead = GAP + work.trips * latency
    if work.launch is None:
        parts = {"memory": work.num_bytes / (COPY * LIBRARY), "arithmetic": work.flops / PEAK[work.peak or "bf16"]}
        bound = max(parts, key=lambda part: parts[part])
        return Prediction(overhead + parts[bound], overhead, bound)
    resources = compiled(work.launch)
    grid = 1
    for size in work.launch.grid:
        grid *= size
    blocks = max(1, work.blocks or grid)
    busiest, resident = cdiv(blocks, SMS), resident_blocks(resources, work.launch.num_warps)
    read = work.num_bytes / blocks
    rate = min(SM_RATE, min(busiest, resident) * in_flight(work.launch, resources, read) / latency)
    executed = resources.instructions + resources.loop * (work.turns - 1)
    parts = {
        "memory": work.num_bytes / COPY,
        "too little in flight": busiest * read / rate,
        "arithmetic": work.flops / PEAK[work.peak] * (busiest * SMS / blocks),
        "issue": busiest * work.launch.num_warps * executed / (4 * CLOCK),
    }
    bound = max(parts, key=lambda part: parts[part])
    return Prediction(overhead + parts[bound], overhead, bound, resident, blocks / (SMS * resident), resources)


def key_of(launch: Launch) -> tuple[Any, ...]:
    """What decides what a launch compiles to."""

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            return str(value.dtype)
        if hasattr(value, "block_shape"):
            return str(value.base.dtype), tuple(value.block_shape)
        if isinstance(value, tuple):
            return tuple(of(field) for field in value)
        if type(value) is int:
            return value == 1, value % 16 == 0, value >= 1 << 31
        return "float" if isinstance(value, float) else value

    constants = {p.name for p in launch.kernel.params if p.is_constexpr}
    arguments = ((name, value if name in constants else of(value)) for name, value in launch.arguments.items())
    return launch.kernel.__name__, launch.num_warps, launch.num_stages, tuple(sorted(arguments, key=lambda a: a[0]))


@dataclass
class Compiler:
    """Compiles each launch once; kept in a file where one is named."""

    file: Path | None = None
    known: dict[str, Resources] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.file and self.file.exists():
            self.known = {key: Resources(*values) for key, values in json.loads(self.file.read_text()).items()}

    def __call__(self, launch: Launch) -> Resources:
        key = f"{triton.__version__} {key_of(launch)}"
        if key not in self.known:
            (made,) = compile_ahead([launch])
            self.known[key] = Resources(made.registers, made.shared, sum(made.instructions.values()), made.loop)
            if self.file:
                rows = {k: [r.registers, r.shared, r.instructions, r.loop] for k, r in self.known.items()}
                self.file.write_text(json.dumps(rows))
        return self.known[key]
