"""`octavo eval --tasks`: tasks of lm-eval on the serving path, alone or in pairs with the original."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.commands.progress_bar import progress_bar
from octavo.jobs.task_scores import Difference, Score, TaskError, differences, scores
from octavo.quant.scheme import AT_LOAD
from octavo.report.table import Table

if TYPE_CHECKING:
    from rich.console import Console

    from octavo.commands.eval_flags import EvalOptions

NOT_WITH_TASKS = {"data": None, "max_tokens": 2048, "max_kl": None, "html": None}  # and what they are by themselves
PAIRED = ("ORIGINAL", "difference", "95 % interval")  # heads
OF_SCORE = ("task", "metric", "value", "standard_error", "higher_is_better", "is_main")  # in the JSON
OF_DIFFERENCE = ("difference", "low", "high", "better", "worse", "p_value", "together", "is_loss", "is_gain")
TASKS_ONLY = ("tasks_path", "tasks_limit", "num_fewshot", "apply_chat_template")


def check_tasks(options: EvalOptions) -> None:
    """Refuse flags of the other kind of measurement, and tasks where lm-eval isn't installed. Raises TaskError."""
    if not options.tasks:
        for name in TASKS_ONLY:
            if getattr(options, name) not in (None, False):
                raise TaskError(f"{_flag(name)} is about tasks: --tasks names them")
        return
    for name, unset in NOT_WITH_TASKS.items():
        if getattr(options, name) != unset:
            raise TaskError(f"{_flag(name)} is about a text, and --tasks asks questions: leave one of the two out")
    if importlib.util.find_spec("lm_eval") is None:
        raise TaskError("--tasks needs lm-eval: pip install 'octavo[eval]'")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def measure_tasks(options: EvalOptions, directory: Path, original: Path | None, console: Console) -> bool:
    """Ask MODEL, and the original; print and write what came of it. Returns whether no loss is seen."""
    names = [name for words in options.tasks for name in words.split(",") if name]
    ours = _scores(options, directory, names, "MODEL", at_load=True)
    theirs = [] if original is None else _scores(options, original, names, "the original", at_load=False)
    found = differences(ours, theirs)
    console.print(_table(ours, found).to_rich())
    judged = [difference for difference in found if difference.score.is_main]
    for difference in judged:
        console.print(str(difference), highlight=False, markup=False, soft_wrap=True)
    if options.json is not None:
        _write(options, ours, found)
    return not any(difference.is_loss for difference in judged)


def _scores(options: EvalOptions, directory: Path, names: Sequence[str], which: str, *, at_load: bool) -> list[Score]:
    """One model's scores; it is in memory only meanwhile. at_load: whether flags that quantize at load are for it."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's own bars, beside ours
    from octavo.harness import run_tasks
    from octavo.llm import LLM

    engine: dict[str, Any] = {"dtype": options.dtype}
    if at_load:
        engine |= {"kv_cache_dtype": options.kv_cache_dtype, "lm_head_dtype": options.lm_head_dtype}
    elif options.dtype in AT_LOAD:
        engine["dtype"] = "auto"
    with progress_bar(f"loading {which}") as bar, LLM(str(directory), **engine) as llm:
        results = run_tasks(
            llm,
            names,
            folder=options.tasks_path,
            limit=options.tasks_limit,
            num_fewshot=options.num_fewshot,
            chat=options.apply_chat_template,
            progress=lambda done, total, what: bar.progress(done, total, f"{which}: {what}"),
        )
    return scores(results, names)


def _table(ours: Sequence[Score], found: Sequence[Difference]) -> Table:
    of_score = {id(difference.score): difference for difference in found}
    rows = []
    for score in ours:
        difference = of_score.get(id(score))
        paired = ("", "", "")
        if difference is not None:
            interval = f"{difference.low:+.4f} to {difference.high:+.4f}"
            paired = (_value(difference.original), f"{difference.difference:+.4f}", interval)
        count = f"{len(score.items):,}" if score.items else ""
        rows.append((score.task, score.name, count, _value(score), *paired))
    table = Table("tasks of lm-eval", ("task", "metric", "n", "MODEL", *PAIRED), tuple(rows))
    return table if found else table.without(PAIRED[0]).without(PAIRED[1]).without(PAIRED[2])


def _value(score: Score) -> str:
    error = score.standard_error
    return f"{score.value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _write(options: EvalOptions, ours: Sequence[Score], found: Sequence[Difference]) -> None:
    """The scores as JSON, without the items; each one's difference to the original beside it."""
    from octavo.quant.hub import hub_id, model_name
    from octavo.report.files import write_whole

    of_score = {id(difference.score): difference for difference in found}
    assert options.json is not None
    content = {
        "model": model_name(options.model),
        "against": None if options.against is None else model_name(options.against),
        "base_model": None if options.against is None else hub_id(options.against),
        "tasks": [_as_json(score, of_score.get(id(score))) for score in ours],
    }
    write_whole(options.json, json.dumps(content, indent=2) + "\n")


def _as_json(score: Score, difference: Difference | None) -> dict[str, Any]:
    row = {name: getattr(score, name) for name in OF_SCORE}
    row |= {"filter": score.through, "items": len(score.items) or None}
    if difference is not None:
        original = difference.original
        row["original"] = {"value": _number(original.value), "standard_error": original.standard_error}
        row |= {name: getattr(difference, name) for name in OF_DIFFERENCE}
    return {name: _number(value) for name, value in row.items()}


def _number(value: Any) -> Any:
    """None for what JSON has no number for: an interval without an end, of one item, and a perplexity beyond all."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
