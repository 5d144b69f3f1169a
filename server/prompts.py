"""From a validated request to what the engine samples by: the checks that need the model, and its defaults."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.runtime.messages import Constraint, SamplingParams
from octavo.server.dialects.fields import MAX_TOKENS_SENT, GenerationRequest
from octavo.server.errors import bad_request, too_long
from octavo.server.served_model import ServedModel
from octavo.text.tokenizer import EncodingError

LONG_TOKEN = 64  # bytes of a token, where a tokenizer sets no limit to what one token stands for
MAX_TEXT = 1 << 22  # bytes of text that are tokenized where the context sets no limit; that takes seconds


@dataclass(frozen=True, slots=True)
class Prompt:
    """What one answer, or n of them, continue. `text` is the client's own, where it gave text."""

    token_ids: list[int]
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request asks of each answer in fields that dialects name differently; the names are for errors.

    max_tokens None: as many as the context leaves. logprobs, prompt_logprobs None: none.
    """

    max_tokens: int | None
    logprobs: int | None
    prompt_logprobs: int | None
    limit_name: str = "max_tokens"
    logprobs_name: str = "logprobs"


def check_total(prompts: list[Prompt], request: GenerationRequest, name: str) -> None:
    """A body of some megabytes must not become gigabytes in the engine."""
    beside = len(request.allowed_token_ids or ()) + len(request.logit_bias or ())
    total = sum(len(prompt.token_ids) + beside for prompt in prompts) * request.num_choices
    if total > MAX_TOKENS_SENT:
        raise bad_request(
            f"{name}: {total} tokens with what goes along, for {len(prompts)} prompts with n {request.num_choices}; a "
            f"request may send {MAX_TOKENS_SENT}. Make several of it",
            name,
        )


def max_text_bytes(model: ServedModel, *, must_fit: bool) -> int:
    """The longest text that is tokenized; with must_fit, the longest one that can fit into the context."""
    per_token = model.tokenizer.max_token_bytes
    in_context = model.max_model_len * (per_token or LONG_TOKEN)
    return in_context if must_fit and per_token is not None else max(MAX_TEXT, in_context)


def encode(text: str, name: str, model: ServedModel, *, add_special_tokens: bool, must_fit: bool) -> list[int]:
    """Token ids of a client's text. must_fit: one that can't fit into the context is refused, and not tokenized."""
    limit = max_text_bytes(model, must_fit=must_fit)
    size = _num_bytes(text, limit)
    if size > limit:
        if must_fit and model.tokenizer.max_token_bytes is not None:
            why = f"{name}: {size} bytes of text, and none above {limit} bytes fits. Shorten the prompt"
            raise too_long(model.max_model_len, why, name)
        raise bad_request(f"{name}: {size} bytes of text; {limit} is the most that is tokenized", name)
    try:
        return model.tokenizer.encode(text, add_special_tokens=add_special_tokens)
    except EncodingError as error:
        raise bad_request(f"{name}: {error}", name) from None


def _num_bytes(text: str, limit: int) -> int:
    """The size of a text in UTF-8; approximate where it is far from the limit."""
    if not limit / 4 < len(text) <= limit:
        return len(text)
    return len(text.encode("utf-8", "surrogatepass"))


def sampling_params(
    request: GenerationRequest, wanted: Wanted, model: ServedModel, room: int, constraint: Constraint | None = None
) -> SamplingParams:
    """What the engine samples an answer by; `room` is how many tokens the context leaves.

    max_tokens 0 (a prompt's log-probabilities only) becomes 1: the server drops that token.
    """
    defaults = model.defaults
    top_k = _first(request.top_k, defaults.get("top_k"), 0)
    limit = room if wanted.max_tokens is None else max(1, wanted.max_tokens)
    if request.min_tokens > limit:
        raise bad_request(f"min_tokens {request.min_tokens} is more than max_tokens, {limit}", "min_tokens")
    for field, count in ((wanted.logprobs_name, wanted.logprobs), ("prompt_logprobs", wanted.prompt_logprobs)):
        if count is not None and count > model.max_logprobs:
            raise bad_request(f"{field} {count} is above this server's limit, {model.max_logprobs}", field)
    if request.priority and not model.honors_priority:
        raise bad_request(
            f"priority {request.priority}: this server takes requests as they come (it would obey with "
            "--scheduling-policy priority)",
            "priority",
        )
    allowed = in_vocabulary(request.allowed_token_ids, "allowed_token_ids", model)
    stops = () if request.ignore_eos else tuple(model.end_ids)
    stops += in_vocabulary(request.stop_token_ids, "stop_token_ids", model) or ()
    if allowed is not None and request.min_tokens and set(allowed) <= set(stops):
        raise bad_request(
            "allowed_token_ids: all of them end the answer, which min_tokens forbids", "allowed_token_ids"
        )
    return SamplingParams(
        max_tokens=limit,
        min_tokens=request.min_tokens,
        temperature=_first(request.temperature, defaults.get("temperature"), 1.0),
        top_k=max(0, min(int(top_k), model.vocab_size)),
        top_p=_first(request.top_p, defaults.get("top_p"), 1.0),
        min_p=_first(request.min_p, defaults.get("min_p"), 0.0),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=_first(request.repetition_penalty, defaults.get("repetition_penalty"), 1.0),
        logit_bias=_logit_bias(request, model),
        allowed_token_ids=allowed,
        seed=request.seed,
        stop_token_ids=stops,
        logprobs=wanted.logprobs,
        prompt_logprobs=wanted.prompt_logprobs,
        constraint=constraint,
    )


def _first(*values: float | None) -> float:
    """The first value that is given."""
    return next(value for value in values if value is not None)


def _logit_bias(request: GenerationRequest, model: ServedModel) -> dict[int, float]:
    bias = {}
    for key, value in (request.logit_bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise bad_request(f"logit_bias: {key[:40]!r} is not a token id", "logit_bias")
        bias[int(key)] = value
    in_vocabulary(list(bias), "logit_bias", model)
    return bias


def in_vocabulary(ids: list[int] | None, name: str, model: ServedModel) -> tuple[int, ...] | None:
    if ids and (largest := max(ids)) >= model.vocab_size:
        raise bad_request(f"{name}: token id {largest} is not below the vocabulary size, {model.vocab_size}", name)
    return None if ids is None else tuple(ids)


def fitted(ids: list[int], request: GenerationRequest, wanted: Wanted, model: ServedModel, name: str) -> list[int]:
    """The prompt, checked against the context; its end, where truncate_prompt_tokens says so."""
    in_vocabulary(ids, name, model)
    num_wanted = max(1, wanted.max_tokens or 1)
    if request.truncate_prompt_tokens is not None:
        keep = request.truncate_prompt_tokens
        if keep > model.max_model_len:
            raise bad_request(
                f"truncate_prompt_tokens {keep} is more than the context of this model, {model.max_model_len} tokens; "
                "-1 keeps what the context holds",
                "truncate_prompt_tokens",
            )
        ids = ids[-(keep if keep > 0 else max(1, model.max_model_len - num_wanted)) :]
    if not ids:
        raise bad_request(f"{name}: the prompt is empty, and this tokenizer adds no beginning token to it", name)
    if len(ids) + num_wanted > model.max_model_len:
        raise too_long(
            model.max_model_len,
            f"However, {name} has {len(ids)} tokens, and at least {num_wanted} are to follow. Shorten the prompt or "
            f"lower {wanted.limit_name}",
            name if len(ids) >= model.max_model_len else wanted.limit_name,
        )
    return ids
