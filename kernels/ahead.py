"""Compiling a launch for a GPU that isn't there, and reading what came out: registers, memory, instructions.

Needs the compiler, assembler and disassembler that Triton's wheel brings, and no GPU. What is compiled is what the
launch would run: the same specialization on types, on multiples of 16 and on arguments that are 1.

`python -m octavo.kernels.ahead OUT.json` compiles the proofs of every room, on all cores: a name for each, and `facts`.
With `--capability 80` or 89 they are compiled for an A100, or for an L40S and a 4090, in the sizes of the card's table.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import re
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.kernels import tables
from octavo.kernels.launch import INTERPRETED, Launch, Proof

ROOMS = (  # modules that have `proofs() -> dict[str, Proof]`
    "fused.gpu.norm",
    "fused.gpu.activation",
    "fused.gpu.embedding",
    "fused.gpu.sums",
    "attention.gpu.decode",
    "attention.gpu.prefill",
    "attention.gpu.rope",
    "attention.gpu.rope_decode",
    "int4.gpu.gemm",
    "int4.gpu.dequantize",
    "int4.gpu.columns",
    "fp8.gpu.quantize",
    "fp8.gpu.few",
    "fp8.gpu.many",
    "int8.gpu.weights",
    "moe.gpu.columns",
    "moe.gpu.fused",
    "moe.gpu.grouped",
    "moe.gpu.int4",
    "moe.gpu.int8",
    "moe.gpu.route",
    "moe.gpu.router",
    "moe.gpu.slices",
    "moe.gpu.stored",
    "sampling.gpu.change",
    "sampling.gpu.draw",
)
HOPPER = (
    "int4.gpu.gemm",
    "fp8.gpu.few",
    "fp8.gpu.many",
    "int8.gpu.weights",
    "moe.gpu.grouped",
    "moe.gpu.int4",
    "moe.gpu.int8",
)
"""Rooms whose proofs have an H100's sizes and instructions; `rows` has every size of any card's table."""
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 120: 101_376}
"""Bytes that a block may use, by compute capability."""
FP8_PRODUCTS = re.compile(r"rows: .*fp8")
TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
# An instruction of a listing: predicate, name, and whether the first factor of a wgmma lies in registers.
_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(\s+R\d+, R\d+, gdesc)?", re.MULTILINE)
# What reads or writes memory, lets the next kernel in, or goes another way.
_ACTS = re.compile(
    r"LD(?!C)|ST|ATOM|RED(?!UX)|U?TMA|UBLK|CCTL(?!\.E\.PF2)|MEMBAR|PREEXIT|B[RS]|JM|CALL|RET|EXIT|WARPSYNC"
)
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Compiled:
    """What a launch became.

    registers     a thread's
    stack         bytes of local memory a thread has: not 0 where registers spill
    shared        bytes of shared memory a block has
    serialized    ptxas gave up overlapping tensor-core instructions (its warning C7510 to C7519)
    overlaps      it may start while the kernel before still runs (`overlap`)
    waits         it waits for that kernel before all else (`waits_first`)
    counts        it counts itself, if at all, after what it has stored, and sees what others have (`counts_after`)
    loop          instructions of the loop that its products stand in (`loop_of`); 0: none is in a loop
    instructions  how often each opcode stands in the machine code, with its modifiers; ".RS" is put behind a wgmma
                  whose first factor lies in registers
    """

    registers: int
    stack: int
    shared: int
    serialized: bool
    overlaps: bool
    waits: bool
    counts: bool
    loop: int
    instructions: Counter[str]

    def count(self, pattern: str) -> int:
        """Instructions whose name begins with a regular expression."""
        return sum(n for name, n in self.instructions.items() if re.match(pattern, name))

    def facts(self) -> dict[str, Any]:
        """What a table keeps of it: tensor-core instructions by their shape, and how many instructions in all."""
        found: Counter[str] = Counter()
        for name, number in self.instructions.items():
            if re.match(r"[A-Z]*MMA\.", name):
                found[".".join(name.split(".")[:2])] += number
        return {
            "registers": self.registers,
            "stack": self.stack,
            "shared": self.shared,
            "waits": self.waits,
            "instructions": sum(self.instructions.values()),
            "tensor cores": dict(sorted(found.items())),
        }

    def objections(self, proof: Proof, capability: int = 90) -> list[str]:
        """What is wrong with it, in words; nothing, where it is as it must be.

        A proof names sm_90's instructions; elsewhere any of the tensor core stands for one of them, and the rest is
        left open.
        """
        expects, forbids = proof.expects, proof.forbids
        if capability != 90:
            expects, forbids = (r"[A-Z]*MMA\.",) if any("MMA" in pattern for pattern in expects) else (), ()
        said = [f"no {pattern}" for pattern in expects if not self.count(pattern)]
        said += [f"{self.count(p)} x {p}" for p in (*forbids, r"STS\.U8", "LDL", "STL") if self.count(p)]
        said += [f"{self.stack} bytes of stack: registers spill"] if self.stack else []
        said += [f"{self.shared} bytes of shared memory"] if self.shared > SHARED_MEMORY[capability] else []
        said += ["tensor-core instructions are serialized"] if self.serialized else []
        said += ["overlaps the kernel before and doesn't wait for it first"] if self.overlaps and not self.waits else []
        said += [] if self.counts else ["counts itself before others see what it stored, or sees old copies of theirs"]
        said += ["overlaps and lets no kernel overlap it"] if self.overlaps and not self.count("PREEXIT") else []
        return said


def proofs(capability: int = 90) -> dict[str, tuple[str, str]]:
    """All proofs of all rooms by name, with the card's table: where each is found, as its module and its name there."""
    rooms = (*(room for room in ROOMS if capability == 90 or room not in HOPPER), "rows")
    with tables.taken(tables.of_capability(capability)):
        found = {
            f"{room.replace('.gpu.', ' ')}: {name}": (f"octavo.kernels.{room}", name)
            for room in rooms
            for name in importlib.import_module(f"octavo.kernels.{room}").proofs()
        }
    return {name: place for name, place in found.items() if capability >= 89 or not FP8_PRODUCTS.match(name)}


