"""Tasks of lm-eval on a running server, where lm-eval is installed: its program is run, its results are read.

It asks the server's /v1/completions for log-probabilities (local-completions), so it needs a tokenizer.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.jobs.cost.statistics import NORMAL, Interval

PREFERRED = ("acc_norm", "acc", "exact_match")  # of a task's metrics; otherwise its first one


@dataclass(frozen=True)
class Tasks:
    """Names of tasks, a folder of tasks of one's own, and how many documents of each (None: all)."""

    names: tuple[str, ...] = ()
    folder: Path | None = None
    limit: int | None = None

    def command(self, url: str, model: str, tokenizer: Path | str, output: Path) -> list[str]:
        """The command line that asks the server at `url` and writes results below `output`."""
        arguments = {
            "model": model,
            "base_url": f"{url}/v1/completions",
            "tokenizer": str(tokenizer),
            "tokenizer_backend": "huggingface",
            "tokenized_requests": "True",
            "num_concurrent": "8",
        }
        words = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions"]
        words += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
        words += ["--tasks", ",".join(self.names), "--output_path", str(output)]
        words += ["--include_path", str(self.folder)] if self.folder is not None else []
        return words + (["--limit", str(self.limit)] if self.limit is not None else [])


NO_TASKS = Tasks()


def is_installed() -> bool:
    """Whether lm-eval can be run."""
    return importlib.util.find_spec("lm_eval") is not None


def read_results(output: Path) -> dict[str, Interval]:
    """Of each task its main metric, with its interval out of lm-eval's standard error. Raises ValueError."""
    files = sorted(output.rglob("results_*.json"))
    if not files:
        raise ValueError("lm-eval wrote no results")
    results: dict[str, dict[str, Any]] = json.loads(files[-1].read_text("utf-8"))["results"]
    return {name: found for name, values in results.items() if (found := _main_metric(values)) is not None}


def _main_metric(values: dict[str, Any]) -> Interval | None:
    """`values` has 'acc,none' and 'acc_stderr,none': a metric and the filter that its answers went through."""
    found: dict[str, Interval] = {}
    for key, value in values.items():
        metric, _, through = key.partition(",")
        error = values.get(f"{metric}_stderr,{through}")
        if isinstance(value, int | float) and isinstance(error, int | float):
            width = NORMAL * math.sqrt(2) * error
            most = 1.0 if value <= 1 else math.inf  # shares are what nearly every task reports
            found[metric] = Interval(value, max(value - width, 0.0), min(value + width, most))
    return next((found[name] for name in (*PREFERRED, *found) if name in found), None)


def missing_tasks(names: Sequence[str]) -> str:
    """Why tasks can't be run, for the user."""
    return f"--tasks {' '.join(names)} needs lm-eval in this environment: pip install 'lm-eval[api]'"
