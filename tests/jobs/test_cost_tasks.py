"""lm-eval's command line and its results. A run of lm-eval itself is in benchmarks/interop/README.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from octavo.jobs.cost.tasks import Tasks, read_results

RESULTS = {
    "results": {
        "arc_easy": {
            "alias": "arc",
            "acc,none": 0.5,
            "acc_stderr,none": 0.01,
            "acc_norm,none": 0.6,
            "acc_norm_stderr,none": 0.02,
        },
        "gsm8k": {"exact_match,strict-match": 0.95, "exact_match_stderr,strict-match": 0.1},
        "rolling": {"word_perplexity,none": 12.0, "word_perplexity_stderr,none": "N/A"},
        "own": {"f1,none": 0.75, "f1_stderr,none": 0.0},
    }
}


def test_the_main_metric_has_an_interval_for_a_second_measurement(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "results_2026-11-30.json").write_text(json.dumps(RESULTS))
    found = read_results(tmp_path)
    assert sorted(found) == ["arc_easy", "gsm8k", "own"]
    assert found["arc_easy"].value == 0.6  # acc_norm goes before acc
    assert found["arc_easy"].high - 0.6 == pytest.approx(1.96 * 2**0.5 * 0.02)
    assert found["gsm8k"].low == pytest.approx(0.95 - 1.96 * 2**0.5 * 0.1)
    assert found["gsm8k"].high == 1.0
    assert (found["own"].value, found["own"].low) == (0.75, 0.75)


def test_no_results_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lm-eval wrote no results"):
        read_results(tmp_path)


def test_lm_eval_is_told_the_server_and_the_tasks() -> None:
    tasks = Tasks(("a", "b"), Path("own"), 10)
    words = tasks.command("http://h:1", "m", Path("/models/m"), Path("out"))
    said = " ".join(words[1:])
    assert said.startswith(
        "-m lm_eval run --model local-completions --model_args model=m,base_url=http://h:1/v1/completions,"
    )
    assert "tokenizer=/models/m," in said
    assert said.endswith("--tasks a,b --output_path out --include_path own --limit 10")
