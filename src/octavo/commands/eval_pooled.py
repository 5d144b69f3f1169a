"""`octavo eval` of models that embed, rerank or label: cosines to the original's vectors, and nDCG beside its own."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.commands.progress_bar import progress_bar

if TYPE_CHECKING:
    from rich.console import Console

    from octavo.commands.eval_flags import EvalOptions
    from octavo.jobs.ndcg import RankingQuality

OF_RANKING = ("dataset", "max_ndcg_loss")
OF_LOGITS = ("max_kl", "html", "data")


class PooledEvalError(ValueError):
    """Options that can't be followed; the message is one line."""


def check_pooled(options: EvalOptions, directory: Path) -> bool:
    """Whether the model generates nothing. Raises PooledEvalError for options that don't fit that."""
    from octavo.jobs.embedding_quality import unmeasured
    from octavo.jobs.measured_text import reads_pairs
    from octavo.quant.checkpoint import read_config
    from octavo.runtime.config import EngineConfig
    from octavo.runtime.model.pooler_choice import is_pooled

    reads = reads_pairs(directory)
    if not reads and (where := unmeasured(directory)) is not None:
        raise PooledEvalError(f"quality is not measured here: {where}")
    config = EngineConfig(model=str(directory), runner=options.runner, convert=options.convert)
    if reads or not is_pooled(config, read_config(directory)):
        for flag in OF_RANKING:
            if getattr(options, flag) is not None:
                raise PooledEvalError(
                    f"{_flag(flag)} is about models that embed or rerank, and this one generates text; "
                    "--runner pooling makes it embed"
                )
        return False
    if options.against is None:
        raise PooledEvalError(
            "an encoder or pooled model has no perplexity: --against names the original, to which it is compared"
        )
    for flag in OF_LOGITS:
        if getattr(options, flag) is not None:
            raise PooledEvalError(f"{_flag(flag)} is about logits, and this model gives none; leave it out")
    if options.lm_head_dtype != "auto":
        raise PooledEvalError(f"--lm-head-dtype {options.lm_head_dtype}: this model has no output head; leave it out")
    return True


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def measure_pooled(options: EvalOptions, directory: Path, original: Path, console: Console) -> bool:
    """Measure, print and write; returns whether nDCG is as good as it must be."""
    from octavo.jobs.embedding_quality import is_encoder, measure_embeddings
    from octavo.jobs.retrieval import built_in_retrieval, read_retrieval
    from octavo.quant.hub import model_name
    from octavo.ranking_quality import RankingError
    from octavo.report.files import write_whole

    retrieval = built_in_retrieval() if options.dataset is None else read_retrieval(options.dataset)
    content: dict[str, Any] = {"model": model_name(options.model)}
    if is_encoder(directory):
        cosines = measure_embeddings(original, directory, dtype=options.dtype)
        console.print(str(cosines), highlight=False, markup=False, soft_wrap=True)
        content |= asdict(cosines)
    ranking: RankingQuality | None = None
    try:
        ranking = _ranking(options, directory, original, retrieval)
        for line in (*ranking.notes, str(ranking)):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        content["ranking"] = asdict(ranking)
    except RankingError as error:
        if any(getattr(options, flag) is not None for flag in OF_RANKING) or not is_encoder(directory):
            raise
        console.print(f"no nDCG: {error}", highlight=False, markup=False, soft_wrap=True)
    if options.json is not None:
        write_whole(options.json, json.dumps(content, indent=2) + "\n")
    return ranking is None or _is_good(ranking, options.max_ndcg_loss, console)


def _ranking(options: EvalOptions, directory: Path, original: Path, retrieval: Any) -> RankingQuality:
    from octavo.ranking_quality import measure_ranking

    shared: dict[str, Any] = {
        name: getattr(options, name) for name in ("runner", "convert") if getattr(options, name) != "auto"
    }
    own: dict[str, Any] = {"dtype": options.dtype}
    if options.kv_cache_dtype != "auto":
        own["kv_cache_dtype"] = options.kv_cache_dtype
    with progress_bar("loading") as bar:
        return measure_ranking(original, directory, retrieval, shared, own, bar.progress)


def _is_good(ranking: RankingQuality, most: float | None, console: Console) -> bool:
    loss = -ranking.difference.mean
    if most is None or loss <= most:
        return True
    said = f"nDCG@10 is {loss:.4f} lower than the original's, and --max-ndcg-loss is {most:g}"
    console.print(said, highlight=False, markup=False, soft_wrap=True)
    return False
