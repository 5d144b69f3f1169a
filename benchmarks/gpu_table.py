"""What was measured of a case, and how it is written: a JSON file with everything, a Markdown table to read."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_case import Case, Goal


@dataclass
class Result:
    """A row of the table.

    us, spread  of a call: the median, and the width of the middle 80 %, in shares of it
    warm        all sets of inputs fit into three L2 caches: the time is not the memory's
    error       ||out - exact|| / ||exact||; NaN where something wasn't finite
    baselines   microseconds of each; or why there is none
    goals       (what, wanted, value, whether it is reached); value None where it couldn't be measured
    failure     why there is no time, or why it is worth nothing
    """

    row: str
    kernel: str
    shape: str
    us: float | None = None
    spread: float | None = None
    warm: bool = False
    gb_per_s: float | None = None
    tflops: float | None = None
    of_copy: float | None = None
    error: float | None = None
    tolerance: float | None = None
    baselines: dict[str, float | str] = field(default_factory=dict)
    goals: list[tuple[str, str, float | None, bool]] = field(default_factory=list)
    failure: str | None = None

    @property
    def name(self) -> str:
        return f"{self.row} {self.kernel}, {self.shape}"


def derive(result: Result, case: Case, copy: float) -> None:
    """Rates, shares and goals out of a time; copy in GB/s."""
    assert result.us
    result.gb_per_s = case.num_bytes / result.us / 1e3
    result.tflops = case.flops / result.us / 1e6 if case.flops else None
    result.of_copy = result.gb_per_s / copy
    for goal in case.goals:
        value = value_of(result, goal)
        reached = value is not None and (value <= goal.wanted if goal.against == "us" else value >= goal.wanted)
        result.goals.append((goal.against, str(goal), value, reached))


def value_of(result: Result, goal: Goal) -> float | None:
    """What a goal is about: of a baseline, how many times as fast."""
    own = {"copy": result.of_copy, "us": result.us, "TFLOP/s": result.tflops}
    if goal.against in own:
        return own[goal.against]
    base = result.baselines.get(goal.against)
    return base / result.us if isinstance(base, float) and result.us else None


def geomeans(results: list[Result]) -> dict[str, float]:
    """Geometric means of the ratios to each baseline that a goal names, by row of the plan."""
    ratios: dict[str, list[float]] = {}
    for result in results:
        for against, _, value, _ in result.goals:
            if value and against not in ("copy", "us", "TFLOP/s") and not result.failure:
                ratios.setdefault(f"row {result.row}, {result.kernel}: times as fast as {against}", []).append(value)
    return {name: math.exp(sum(map(math.log, values)) / len(values)) for name, values in ratios.items()}


def markdown(title: str, results: list[Result], facts: dict[str, Any]) -> str:
    """A table with a row for each case, a line for each goal's mean, and what it was measured on."""
    lines = [f"# {title}", ""]
    lines += ["| row | kernel | shape | us (spread) | GB/s | % of copy | TFLOP/s | error | ratio to | goals |"]
    lines += ["|---" * 10 + "|"]
    for r in results:
        if r.us is None or r.gb_per_s is None:
            lines.append(f"| {r.row} | {r.kernel} | {r.shape} | - | | | | | | **{r.failure}** |")
            continue
        time = f"{r.us:.1f} (±{(r.spread or 0) / 2:.0%}){' L2' if r.warm else ''}"
        rates = f"{r.gb_per_s:.0f} | {r.of_copy:.0%} | {'' if r.tflops is None else f'{r.tflops:.0f}'}"
        error = "-" if r.error is None else f"{r.error:.1e}"
        wrong = f"**{r.failure}**; " if r.failure else ""
        cells = [r.row, r.kernel, r.shape, time, rates, error, _ratios(r), wrong + _goals(r)]
        lines.append(f"| {' | '.join(cells)} |")
    means = geomeans(results)
    lines += ["", "`L2`: the inputs stay in the L2 cache, as they do in a step. Ratios above 1: faster than that.", ""]
    lines += [f"- geometric mean, {name}: {value:.2f}" for name, value in means.items()]
    wanted = [goal for r in results for goal in r.goals]
    lines += [f"- goals reached: {sum(goal[3] for goal in wanted)} of {len(wanted)}"]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    return "\n".join(lines) + "\n"


def _ratios(result: Result) -> str:
    def cell(name: str, base: float | str) -> str:
        return f"{name} {base / result.us:.2f}" if isinstance(base, float) and result.us else f"{name}: none"

    return "; ".join(cell(name, base) for name, base in result.baselines.items())


def _goals(result: Result) -> str:
    def cell(text: str, value: float | None, reached: bool) -> str:
        return f"{text}: {'not measured' if value is None else 'yes' if reached else f'no ({value:.2f})'}"

    return "; ".join(cell(text, value, reached) for _, text, value, reached in result.goals)


def write(directory: Path, name: str, title: str, results: list[Result], facts: dict[str, Any]) -> Path:
    """NAME-DATE.md and .json; returns the first."""
    directory.mkdir(parents=True, exist_ok=True)
    date = datetime.date.today().isoformat()
    path = directory / f"{name}-{date}.md"
    path.write_text(markdown(f"{title}, {date}", results, facts))
    record = {"facts": facts, "geomeans": geomeans(results), "results": [dataclasses.asdict(r) for r in results]}
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    return path
