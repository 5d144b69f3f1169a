"""Scores of lm-eval's tasks: their standard errors, and what a model lost of its original, item by item.

Two models that answer the same items are compared in pairs: most items are easy or hard for both, and only those where
they differ say which one is better. So the interval of the difference is far narrower than two standard errors make it.

An interval holds for all tasks of a run together (Bonferroni): the more tasks are asked, the wider each one's is, so
that a model that lost nothing is called worse by one run of 20 at the most, however many tasks that has. Every score
is of a sample: no verdict says that nothing was lost, only whether a loss is to be seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev
from typing import Any

from octavo.jobs.cost.tasks import PREFERRED

ERROR = 0.05  # how often the intervals of a run miss, all of them together


class TaskError(ValueError):
    """Tasks that can't be run or compared; the message is one line."""


@dataclass(frozen=True)
class Score:
    """A metric of a task. through: the filter that answers went through, 'none' for most.

    items           each document's, where the value is their mean; else empty, and there is no standard error
    standard_error  of the mean over documents that could have been drawn
    is_main         the one metric of the task that a verdict looks at
    """

    task: str
    metric: str
    through: str
    value: float
    higher_is_better: bool
    items: tuple[float, ...]
    documents: tuple[str, ...]
    is_main: bool = False

    @property
    def name(self) -> str:
        """The metric as lm-eval writes it, without a filter that does nothing."""
        return self.metric if self.through == "none" else f"{self.metric},{self.through}"

    @property
    def standard_error(self) -> float | None:
        return stdev(self.items) / math.sqrt(len(self.items)) if len(self.items) > 1 else None


@dataclass(frozen=True)
class Difference:
    """A score against the original's. difference, low and high: the score minus that, and its interval.

    better, worse  on how many of the items
    p_value        of a difference at least as large where there is none: McNemar's exact test, or Student's paired one
    together       of how many tasks the intervals hold at once
    """

    score: Score
    original: Score
    difference: float
    low: float
    high: float
    better: int
    worse: int
    p_value: float
    together: int

    @property
    def is_loss(self) -> bool:
        """Whether the interval is on the worse side of zero."""
        return self.high < 0 if self.score.higher_is_better else self.low > 0

    @property
    def is_gain(self) -> bool:
        return self.low > 0 if self.score.higher_is_better else self.high < 0

    def __str__(self) -> str:
        found = "a loss is seen" if self.is_loss else "a gain is seen" if self.is_gain else "no loss seen"
        where = "" if self.is_loss or self.is_gain else " at this sample size"
        whose = f" of all {self.together} tasks together" if self.together > 1 else ""
        sure = f"n = {len(self.score.items):,}, 95 % interval{whose} {self.low:+.4f} to {self.high:+.4f}"
        items = f"{self.worse} items worse, {self.better} better"
        return f"{self.score.task}: {found}{where} ({self.score.name} {self.difference:+.4f}, {sure}; {items})"


def scores(results: Mapping[str, Any], names: Sequence[str]) -> list[Score]:
    """The metrics of tasks and groups that were asked for, out of what lm-eval's evaluator returns.

    A tag, such as one for all tasks of a kind, has no score of its own; its tasks' are there.
    """
    asked = [name for name in names if name in results["results"]]
    kept = list(dict.fromkeys([*asked, *(_leaves(results) if len(asked) < len(names) else [])]))
    found = []
    for task in kept:
        own = [_score(results, task, key, value) for key, value in results["results"][task].items() if _is_metric(key)]
        metrics = [score.metric for score in own if score.items]
        main = next((metric for metric in (*PREFERRED, *metrics) if metric in metrics), None)
        is_main = [score.metric == main and bool(score.items) for score in own]
        first = is_main.index(True) if any(is_main) else -1
        found += [_marked(score) if number == first else score for number, score in enumerate(own)]
    return found


def _is_metric(key: str) -> bool:
    """'acc,none' is one, and 'alias' and 'acc_stderr,none' are not."""
    return "," in key and not key.partition(",")[0].endswith("_stderr")


def _marked(score: Score) -> Score:
    return Score(**{**vars(score), "is_main": True})


