"""How far two runs of lm-eval over the same tasks are apart: each run's --output_path, written with --log_samples.

    python benchmarks/interop/lm_eval_difference.py RUN RUN

One row for each task: how many log-likelihoods there are, how far apart they are in nats, whether both runs agree on
what is greedy or generate the same text, and the metrics of both.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HEAD = (
    "task",
    "answers",
    "largest",
    "mean",
    "same verdict or text",
    "metrics of the first",
    "of the second",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs=2, metavar="RUN")
    first, second = parser.parse_args().runs
    ours, theirs = samples(first), samples(second)
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for task in sorted(ours.keys() & theirs.keys()):
        cells = difference(ours[task], theirs[task])
        print(f"| {task} | {' | '.join(cells)} | {metrics(first, task)} | {metrics(second, task)} |")


def samples(run: Path) -> dict[str, dict[int, list[Any]]]:
    """Task: number of the document: what the model answered to each of its requests."""
    found: dict[str, dict[int, list[Any]]] = {}
    for path in sorted(run.rglob("samples_*.jsonl")):
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        task = path.name.removeprefix("samples_").rsplit("_", 1)[0]
        found[task] = {line["doc_id"]: [resps[0] for resps in line["resps"]] for line in lines}
    return found


def difference(ours: dict[int, list[Any]], theirs: dict[int, list[Any]]) -> tuple[str, str, str, str]:
    pairs = [both for doc in sorted(ours) for both in zip(ours[doc], theirs[doc], strict=True)]
    same = f"{sum(_text(a) == _text(b) for a, b in pairs)} of {len(pairs)}"
    try:
        gaps = [abs(_logprob(a) - _logprob(b)) for a, b in pairs]
    except ValueError:  # generated text
        return str(len(pairs)), "", "", same
    if not isinstance(pairs[0][0], list):
        same = ""
    return str(len(gaps)), f"{max(gaps):.2g}", f"{sum(gaps) / len(gaps):.2g}", same


def _logprob(answer: Any) -> float:
    """A log-likelihood, alone or with the verdict whether it is greedy."""
    return float(answer[0] if isinstance(answer, list) else answer)


def _text(answer: Any) -> str:
    """The verdict, or the text."""
    return str(answer[1] if isinstance(answer, list) else answer)


def metrics(run: Path, task: str) -> str:
    results = json.loads(sorted(run.rglob("results_*.json"))[-1].read_text("utf-8"))["results"][task]
    named = {key.split(",")[0]: value for key, value in results.items() if "," in key and "stderr" not in key}
    return ", ".join(f"{name} {value:.5g}" for name, value in named.items())


if __name__ == "__main__":
    main()
