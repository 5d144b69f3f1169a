"""Machine code of NVIDIA GPUs (SASS), disassembled and read: what waits first, what counts last, how long a loop is.

Needs the disassembler that Triton's wheel brings, and no GPU.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import triton

Code = Sequence["Instruction"]
"""A kernel's instructions, with the functions it calls and what fills its last line."""

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_SIZE = 16  # bytes of an instruction
_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.MULTILINE)
# What reads or writes memory, lets the next kernel in, or goes another way.
_ACTS = re.compile(
    r"LD(?!C)|ST|ATOM|RED(?!UX)|U?TMA|UBLK|CCTL(?!\.E\.PF2)|MEMBAR|PREEXIT|BR(?!EV)|BS|JM|CALL|RET|EXIT|WARPSYNC"
)
_GOES = re.compile(r"BRA|BSSY|CALL|WARPSYNC\.COLLECTIVE")  # to a place that it names


class Instruction(NamedTuple):
    """An instruction of a kernel.

    predicate  what it runs under ("@!P0"); empty: always
    name       the opcode with its modifiers; ".RS" is put behind a wgmma whose first factor lies in registers
    target     the instruction, by its place in the kernel, that this one names as where to go on; None: no other
    """

    predicate: str
    name: str
    target: int | None


def disassemble(kernels: Sequence[bytes], capability: int) -> list[Code]:
    """The instructions of several kernels, each as it lies in memory, in one run: most of a run is the tool's start."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "kernels"
        file.write_bytes(b"".join(kernels))
        listing = run("nvdisasm", "-b", f"SM{capability}{'a' if capability >= 90 else ''}", str(file))
    return read(listing, [len(kernel) // _SIZE for kernel in kernels])


def read(listing: str, lengths: Sequence[int]) -> list[Code]:
    """The instructions of a listing, which has so many of each of some kernels, one behind the other."""
    lines = _LINE.findall(listing)
    if len(lines) != sum(lengths):
        raise RuntimeError(f"nvdisasm lists {len(lines)} instructions that can be read, of {sum(lengths)}")
    ends = list(accumulate(lengths))
    return [
        [_instruction(predicate, name, rest, end - length) for predicate, name, rest in lines[end - length : end]]
        for end, length in zip(ends, lengths, strict=True)
    ]


def _instruction(predicate: str, name: str, operands: str, first: int) -> Instruction:
    place = re.search(r"(?:^| )0x([0-9a-f]+)$", operands) if _GOES.match(name) else None
    target = int(place[1], 16) // _SIZE - first if place else None
    return Instruction(predicate.strip(), name + (".RS" if re.match(r"R\d+, R\d+, gdesc", operands) else ""), target)


def text_of(cubin: bytes, kernel: str) -> bytes:
    """A kernel as it lies in memory: its section of an ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<I20xQQ", cubin, table + i * size) for i in range(count)]  # name, offset, length
    for name, offset, length in sections:
        at = sections[names][1] + name
        if cubin[at : cubin.index(b"\0", at)] == b".text." + kernel.encode():
            return cubin[offset : offset + length]
    raise RuntimeError(f"a cubin without a section .text.{kernel}")


def waits_first(code: Code) -> bool:
    """Whether every thread waits for the kernel before (ACQBULK) ahead of all that reads or writes memory.

    Only a straight line from the entry counts: none goes off it, on to it, or who knows where (BRX, JMX), and the wait
    is under no predicate. On it, arguments (constant memory) may be read, lines prefetched into L2; the next kernel
    isn't let in.
    """
    if any(re.match(r"BRX|JMX", one.name) for one in code):
        return False
    targets = {one.target for one in code}
    for at, one in enumerate(code):
        if at in targets or _ACTS.match(one.name):
            return False
        if one.name == "ACQBULK":
            return not one.predicate
    return False


def counts_after(code: Code) -> bool:
    """Whether every addition to a counter comes behind a barrier and a fence, and drops old copies in L1.

    So the last program to count itself sees what all threads of all programs have stored (`arrivals`).
    """
    acts = [one.name for one in code if re.match(r"STG|BAR|MEMBAR|ATOMG|RED\b|REDG|CCTL\.IVALL", one.name)]
    places = [i for i, name in enumerate(acts) if name.startswith(("ATOMG", "RED"))]
    order = re.compile(r"BAR\.SYNC\S* MEMBAR\.\S*GPU ATOMG\S*\.STRONG\.GPU CCTL\.IVALL")
    return all(i >= 2 and order.fullmatch(" ".join(acts[i - 2 : i + 2])) for i in places)


def loop_of(code: Code) -> int:
    """Instructions of the shortest loop that has some of the tensor core: from a place to the branch back to it.

    Attention has two, of which the one without a mask is the shorter; what goes round a loop of products is longer.
    What a branch forward may leave out, and no product is in, isn't counted: in a persistent GEMM that is a tile's end.
    """
    products = [at for at, one in enumerate(code) if "MMA." in one.name]
    jumps = [(at, one.target) for at, one in enumerate(code) if one.name.startswith("BRA") and one.target is not None]

    def is_busy(begin: int, end: int) -> bool:
        return any(begin <= product < end for product in products)

    skipped = [(begin + 1, end) for begin, end in jumps if end > begin and not is_busy(begin, end)]
    found = []
    for end, begin in ((begin + 1, end) for begin, end in jumps if end <= begin and is_busy(end, begin)):
        left_out = {i for first, last in skipped if begin <= first and last <= end for i in range(first, last)}
        found.append(end - begin - len(left_out))
    return min(found, default=0)


def run(tool: str, *arguments: str) -> str:
    """What one of the tools in Triton's wheel prints."""
    done = subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{tool} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout + done.stderr