def _leaves(results: Mapping[str, Any]) -> list[str]:
    return [task for task in results["results"] if task in results["samples"]]


def _score(results: Mapping[str, Any], task: str, key: str, value: float) -> Score:
    metric, _, through = key.partition(",")
    samples = [
        sample
        for leaf in _tasks_of(results, task)
        for sample in results["samples"].get(leaf, ())
        if sample["filter"] == through and metric in sample
    ]
    values = [sample[metric] for sample in samples]
    items: tuple[float, ...] = ()
    # numbers whose mean is the value; a perplexity's are pairs, and some metrics are no mean of anything
    if values and all(isinstance(item, bool | int | float) for item in values):
        numbers = tuple(float(item) for item in values)
        items = numbers if math.isclose(fmean(numbers), value, rel_tol=1e-9, abs_tol=1e-12) else ()
    better = results["higher_is_better"].get(task, {}).get(metric)
    documents = tuple(f"{sample['doc_id']} {sample['doc_hash']}" for sample in samples)
    return Score(task, metric, through, float(value), better is not False, items, documents)


def _tasks_of(results: Mapping[str, Any], task: str) -> list[str]:
    """The tasks of a group, at whatever depth; a task is its own."""
    below = results.get("group_subtasks", {}).get(task)
    return [leaf for name in below for leaf in _tasks_of(results, name)] if below else [task]


def differences(ours: Sequence[Score], originals: Sequence[Score]) -> list[Difference]:
    """Each score with items against the original's. Raises TaskError for other items."""
    of_original = {(score.task, score.metric, score.through): score for score in originals}
    together = max(1, sum(score.is_main for score in ours))
    found = []
    for score in ours:
        original = of_original.get((score.task, score.metric, score.through))
        if original is None or not score.items or not original.items:
            continue
        if score.documents != original.documents:
            raise TaskError(f"{score.task} has other documents for the original: they can't be compared in pairs")
        found.append(_difference(score, original, together))
    return found


def _difference(score: Score, original: Score, together: int) -> Difference:
    pairs = list(zip(score.items, original.items, strict=True))
    higher = sum(ours > theirs for ours, theirs in pairs)
    lower = sum(ours < theirs for ours, theirs in pairs)
    error = ERROR / together
    if all(item in (0.0, 1.0) for pair in pairs for item in pair):
        low, high, p_value = _of_shares(higher, lower, len(pairs), error)
    else:
        low, high, p_value = _of_means([ours - theirs for ours, theirs in pairs], error)
    better, worse = (higher, lower) if score.higher_is_better else (lower, higher)
    difference = fmean(score.items) - fmean(original.items)
    return Difference(score, original, difference, low, high, better, worse, p_value, together)


def _of_shares(higher: int, lower: int, count: int, error: float) -> tuple[float, float, float]:
    """The interval of the difference of two paired shares, and McNemar's exact p.

    The interval is Agresti's and Min's (Statistics in Medicine 2005): Wald's with half an item more in each of the four
    cells, so that it has a width where no item differs.
    """
    more = higher + 0.5
    less = lower + 0.5
    total = count + 2
    difference = (more - less) / total
    width = NormalDist().inv_cdf(1 - error / 2) * math.sqrt(more + less - (more - less) ** 2 / total) / total
    differing = higher + lower
    tail = sum(math.comb(differing, k) for k in range(min(higher, lower) + 1)) / 2**differing
    return max(-1.0, difference - width), min(1.0, difference + width), min(1.0, 2 * tail)


def _of_means(found: Sequence[float], error: float) -> tuple[float, float, float]:
    """Student's interval of the mean of paired differences, and its p. Of one item nothing is known."""
    from scipy.stats import t

    mean = fmean(found)
    if len(found) < 2:
        return -math.inf, math.inf, 1.0
    spread = stdev(found) / math.sqrt(len(found))
    if spread == 0:
        return mean, mean, 1.0 if mean == 0 else 0.0
    width = float(t.ppf(1 - error / 2, len(found) - 1)) * spread
    return mean - width, mean + width, float(2 * t.sf(abs(mean) / spread, len(found) - 1))
