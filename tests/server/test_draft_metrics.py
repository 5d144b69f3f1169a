"""How the drafts of an answer fared, against the example of vLLM's documentation."""

from __future__ import annotations

import pytest

from octavo.server.draft_metrics import DraftMetrics, DraftReports, request_metrics

EXAMPLE = {
    "mean_acceptance_length": 1.2325581395348837,
    "draft_acceptance_rate": 0.07751937984496124,
    "acceptance_histogram": [39, 1, 0, 3],
    "acceptance_histogram_by_draft_length": {"3": [39, 1, 0, 3]},
    "num_spec_steps": 43,
    "num_accepted_draft_tokens": 10,
    "num_draft_tokens": 129,
    "num_spec_tokens": 3,
}
"""vLLM 0.32, docs/features/speculative_decoding/acceptance_metrics.md."""


def counted(level: str, *steps: tuple[int, int]) -> DraftMetrics:
    found = DraftReports(level, 3).begin()  # type: ignore[arg-type]
    assert found is not None
    for step in steps:
        found.count(step)
    return found


def test_the_example_is_vllm_s() -> None:
    found = counted("summary", *[(3, 0)] * 39, (3, 1), *[(3, 3)] * 3)
    assert found.to_dict() == EXAMPLE
    assert request_metrics([found]) == {"metrics": {"speculative_decoding": EXAMPLE}}


def test_steps_are_told_in_order_where_details_are_wanted() -> None:
    found = counted("detailed", (3, 2), (1, 0), (3, 2), (2, 1)).to_dict()
    assert (found["per_step_drafted"], found["per_step_accepted"]) == ([3, 1, 3, 2], [2, 0, 2, 1])
    assert found["acceptance_histogram_by_draft_length"] == {"3": [0, 0, 2, 0], "1": [1, 0], "2": [0, 1, 0]}


def test_no_drafts_are_zeros_and_several_answers_null() -> None:
    empty = counted("detailed")
    found = empty.to_dict()
    assert (found["mean_acceptance_length"], found["draft_acceptance_rate"]) == (1.0, 0.0)
    assert found["acceptance_histogram"] == [0, 0, 0, 0]
    assert "per_step_drafted" not in found
    assert request_metrics([empty, empty]) == {"metrics": None}
    assert DraftReports().begin() is None
    assert request_metrics([None]) == {}


def test_sglang_counts_an_answer_s_tokens_by_its_steps() -> None:
    found = counted("summary", (3, 3), (3, 1)).of_sglang()
    assert found["spec_accept_length"] == 3.0
    assert found["spec_accept_rate"] == pytest.approx(4 / 6)
    assert found["spec_verify_ct"] == 2
