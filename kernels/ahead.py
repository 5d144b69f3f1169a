"""Compiling a launch for a GPU that isn't there, and reading what came out: registers, memory, instructions.

Needs the compiler, assembler and disassembler that Triton's wheel brings, and no GPU. What is compiled is what the
launch would run: the same specialization on types, on multiples of 16 and on arguments that are 1, where the kernel
doesn't rule it out.

`python -m octavo.kernels.ahead OUT.json` compiles the proofs of every room, on all cores: a name for each, and `facts`.
With `--capability 80` or 89 they are compiled for an A100, or for an L40S and a 4090, in the sizes of the card's table.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import chain, repeat
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

from octavo.kernels import sass
from octavo.kernels.launching import tuning
from octavo.kernels.launching.launch import INTERPRETED, Launch, Proof

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
TOGETHER = 8
"""Proofs that are disassembled in one run: a run's start takes as long as compiling a small kernel."""
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


@dataclass(frozen=True)
class Compiled:
    """What a launch became.

    registers     a thread's
    stack         bytes of local memory a thread has: not 0 where registers spill
    shared        bytes of shared memory a block has
    serialized    ptxas gave up overlapping tensor-core instructions (its warning C7510 to C7519)
    overlaps      it may start while the kernel before still runs (`overlap`)
    waits         it waits for that kernel before all else (`sass.waits_first`)
    counts        it counts itself, if at all, after it has stored, and sees what others have (`sass.counts_after`)
    loop          instructions of the loop that its products stand in (`sass.loop_of`); 0: none is in a loop
    instructions  how often each stands in the machine code, by its name there (`sass.Instruction`)
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
        expects = proof.expects
        forbids = proof.forbids
        if capability != 90:
            expects = (r"[A-Z]*MMA\.",) if any("MMA" in pattern for pattern in expects) else ()
            forbids = ()
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
    with tuning.taken(tuning.of_capability(capability)):
        found = {
            f"{room.replace('.gpu.', ' ')}: {name}": (f"octavo.kernels.{room}", name)
            for room in rooms
            for name in importlib.import_module(f"octavo.kernels.{room}").proofs()
        }
    return {name: place for name, place in found.items() if capability >= 89 or not FP8_PRODUCTS.match(name)}


def compile_ahead(launches: Sequence[Launch], capability: int = 90) -> list[Compiled]:
    """Compile launches for a compute capability (90: H100)."""
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted in this process, so none can be compiled")
    built = [_compile(launch, GPUTarget("cuda", capability, 32)) for launch in launches]
    codes = sass.disassemble([sass.text_of(b.asm["cubin"], b.metadata.name) for b, _ in built], capability)
    return [_compiled(of, said, code) for (of, said), code in zip(built, codes, strict=True)]


def _compiled(built: Any, said: str, code: sass.Code) -> Compiled:
    """What to know of a kernel: from its file, from what ptxas said, and from its instructions."""
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory) / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        usage = sass.run("cuobjdump", "--dump-resource-usage", str(cubin))
    resources = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    return Compiled(
        registers=int(resources["REG"]),
        stack=int(resources["STACK"]),
        shared=built.metadata.shared,
        serialized=re.search(r"C751\d", said) is not None,
        overlaps=built.metadata.launch_pdl,
        waits=sass.waits_first(code),
        counts=sass.counts_after(code),
        loop=sass.loop_of(code),
        instructions=Counter(one.name for one in code),
    )


def _compile(launch: Launch, target: GPUTarget) -> tuple[Any, str]:
    """A kernel, and what ptxas said of it, which Triton prints when asked to, and when it compiles.

    Kernels that branch on the target ask Triton's driver for it: while they are compiled, it has just that.
    """
    arguments, options = launch.on(target.arch)
    before = driver._active
    said = io.StringIO()
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
        is_one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or is_one:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
            continue
        signature[parameter.name] = _type(value)
        any_multiple = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
        if not any_multiple and _is_multiple_of_16(value):
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


def check(places: Sequence[tuple[str, str]], capability: int = 90) -> list[dict[str, Any]]:
    """Compile some proofs: the facts of each, and the objections to it."""
    with tuning.taken(tuning.of_capability(capability)):
        found = [importlib.import_module(module).proofs()[name] for module, name in places]
    made = compile_ahead([proof.launch for proof in found], capability)
    return [
        {**of.facts(), "objections": of.objections(proof, capability)} for of, proof in zip(made, found, strict=True)
    ]


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
    places = list(wanted.values())
    together = [places[at : at + TOGETHER] for at in range(0, len(places), TOGETHER)]
    with ProcessPoolExecutor() as pool:
        facts = chain.from_iterable(pool.map(check, together, repeat(args.capability)))
        table = dict(zip(wanted, facts, strict=True))
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(of)}" for name, of in table.items())
    args.out.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
