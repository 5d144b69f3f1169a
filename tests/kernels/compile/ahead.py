"""Compile launches for a GPU that isn't there, and read registers, memory and instructions from the result.

Needs the compiler, assembler and disassembler that Triton's wheel brings, and no GPU. What is compiled is what the
launch would run: the same specialization on types, on multiples of 16 and on arguments that are 1, where the kernel
doesn't rule it out.

`python tests/kernels/compile/ahead.py OUT.json` compiles all proofs for an H100 on all cores and writes what `facts`
and `objections` say of each. `--capability 80` or 89 compiles for an A100, or for an L40S and a 4090, in the block
sizes of that card's table.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import sass
import torch
import triton
from proof import Proof
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.kernels.launching import tuning
from octavo.kernels.launching.launch import INTERPRETED, Launch

PROOFS = Path(__file__).parent / "proofs"
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 120: 101_376}
"""Bytes that a block may use, by compute capability."""
TOGETHER = 8
"""Proofs that are disassembled in one run, since starting the disassembler takes as long as compiling a kernel."""
FP8_PRODUCTS = re.compile(r"card_tables .*: .*fp8")
"""Proofs that multiply e4m3, which an A100 can't: its table has no such rows."""
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
    """What the compiler made of a launch.

    registers     a thread's
    stack         bytes of local memory a thread has: not 0 where registers spill
    shared        bytes of shared memory a block has
    serialized    ptxas gave up overlapping tensor-core instructions (its warning C7510 to C7519)
    overlaps      it may start while the kernel before still runs (`launching.dependent_launch`)
    waits         it waits for that kernel before any other memory access (`sass.waits_first`)
    counts        it counts itself, if at all, after it has stored, and then sees what others stored
                  (`sass.counts_after`)
    loop          number of instructions in the loop with the tensor-core products (`sass.loop_of`); 0: no such loop
    instructions  how often each instruction occurs in the machine code, by its name there (`sass.Instruction`)
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
        """Number of instructions whose name matches a regular expression from its start."""
        return sum(n for name, n in self.instructions.items() if re.match(pattern, name))

    @property
    def tensor_cores(self) -> list[str]:
        """The tensor-core instructions by shape, such as "QGMMA.64x16x32", each once."""
        return sorted({".".join(name.split(".")[:2]) for name in self.instructions if re.match(r"[A-Z]*MMA\.", name)})

    def objections(self, proof: Proof, capability: int = 90) -> list[str]:
        """What is wrong with the machine code, in words; empty when it is as it must be.

        A proof names sm_90's instructions. On another card any tensor-core instruction stands for the one that is
        named, and other expectations are dropped.
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


def makers() -> dict[str, Callable[[], dict[str, Proof]]]:
    """Every function `NAME_proofs` of every file in proofs/, by "FILE NAME"."""
    found: dict[str, Callable[[], dict[str, Proof]]] = {}
    for path in sorted(PROOFS.glob("*.py")):
        for name, value in vars(importlib.import_module(f"proofs.{path.stem}")).items():
            if name.endswith("_proofs"):
                found[f"{path.stem} {name.removesuffix('_proofs')}"] = value
    return found


@cache
def proofs(capability: int = 90) -> dict[str, Proof]:
    """All proofs by name, with the block sizes of the capability's card."""
    card = tuning.of_capability(capability)
    with patch.object(tuning, "card_of", lambda _: card):
        found = {f"{maker}: {name}": proof for maker, make in makers().items() for name, proof in make().items()}
    if capability != 90:
        found = {name: proof for name, proof in found.items() if not proof.hopper_only}
    return {name: proof for name, proof in found.items() if capability >= 89 or not FP8_PRODUCTS.match(name)}