def compile_ahead(launch: Launch, capability: int = 90) -> Compiled:
    """Compile a launch for a compute capability (90: H100)."""
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted in this process, so none can be compiled")
    built, said = _compile(launch, GPUTarget("cuda", capability, 32))
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory) / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        usage = _run("cuobjdump", "--dump-resource-usage", str(cubin))
        listing = _run("nvdisasm", "-c", str(cubin))
    resources = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    names = [name + (".RS" if registers else "") for _, name, registers in _LINE.findall(listing)]
    return Compiled(
        registers=int(resources["REG"]),
        stack=int(resources["STACK"]),
        shared=built.metadata.shared,
        serialized=re.search(r"C751\d", said) is not None,
        overlaps=built.metadata.launch_pdl,
        waits=waits_first(listing),
        counts=counts_after(listing),
        loop=loop_of(listing),
        instructions=Counter(names),
    )


def waits_first(listing: str) -> bool:
    """Whether every thread waits for the kernel before (ACQBULK) ahead of all that reads or writes memory.

    Only a straight line from the entry counts: without a label, a branch, a call or an end, and the wait is under no
    predicate. On it, arguments (constant memory) may be read, lines prefetched into L2; the next kernel isn't let in.
    """
    entry = listing[listing.rfind(".text.", 0, listing.find("/*0000*/")) :]
    for predicate, name, _ in _LINE.findall(entry.split("\n.L_")[0]):
        if name == "ACQBULK":
            return not predicate
        if _ACTS.match(name):
            return False
    return False


def counts_after(listing: str) -> bool:
    """Whether every addition to a counter comes behind a barrier and a fence, and drops old copies in L1.

    So the last program to count itself sees what all threads of all programs have stored (`arrivals`).
    """
    acts = [
        name for _, name, _ in _LINE.findall(listing) if re.match(r"STG|BAR|MEMBAR|ATOMG|RED\b|REDG|CCTL\.IVALL", name)
    ]
    places = [i for i, name in enumerate(acts) if name.startswith(("ATOMG", "RED"))]
    order = re.compile(r"BAR\.SYNC\S* MEMBAR\.\S*GPU ATOMG\S*\.STRONG\.GPU CCTL\.IVALL")
    return all(i >= 2 and order.fullmatch(" ".join(acts[i - 2 : i + 2])) for i in places)


