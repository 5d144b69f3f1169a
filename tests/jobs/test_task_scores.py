"""Scores of tasks in pairs: the intervals cover what they claim, by counting every outcome, and p is scipy's."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from statistics import fmean

import pytest
from scipy import stats

from octavo.jobs.task_scores import Difference, Score, TaskError, differences, scores


def score(items: Sequence[float], task: str = "t", *, higher: bool = True, main: bool = True) -> Score:
    documents = tuple(map(str, range(len(items))))
    return Score(task, "acc", "none", fmean(items), higher, tuple(items), documents, main)


def answers(better: int, worse: int, same: int) -> tuple[Score, Score]:
    """Ours and the original's: on so many items ours alone is right, the original's alone, and both."""
    return score([1.0] * better + [0.0] * worse + [1.0] * same), score([0.0] * better + [1.0] * worse + [1.0] * same)


def compared(better: int, worse: int, same: int) -> Difference:
    ours, original = answers(better, worse, same)
    return differences([ours], [original])[0]


@pytest.mark.parametrize(("gain", "loss"), [(0.0, 0.02), (0.02, 0.02), (0.05, 0.1), (0.1, 0.4), (0.3, 0.3)])
def test_an_interval_covers_the_truth_19_times_of_20(gain: float, loss: float) -> None:
    """Every outcome of 40 items, with its probability."""
    count = 40
    covered = 0.0
    for better in range(count + 1):
        for worse in range(count + 1 - better):
            same = count - better - worse
            chance = stats.multinomial.pmf([better, worse, same], count, [gain, loss, 1 - gain - loss])
            if chance > 1e-9:
                found = compared(better, worse, same)
                covered += chance * (found.low <= gain - loss <= found.high)
    assert covered > 0.945


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (3, 1), (10, 25), (0, 6), (7, 7)])
def test_p_is_mcnemars_exact_one(better: int, worse: int) -> None:
    expected = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert compared(better, worse, 30).p_value == pytest.approx(expected, rel=1e-9)


def test_other_scores_have_students_paired_interval() -> None:
    rng = random.Random(0)
    ours = [rng.gauss(0.5, 0.2) for _ in range(12)]
    theirs = [value + rng.gauss(0.05, 0.1) for value in ours]
    found = differences([score(ours)], [score(theirs)])[0]
    test = stats.ttest_rel(ours, theirs)
    interval = test.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found.p_value == pytest.approx(test.pvalue, rel=1e-9)
    assert found.score.standard_error == pytest.approx(stats.sem(ours), rel=1e-12)


def test_no_difference_in_few_items_is_not_called_none() -> None:
    """Five items that both get right: a model that loses a quarter of all items often shows that too."""
    found = compared(0, 0, 5)
    assert found.low < -0.25
    assert not found.is_loss
    assert not found.is_gain
    assert str(found).startswith("t: no loss seen at this sample size (acc +0.0000, n = 5, 95 % interval -0.")


def test_a_loss_is_one_on_the_worse_side() -> None:
    assert compared(2, 30, 100).is_loss
    assert "a loss is seen (acc -0.2121, n = 132" in str(compared(2, 30, 100))
    assert compared(30, 2, 100).is_gain
    worse, better = answers(2, 30, 100)
    errors = [Score(**{**vars(one), "higher_is_better": False}) for one in (worse, better)]
    assert differences([errors[1]], [errors[0]])[0].is_loss  # a share of errors


def test_many_tasks_share_one_error() -> None:
    """Of twenty tasks each interval is that of one twentieth of the error: one in 20 runs misses, not each run one."""
    ours, original = answers(20, 34, 100)
    alone = differences([ours], [original])[0]
    names = [f"t{i}" for i in range(20)]
    many = [[Score(**{**vars(one), "task": name}) for name in names] for one in (ours, original)]
    first = differences(*many)[0]
    normal = stats.norm
    ratio = (first.high - first.low) / (alone.high - alone.low)
    assert ratio == pytest.approx(normal.ppf(1 - 0.05 / 40) / normal.ppf(1 - 0.05 / 2), rel=1e-9)
    assert "95 % interval of all 20 tasks together" in str(first)


def test_other_documents_can_not_be_paired() -> None:
    with pytest.raises(TaskError, match="t has other documents for the original"):
        differences([score([1.0, 0.0])], [score([1.0, 0.0, 1.0])])


def sample(number: int, **metrics: float | tuple[float, int]) -> dict[str, object]:
    return {"doc_id": number, "doc_hash": "h", "filter": "none", **metrics}


RESULTS = {
    "results": {
        "mmlu": {"alias": "mmlu", "acc,none": 0.75, "acc_stderr,none": "N/A"},
        "law": {"alias": "- law", "acc,none": 1.0, "acc_norm,none": 0.5},
        "art": {"alias": "- art", "acc,none": 0.5, "acc_norm,none": 0.0},
        "texts": {"word_perplexity,none": 12.0, "word_perplexity_stderr,none": "N/A"},
    },
    "group_subtasks": {"mmlu": ["humanities"], "humanities": ["law", "art"]},
    "higher_is_better": {"texts": {"word_perplexity": False}},
    "samples": {
        "law": [sample(0, acc=1.0, acc_norm=1.0), sample(1, acc=1.0, acc_norm=0.0)],
        "art": [sample(0, acc=1.0, acc_norm=0.0), sample(1, acc=0.0, acc_norm=0.0)],
        "texts": [sample(0, word_perplexity=(-20.0, 8))],
    },
}


def test_a_group_has_the_items_of_all_its_tasks() -> None:
    (found,) = scores(RESULTS, ["mmlu"])
    assert (found.task, found.items, found.is_main) == ("mmlu", (1.0, 1.0, 1.0, 0.0), True)
    assert found.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 3), rel=1e-12)


def test_the_verdict_looks_at_one_metric_of_a_task() -> None:
    found = scores(RESULTS, ["law", "art", "texts"])
    assert [(one.task, one.metric) for one in found if one.is_main] == [("law", "acc_norm"), ("art", "acc_norm")]
    texts = found[-1]
    assert (texts.items, texts.standard_error, texts.higher_is_better) == ((), None, False)
    assert differences([texts], [texts]) == []


def test_a_tag_is_its_tasks() -> None:
    assert {one.task for one in scores(RESULTS, ["a tag"])} == {"law", "art", "texts"}
