"""What is wrong with a request, in words. The engine's own guard: one bad number must not end everybody's requests.

The server refuses such requests first, with its own messages in the names of the HTTP fields; what arrives here
despite that ends in an error output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf, isfinite

from octavo.runtime.messages import AddRequest, PoolingTask, SamplingParams
from octavo.runtime.source_messages import AudioSource, Source, TextSource


def problem_of(
    request: AddRequest, vocab_size: int, tasks: Sequence[PoolingTask] = (), source: Source | None = None
) -> str | None:
    """The first thing about a request that the engine can't do, or None.

    tasks: of a model that generates nothing. source: what a model with an encoder reads.
    """
    wrong = _problem_of_features(request, source) or _problem_of_text(request, vocab_size, source)
    if wrong is not None:
        return wrong
    if request.pooling is None and tasks:
        return f"this model generates nothing; it does {', '.join(tasks)}"
    if request.pooling is not None and request.pooling.task not in tasks:
        return f"this model doesn't do {request.pooling.task}" + (f"; it does {', '.join(tasks)}" if tasks else "")
    outside = _first_outside(request.token_ids, vocab_size)
    if outside is not None:
        return f"prompt token id {outside} is not in the vocabulary of {vocab_size} tokens"
    num_begun = len(request.token_ids) - request.prompt_length
    if request.num_prompt is not None and not 0 <= num_begun < request.params.max_tokens:
        return (
            f"num_prompt {request.num_prompt} of {len(request.token_ids)} tokens: {num_begun} of the answer; they must "
            f"be 0 at least, and fewer than max_tokens, {request.params.max_tokens}"
        )
    return next(_problems(request.params, vocab_size), None)


def _problem_of_features(request: AddRequest, source: Source | None) -> str | None:
    num_bytes = len(request.features)
    if not isinstance(source, AudioSource):
        return "features: this model hears nothing, and reads text alone" if num_bytes else None
    if num_bytes != source.num_bytes:
        return (
            f"features of {num_bytes} bytes: this model's encoder reads {source.rows} x {source.length} numbers of "
            f"float32, {source.num_bytes} bytes, with each prompt"
        )
    return "other_ids: a request with features has one answer" if request.other_ids else None


def _problem_of_text(request: AddRequest, vocab_size: int, source: Source | None) -> str | None:
    count = len(request.source_ids)
    if not isinstance(source, TextSource):
        return "source_ids: this model has no encoder of text, and reads a prompt alone" if count else None
    if not 0 < count <= source.positions:
        return f"source_ids of {count} tokens: this model's encoder reads 1 to {source.positions}"
    outside = _first_outside(request.source_ids, vocab_size)
    if outside is not None:
        return f"source_ids names token id {outside}, which is not in the vocabulary of {vocab_size} tokens"
    if source.padding in request.source_ids:
        return f"source_ids names token id {source.padding}, the padding, which has no position here; leave it out"
    return None


def _problems(params: SamplingParams, vocab_size: int) -> Iterator[str]:
    ranges: list[tuple[str, float, float, float]] = [
        ("max_tokens", params.max_tokens, 1, inf),
        ("min_tokens", params.min_tokens, 0, inf),
        ("top_k", params.top_k, 0, inf),
        ("top_p", params.top_p, 0, 1),
        ("min_p", params.min_p, 0, 1),
        ("temperature", params.temperature, 0, 1e6),
        ("presence_penalty", params.presence_penalty, -1e6, 1e6),
        ("frequency_penalty", params.frequency_penalty, -1e6, 1e6),
        ("repetition_penalty", params.repetition_penalty, 1e-6, 1e6),
        ("logprobs", params.logprobs or 0, 0, inf),
        ("prompt_logprobs", params.prompt_logprobs or 0, 0, inf),
    ]
    for name, value, low, high in ranges:
        if not low <= value <= high:  # false for NaN too
            yield f"{name} {value} is not between {low:g} and {high:g}"
    for token, bias in params.logit_bias.items():
        if not isfinite(bias):
            yield f"logit_bias of token {token} is {bias}; it must be a finite number"
    if params.allowed_token_ids == ():
        yield "allowed_token_ids is empty: no token could be sampled"
    if params.repetition is not None and params.repetition.min_count < 2:
        yield f"repetition: min_count {params.repetition.min_count} is not 2 or more"
    if not all(params.forbidden):
        yield "bad_words has an empty sequence of tokens"
    named = [
        ("logit_bias", tuple(params.logit_bias)),
        ("allowed_token_ids", params.allowed_token_ids or ()),
        ("logprob_token_ids", params.logprob_token_ids),
        ("prompt_logprob_token_ids", params.prompt_logprob_token_ids),
        ("bad_words", tuple(token for word in params.forbidden for token in word)),
    ]
    rules = params.rules
    if rules is not None:
        named += [("rules.starts", start) for start in rules.starts] + [("rules.never_first", rules.never_first)]
        named += [("rules.last_id", () if rules.last_id is None else (rules.last_id,))]
        if not all(rules.starts):
            yield "rules.starts has an empty list of tokens"
        if rules.first_timestamp is not None and not 0 <= rules.end_id < rules.first_timestamp < vocab_size:
            yield f"rules.first_timestamp {rules.first_timestamp} is not between end_id and the vocabulary's end"
    for name, tokens in named:
        outside = _first_outside(tokens, vocab_size)
        if outside is not None:
            yield f"{name} names token id {outside}, which is not in the vocabulary of {vocab_size} tokens"
    for token in params.stop_token_ids:
        if token < 0:
            yield f"stop_token_ids names token id {token}"


def _first_outside(tokens: Sequence[int], vocab_size: int) -> int | None:
    """The first token that is not in the vocabulary. A loop in Python over a long prompt would hold everybody up."""
    if not tokens or (min(tokens) >= 0 and max(tokens) < vocab_size):
        return None
    return next(token for token in tokens if not 0 <= token < vocab_size)