def features(proof: Proof) -> set[tuple[str | int, ...]]:
    """What a proof compiles: the kernel, and the storage of each of its tensors that is narrower than a float."""
    name = proof.launch.kernel.__name__
    floats = (torch.float16, torch.bfloat16, torch.float32)
    found: set[tuple[str | int, ...]] = {(name,)}

    def look(value: Any, *place: str | int) -> None:
        if isinstance(value, tuple):
            for i, field in enumerate(value):
                look(field, *place, i)
        elif isinstance(value, TensorDescriptor):
            look(value.base, *place, "described")
        elif isinstance(value, Tensor) and value.dtype not in floats:
            found.add((name, *place, str(value.dtype)))

    for argument, value in proof.launch.arguments.items():
        look(value, argument)
    return found


def sample(found: dict[str, Proof]) -> list[str]:
    """Proofs that together have every feature of each kernel: always the one next that has most of those left.

    One whose features others had before, or have since, is left out.
    """
    of = {name: features(proof) for name, proof in found.items()}
    left = set[tuple[str | int, ...]]().union(*of.values())
    chosen: set[str] = set()
    while left:
        name = max(of, key=lambda name: len(of[name] & left))
        chosen.add(name)
        left -= of[name]
    for name in of:
        others = chosen - {name}
        if name in chosen and of[name] <= set[tuple[str | int, ...]]().union(*(of[other] for other in others)):
            chosen = others
    return [name for name in found if name in chosen]


def compile_ahead(launches: Sequence[Launch], capability: int = 90) -> list[Compiled]:
    """Compile launches for a compute capability (90: H100)."""
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted in this process, so none can be compiled")
    built = [_compile(launch, GPUTarget("cuda", capability, 32)) for launch in launches]
    codes = sass.disassemble([sass.text_of(b.asm["cubin"], b.metadata.name) for b, _ in built], capability)
    return [_compiled(of, said, code) for (of, said), code in zip(built, codes, strict=True)]


def _compiled(built: Any, said: str, code: sass.Code) -> Compiled:
    """Collect the facts from the cubin, from what ptxas printed, and from the instructions."""
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
    """A compiled kernel, and what ptxas printed about it.

    Kernels that branch on the target ask Triton's driver for it, so the driver is replaced while they are compiled.
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
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def specialize(value: Any, path: tuple[int, ...], takes_one: bool, aligns: bool) -> Any:
        """The type of an argument, or of each field of a tuple; notes what is constant and what is a multiple of 16."""
        if isinstance(value, tuple):
            types = [specialize(field, (*path, i), takes_one, aligns) for i, field in enumerate(value)]
            return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
        if value is None or (type(value) is int and value == 1 and takes_one):
            constants[path] = value
            return "constexpr"
        if aligns and _is_multiple_of_16(value):
            attributes[path] = [["tt.divisibility", 16]]
        return _type(value)

    for i, parameter in enumerate(kernel.params):
        value = arguments.get(parameter.name, parameter.default)
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
            continue
        takes_one = not parameter.do_not_specialize
        aligns = not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
        signature[parameter.name] = specialize(value, (i,), takes_one, aligns)
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


def check(names: Sequence[str], capability: int = 90) -> list[dict[str, Any]]:
    """Compile some proofs: the tensor-core instructions of each, and the objections to it."""
    known = proofs(capability)
    made = compile_ahead([known[name].launch for name in names], capability)
    return [
        {"tensor cores": one.tensor_cores, "objections": one.objections(known[name], capability)}
        for name, one in zip(names, made, strict=True)
    ]


def main() -> None:
    """Compile proofs, and write what came out."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sample", action="store_true", help="as few as have every narrow storage of each kernel")
    parser.add_argument("--capability", type=int, default=90, choices=SHARED_MEMORY, help="of the card (default: 90)")
    args = parser.parse_args()
    known = proofs(args.capability)
    wanted = sample(known) if args.sample else list(known)
    together = [wanted[at : at + TOGETHER] for at in range(0, len(wanted), TOGETHER)]
    with ProcessPoolExecutor() as pool:
        facts = chain.from_iterable(pool.map(check, together, repeat(args.capability)))
        table = dict(zip(wanted, facts, strict=True))
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(of)}" for name, of in table.items())
    args.out.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
