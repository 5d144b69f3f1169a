"""Pooled requests of a program: prompts to embeddings, scores and labels, by the server's own code."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from functools import partial
from operator import mul
from typing import TYPE_CHECKING

from octavo.inputs import Given
from octavo.offline.errors import python_errors
from octavo.offline.model import OfflineModel
from octavo.pooling_params import PoolingParams
from octavo.runtime.messages import PoolingParams as EngineParams
from octavo.runtime.messages import PoolingTask
from octavo.server.admission import Ticket
from octavo.server.dialects.pooled import checked_dimensions, named_prompt
from octavo.server.errors import bad_request
from octavo.server.pooled_inputs import Cut, PooledPrompt, ids_prompt, text_prompt
from octavo.server.pooled_text import PooledText
from octavo.server.pooling import PooledResult, pool, pooled_requests
from octavo.server.reranker_template import asked_pair

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 256  # prompts that are tokenized, and open, together

Made = tuple[PooledPrompt, PooledResult]


def facts_of(model: OfflineModel, task: PoolingTask | None) -> tuple[PooledText, PoolingTask]:
    """What the model does, and which of it is asked for. Raises ValueError."""
    pooled = model.model.pooled
    if pooled is None:
        raise ValueError("this model generates text: generate and chat answer")
    found = task or pooled.facts.tasks[0]
    if found not in pooled.facts.tasks:
        raise ValueError(f"this model doesn't {found}; its tasks are {', '.join(pooled.facts.tasks)}")
    return pooled, found


def tensor_of(result: PooledResult, task: PoolingTask) -> Tensor:
    """[numbers], or of a task of tokens [tokens, numbers], also of a single token. In float32."""
    import torch

    data = torch.frombuffer(bytearray(result.pooled.data), dtype=torch.float32)
    return data.view(-1, result.pooled.width) if task.startswith("token_") else data


async def pooled_prompts(
    model: OfflineModel,
    given: Sequence[Given],
    params: PoolingParams,
    task: PoolingTask | None,
    update: Callable[[], object] = lambda: None,
) -> list[Made]:
    """What each prompt gave, in order. Raises ValueError and EngineError."""
    pooled, wanted = facts_of(model, task or params.task)
    cut = Cut(params.truncate_prompt_tokens)
    named = params.prompt_name is not None
    with python_errors():
        before = named_prompt(params.prompt_name, pooled) if wanted == "embed" or named else ""
    if named and (wanted != "embed" or any(one.token_ids is not None for one in given)):
        raise ValueError("prompt_name: texts that are embedded have such a prompt before them; leave it out")
    if any(one.images for one in given):
        raise ValueError("multi_modal_data: images are read by models that generate; leave it out")

    def prompt_of(one: Given) -> PooledPrompt:
        if one.token_ids is not None:
            return ids_prompt(one.token_ids, "prompt", model.model, cut)
        return text_prompt(one.text or "", "prompt", model.model, cut, before=before)

    with python_errors():
        sent = EngineParams(wanted, checked_dimensions(params.dimensions, pooled), params.use_activation)
        return await _pooled(model, [partial(prompt_of, one) for one in given], sent, update)


async def scores(
    model: OfflineModel,
    one: Sequence[str],
    other: Sequence[str],
    params: PoolingParams,
    update: Callable[[], object] = lambda: None,
) -> list[tuple[float, PooledPrompt]]:
    """A score for each pair of texts: a cross-encoder's, or the cosine of their embeddings."""
    pooled, task = facts_of(model, None)
    if params.prompt_name is not None:
        raise ValueError("prompt_name: a score is of two texts, which have one prompt; leave it out")
    cut = Cut(params.truncate_prompt_tokens)
    with python_errors():
        if task == "classify":
            if pooled.facts.size != 1:
                raise bad_request(f"this model has {pooled.facts.size} labels, and a score is what a model of one says")
            known: dict[str, list[int]] = {}  # a query is tokenized once for all of its documents
            pairs = [
                partial(asked_pair, first, second, "data_2", model.model, cut, known=known)
                for first, second in zip(one, other, strict=True)
            ]
            made = await _pooled(model, pairs, EngineParams("classify", use_activation=params.use_activation), update)
            return [(result.vector()[0], prompt) for prompt, result in made]
        facts_of(model, "embed")
        distinct = list(dict.fromkeys([*one, *other]))
        texts = [partial(text_prompt, text, "data_1", model.model, cut, before=pooled.prompt) for text in distinct]
        made = await _pooled(model, texts, EngineParams("embed", use_activation=True), update)
    found = {text: (prompt, result.values) for text, (prompt, result) in zip(distinct, made, strict=True)}
    return [
        (math.fsum(map(mul, found[first][1], found[second][1])), found[second][0])
        for first, second in zip(one, other, strict=True)
    ]


async def _pooled(
    model: OfflineModel,
    prompts: Sequence[Callable[[], PooledPrompt]],
    params: EngineParams,
    update: Callable[[], object],
) -> list[Made]:
    """Group by group: the next one is tokenized while one is computed."""
    made: list[Made] = []
    groups = [prompts[begin : begin + GROUP] for begin in range(0, len(prompts), GROUP)]
    coming = asyncio.ensure_future(_tokenized(groups[0])) if groups else None
    try:
        for number in range(len(groups)):
            assert coming is not None
            ready = await coming
            coming = asyncio.ensure_future(_tokenized(groups[number + 1])) if number + 1 < len(groups) else None
            requests = pooled_requests(ready, params, model.model)
            ticket = Ticket("", math.inf, math.inf)
            results = await pool(requests, model.fleet, model.metrics, ticket)
            made += zip(ready, results, strict=True)
            for _ in ready:
                update()
    finally:
        if coming is not None:
            coming.cancel()
    return made


async def _tokenized(prompts: Sequence[Callable[[], PooledPrompt]]) -> list[PooledPrompt]:
    return await asyncio.to_thread(lambda: [make() for make in prompts])
