"""`octavo eval --tasks` on a tiny model, against lm-eval's own hf model on the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from octavo.cli import main
from octavo.commands.eval_tasks import _as_json as as_json
from octavo.jobs.task_scores import Score, differences
from octavo.llm import LLM
from octavo.outputs import Logprob, RequestOutput

W4 = "tiny--llmc-w4a16-g32"
TASKS = Path(__file__).parents[2] / "benchmarks/interop/lm_eval_tasks"
NAMES = ["octavo_choice", "octavo_generate", "octavo_rolling"]
METRICS = {"octavo_choice": ("acc", "acc_norm"), "octavo_generate": ("exact_match",)}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder's tasks, whose files' paths hold wherever the tests run."""
    folder = tmp_path_factory.mktemp("tasks")
    for path in TASKS.glob("*.yaml"):
        task: dict[str, Any] = yaml.safe_load(path.read_text())
        data = task["dataset_kwargs"]["data_files"]["test"]
        task["dataset_kwargs"]["data_files"]["test"] = str(TASKS / Path(data).name)
        (folder / path.name).write_text(yaml.safe_dump(task))
    return folder


def by_item(results: dict[str, Any], task: str) -> list[list[Any]]:
    return [[resps[0] for resps in sample["resps"]] for sample in results["samples"][task]]


@pytest.mark.slow  # most of it is importing lm-eval's hf model
def test_every_answer_is_that_of_lm_evals_own_model(
    fixtures: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-likelihoods in float32, what is greedy, generated text, whole texts in windows, and every metric."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from octavo.harness import run_tasks

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    model = str(fixtures / "tiny")
    with LLM(model, dtype="float32", max_model_len=257) as llm:  # 256 tokens of a text and one more
        ours = run_tasks(llm, NAMES, folder=tasks)
    hf = HFLM(pretrained=model, device="cpu", dtype="float32", max_length=255, batch_size=4)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    theirs = simple_evaluate(model=hf, tasks=NAMES, task_manager=manager, bootstrap_iters=10)
    assert theirs is not None
    for task, metrics in METRICS.items():
        for key in (f"{metric},none" for metric in metrics):
            assert ours["results"][task][key] == theirs["results"][task][key]
    name, key = "octavo_rolling", "bits_per_byte,none"
    assert ours["results"][name][key] == pytest.approx(theirs["results"][name][key], rel=1e-5)
    pairs = zip(by_item(ours, "octavo_choice"), by_item(theirs, "octavo_choice"), strict=True)
    for our_item, their_item in pairs:
        assert [one[0] for one in our_item] == pytest.approx([one[0] for one in their_item], abs=1e-3)
        assert [bool(one[1]) for one in our_item] == [bool(one[1]) for one in their_item]
    assert by_item(ours, "octavo_generate") == by_item(theirs, "octavo_generate")


def test_a_model_is_compared_item_by_item(
    fixtures: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "160")
    out = tmp_path / "out.json"
    words = ["eval", str(fixtures / W4), "--against", str(fixtures / "tiny"), "--tasks", "octavo_choice"]
    assert main([*words, "--tasks-path", str(tasks), "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    content = json.loads(out.read_text())
    assert (content["model"], content["against"], content["base_model"]) == (W4, "tiny", None)
    rows = {row["metric"]: row for row in content["tasks"]}
    main_row = rows["acc_norm"]
    count = main_row["items"]
    assert main_row["is_main"]
    assert main_row["value"] - main_row["original"]["value"] == pytest.approx(main_row["difference"], abs=1e-12)
    assert (main_row["better"] - main_row["worse"]) / count == pytest.approx(main_row["difference"], abs=1e-12)
    verdict = f"octavo_choice: no loss seen at this sample size (acc_norm {main_row['difference']:+.4f}, n = {count}"
    assert verdict in printed
    assert f"{main_row['value']:.4f} ± {main_row['standard_error']:.4f}" in printed
    assert str(fixtures) not in out.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "octavo_choice", "--max-kl", "1"], "--max-kl is about a text, and --tasks asks questions"),
        (["--tasks", "octavo_choice", "--data", "x.txt"], "--data is about a text"),
        (["--tasks-limit", "3"], "--tasks-limit is about tasks: --tasks names them"),
        (["--tasks", "octavo_choice", "--include-path", "none"], "--tasks-path none is no directory"),
    ],
)
def test_flags_that_do_not_go_together(
    fixtures: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["eval", str(fixtures / "tiny"), "--against", str(fixtures / "tiny"), *words]) == 1
    assert message in capsys.readouterr().err


def test_json_has_numbers_alone() -> None:
    """The interval of a single item has no ends, which JSON has no number for."""
    alone = Score("t", "acc", "none", 0.5, True, (0.5,), ("0",), True)
    better = Score("t", "acc", "none", 0.75, True, (0.75,), ("0",), True)
    (difference,) = differences([better], [alone])
    row = json.loads(json.dumps(as_json(better, difference), allow_nan=False))
    assert (row["low"], row["high"], row["difference"]) == (None, None, 0.25)
    assert row["original"]["value"] == 0.5


def test_a_continuation_of_no_tokens_is_certain() -> None:
    """And not the whole prompt's sum."""
    from octavo.harness import _score_of as score_of

    told = [None, {5: Logprob(-1.0, 2)}, {6: Logprob(-0.5, 1)}]
    output = RequestOutput("0", None, [4, 5, 6], told, [], finished=True)
    assert score_of(output, 0) == (0, True)
    assert score_of(output, 1) == (-0.5, True)
    assert score_of(output, 2) == score_of(output, 9) == (-1.5, False)
