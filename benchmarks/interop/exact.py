"""Is it the same function? octavo and transformers on one checkpoint, both in float64.

    python -m benchmarks.interop.exact CHECKPOINT ... --hf-python PATH

Where a scheme rounds activations, float32's last bit decides now and then which way, and every layer after that sees
another input: two correct engines drift apart (compare.py's second table). In float64 that happens so seldom that what
is left is the scheme's own rounding, and two engines that compute the same function agree to many digits.

One rule stands in the way: compressed-tensors divides an int8 token by absmax / 127.5, so its largest element, when
negative, lies exactly on a tie (-127.5), which the last bit decides in any precision. The rows "own" show that; the
rows "127" put another divisor into both sides, and nothing else.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import sys
from pathlib import Path

from benchmarks.cpu_vs_peers import cpu_name
from benchmarks.interop.agreement import distance, equal_tokens
from benchmarks.interop.compare import markdown
from benchmarks.interop.peers import MAX_TOKENS, PROMPTS, Peer, ask, questions

OWN, WITHOUT_TIES = None, 127.0
HEAD = ("checkpoint", "divisor", "one side", "other side", "equal tokens", "mean", "99 %", "same top")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+", help="llama or qwen2 checkpoints of octavo quantize")
    parser.add_argument("--hf-python", required=True, help="the python of an environment with compressed-tensors")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the table")
    args = parser.parse_args()
    rows, versions = list[tuple[str, ...]](), dict[str, None]()
    for checkpoint in args.checkpoints:
        for divisor in divisors(checkpoint):
            rows += compare(checkpoint, divisor, args.hf_python, versions)
            write(args.output, rows, versions)


def divisors(checkpoint: Path) -> list[float | None]:
    """Only int8 activations have ties to avoid."""
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))["quantization_config"]
    inputs = [group["input_activations"] for group in config["config_groups"].values()]
    return [OWN, WITHOUT_TIES] if any(i is not None and i["type"] == "int" for i in inputs) else [OWN]


def compare(
    checkpoint: Path, divisor: float | None, hf_python: str, versions: dict[str, None]
) -> list[tuple[str, ...]]:
    asked = questions(checkpoint)
    sides = [
        Peer("octavo", sys.executable, "octavo_float64.py", "float64", divisor=divisor),
        Peer("transformers", hf_python, "transformers_greedy.py", "float64", divisor=divisor),
        Peer("transformers, eager", hf_python, "transformers_greedy.py", "float64", {}, "eager", divisor),
    ]
    answers = {peer.name: ask(peer, checkpoint, asked) for peer in sides}
    versions |= dict.fromkeys(answer.version for answer in answers.values())
    rows = []
    for one, other in itertools.combinations(answers, 2):
        a, b = answers[one], answers[other]
        row = (checkpoint.name, "own" if divisor is None else f"{divisor:g}", one, other)
        if a.error or b.error:
            rows.append((*row, "refused", *(("",) * 3)))
            print(a.error or b.error, file=sys.stderr, flush=True)
            continue
        equal = " ".join(str(equal_tokens(*both)) for both in zip(a.tokens, b.tokens, strict=True))
        d = distance(a, b)
        rows.append((*row, equal, f"{d.mean:.1e}", f"{d.p99:.1e}", f"{d.same_top:.1%}"))
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    return rows


def write(output: Path, rows: list[tuple[str, ...]], versions: dict[str, None]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    date = datetime.date.today().isoformat()
    lines = [
        f"# octavo's checkpoints in float64, {date}",
        "",
        f"Greedy tokens equal from the start, of {MAX_TOKENS}, for each of {len(PROMPTS)} prompts; distance of the",
        "next token's log-probability over four texts, in nats. The divisor is int8 activations', whose scale is",
        "absmax / divisor; compressed-tensors' own is 127.5, with ties that any last bit decides (see exact.py).",
        "",
        *markdown(HEAD, rows),
        "",
        f"- versions: {'; '.join(versions)}",
        f"- processor: {cpu_name()}",
        "- command: `python -m benchmarks.interop.exact CHECKPOINT ...`, flags as in the README beside this folder",
    ]
    (output / f"exact-{date}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