def loop_of(listing: str) -> int:
    """Instructions of the shortest loop that has some of the tensor core: from a label to the branch back to it.

    Attention has two, of which the one without a mask is the shorter; what goes round a loop of products is longer.
    What a branch forward may leave out, and no product is in, isn't counted: in a persistent GEMM that is a tile's end.
    """
    labels: dict[str, int] = {}
    products: list[int] = []
    branches: list[tuple[int, str]] = []
    at = 0
    for line in listing.splitlines():
        if named := re.match(r"(\.L_x_\d+):", line):
            labels[named[1]] = at
        elif instruction := _LINE.match(line):
            products += [at] if "MMA." in instruction[2] else []
            branches += [(at, target) for target in re.findall(r"BRA.*`\((\.L_x_\d+)\)", line)]
            at += 1

    def is_busy(begin: int, end: int) -> bool:
        return any(begin <= product < end for product in products)

    jumps = [(begin, labels[target]) for begin, target in branches]
    skipped = [(begin + 1, end) for begin, end in jumps if end > begin and not is_busy(begin, end)]
    found = []
    for end, begin in ((begin + 1, end) for begin, end in jumps if end <= begin and is_busy(end, begin)):
        left_out = {i for first, last in skipped if begin <= first and last <= end for i in range(first, last)}
        found.append(end - begin - len(left_out))
    return min(found, default=0)


def _compile(launch: Launch, target: GPUTarget) -> tuple[Any, str]:
    """A kernel, and what ptxas said of it, which Triton prints when asked to, and when it compiles.

    Kernels that branch on the target ask Triton's driver for it: while they are compiled, it has just that.
    """
    arguments, options = launch.on(target.arch)
    before, said = driver._active, io.StringIO()
    driver.set_active(SimpleNamespace(get_current_target=lambda: target))
    try:
        with knobs.nvidia.scope(), knobs.compilation.scope(), redirect_stdout(said):
            knobs.nvidia.dump_ptxas_log = True
            knobs.compilation.always_compile = True
            built = triton.compile(_source(launch.kernel, arguments), target=target, options=options)
    finally:
        driver._active = before
    if not re.search(r"Used \d+ registers", said.getvalue()):
        raise RuntimeError(
            f"Triton {triton.__version__} doesn't tell what ptxas says: whether it serializes is unknown"
        )
    return built, said.getvalue()


def _source(kernel: Any, arguments: dict[str, Any]) -> ASTSource:
    """The kernel as Triton's own dispatcher would specialize it for these arguments."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, parameter in enumerate(kernel.params):
        value = arguments.get(parameter.name, parameter.default)
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
            continue
        signature[parameter.name] = _type(value)
        if _is_multiple_of_16(value):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"


def _is_multiple_of_16(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.data_ptr() % 16 == 0  # 0 on the meta device
    return isinstance(value, int) and value % 16 == 0


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{tool} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout + done.stderr


def check(place: tuple[str, str], capability: int = 90) -> dict[str, Any]:
    """Compile one proof: its facts, and the objections to it."""
    module, name = place
    with tables.taken(tables.of_capability(capability)):
        proof = importlib.import_module(module).proofs()[name]
    compiled = compile_ahead(proof.launch, capability)
    return {**compiled.facts(), "objections": compiled.objections(proof, capability)}


def main() -> None:
    """Compile all proofs whose name holds what a regular expression says, and write what came out."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default="", metavar="EXPRESSION")
    parser.add_argument("--capability", type=int, default=90, choices=SHARED_MEMORY, help="of the card (default: 90)")
    args = parser.parse_args()
    wanted = {name: place for name, place in proofs(args.capability).items() if re.search(args.only, name)}
    if not wanted:
        parser.error(f"--only {args.only}: no proof's name holds that")
    with ProcessPoolExecutor() as pool:
        table = dict(zip(wanted, pool.map(check, wanted.values(), repeat(args.capability)), strict=True))
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(facts)}" for name, facts in table.items())
    args.out.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
