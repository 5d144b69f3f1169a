"""From a validated request to what the engine samples by: the checks that need the model, and its defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from octavo.runtime.messages import SamplingParams
from octavo.server.dialects.protocol import (
    MAX_TOKENS_SENT,
    ChatCompletionRequest,
    ChatOptions,
    CompletionRequest,
    GenerationRequest,
)
from octavo.server.errors import ApiError, bad_request
from octavo.server.served_model import ServedModel
from octavo.server.template_renderer import RendererStoppedError, RenderRequest
from octavo.text.chat_template import REQUEST_ORIGIN, ChatTemplateError
from octavo.text.template_process import Job
from octavo.text.tokenizer import EncodingError

MAX_ANSWERS = 4096  # of one HTTP request: prompts x n
LONG_TOKEN = 64  # bytes; only of a tokenizer one of whose tokens may stand for any number of them
MAX_TEXT = 1 << 22  # bytes of text that are tokenized where the context sets no limit; that takes seconds


@dataclass(frozen=True, slots=True)
class Prompt:
    """What one answer, or n, go on from. `text` is the client's own, where it gave text."""

    token_ids: list[int]
    text: str | None = None


def completion_prompts(request: CompletionRequest, model: ServedModel) -> list[Prompt]:
    """The prompts of a completion request as token ids, cut to size where the request asks for that."""
    given = request.prompt
    parts = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    if len(parts) * request.num_choices > MAX_ANSWERS:
        raise bad_request(
            f"{len(parts)} prompts with n {request.num_choices}: a request may ask for {MAX_ANSWERS} answers", "n"
        )
    prompts = []
    for part in parts:
        text = part if isinstance(part, str) else None
        if text is None:
            ids: list[int] = part  # type: ignore[assignment]  # mypy doesn't see that the first element tells the type
        else:
            must_fit = request.truncate_prompt_tokens is None
            ids = encode(text, "prompt", model, add_special_tokens=request.add_special_tokens, must_fit=must_fit)
        prompts.append(Prompt(_fitted(ids, request, request.max_tokens, model, "prompt"), text))
    _check_total(prompts, request, "prompt")
    return prompts


def chat_prompt(text: str, request: ChatCompletionRequest, model: ServedModel) -> Prompt:
    """The prompt out of the text that the chat template made of the messages."""
    ids = chat_token_ids(text, request, model, must_fit=request.truncate_prompt_tokens is None)
    prompt = Prompt(_fitted(ids, request, chat_max_tokens(request), model, "messages"))
    _check_total([prompt], request, "messages")
    return prompt


def _check_total(prompts: list[Prompt], request: GenerationRequest, name: str) -> None:
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
    """The longest text that is tokenized; must_fit: that can fit into the context."""
    per_token = model.tokenizer.max_token_bytes
    in_context = model.max_model_len * (per_token or LONG_TOKEN)
    return in_context if must_fit and per_token is not None else max(MAX_TEXT, in_context)


def encode(text: str, name: str, model: ServedModel, *, add_special_tokens: bool, must_fit: bool) -> list[int]:
    """Token ids of a client's text. must_fit: one that can't fit into the context is refused, and not tokenized."""
    limit = max_text_bytes(model, must_fit=must_fit)
    size = _num_bytes(text, limit)
    if size > limit:
        why = f"{limit} is the most that is tokenized"
        if must_fit and model.tokenizer.max_token_bytes is not None:
            why = f"the context of this model is {model.max_model_len} tokens, and no text above {limit} bytes fits"
        raise bad_request(f"{name}: {size} bytes of text; {why}", name)
    try:
        return model.tokenizer.encode(text, add_special_tokens=add_special_tokens)
    except EncodingError as error:
        raise bad_request(f"{name}: {error}", name) from None


def _num_bytes(text: str, limit: int) -> int:
    """The size of a text in UTF-8; of one that is far from the limit, about."""
    if not limit / 4 < len(text) <= limit:
        return len(text)
    return len(text.encode("utf-8", "surrogatepass"))


def render_request(
    options: ChatOptions, model: ServedModel, documents: list[dict[str, Any]] | None = None
) -> RenderRequest:
    """What the process that renders chat templates is asked for these messages."""
    if options.chat_template is not None and not model.trust_request_chat_template:
        raise bad_request(
            "chat_template: a template is code, and this server does not run a client's "
            "(it would with --trust-request-chat-template)",
            "chat_template",
        )
    job = Job(
        messages=[_plain(message.model_dump(exclude_none=True)) for message in options.messages],
        template=options.chat_template,
        add_generation_prompt=options.add_generation_prompt,
        continue_final_message=options.continue_final_message,
        documents=documents,
        variables=options.chat_template_kwargs,
        max_characters=max_text_bytes(model, must_fit=False),
    )
    try:
        return model.renderer.request(job)
    except ChatTemplateError as error:
        raise bad_request(str(error), "messages") from error


async def rendered(request: RenderRequest, model: ServedModel) -> str:
    """The prompt as text; what the template refuses, or a limit that it exceeds, is a 400."""
    try:
        return await model.renderer.render(request)
    except ChatTemplateError as error:
        param = "chat_template" if request.origin == REQUEST_ORIGIN else "messages"
        raise bad_request(str(error), param) from error
    except RendererStoppedError as error:
        raise ApiError(503, str(error)) from error


def chat_token_ids(text: str, options: ChatOptions, model: ServedModel, *, must_fit: bool) -> list[int]:
    """Tokenize what the chat template made of the messages."""
    return encode(text, "messages", model, add_special_tokens=options.add_special_tokens, must_fit=must_fit)


def chat_max_tokens(request: ChatCompletionRequest) -> int | None:
    """The limit under its new name, or its old one."""
    return request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens


def sampling_params(
    request: GenerationRequest, model: ServedModel, *, room: int, max_tokens: int | None
) -> SamplingParams:
    """What the engine samples an answer by. max_tokens None: `room`, as many as the context leaves.

    0 (a prompt's log-probabilities only) becomes 1: the server drops that token.
    """
    defaults = model.defaults
    top_k = _first(request.top_k, defaults.get("top_k"), 0)
    limit = room if max_tokens is None else max(1, max_tokens)
    if request.min_tokens > limit:
        raise bad_request(f"min_tokens {request.min_tokens} is more than max_tokens, {limit}", "min_tokens")
    logprobs, prompt_logprobs = _logprobs(request, model)
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
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _first(*values: float | None) -> float:
    """The first value that is given."""
    return next(value for value in values if value is not None)


def _logprobs(request: GenerationRequest, model: ServedModel) -> tuple[int | None, int | None]:
    """(logprobs, prompt_logprobs): an echoed prompt's are reported as the answer's are."""
    prompt_logprobs = request.prompt_logprobs
    if isinstance(request, CompletionRequest):
        name = "logprobs"
        logprobs = request.logprobs
        if request.echo and logprobs is not None:
            prompt_logprobs = max(prompt_logprobs or 0, logprobs)
    else:
        assert isinstance(request, ChatCompletionRequest)
        name = "top_logprobs"
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
    for field, count in ((name, logprobs), ("prompt_logprobs", prompt_logprobs)):
        if count is not None and count > model.max_logprobs:
            raise bad_request(f"{field} {count} is above this server's limit, {model.max_logprobs}", field)
    return logprobs, prompt_logprobs


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


def _fitted(
    ids: list[int], request: GenerationRequest, max_tokens: int | None, model: ServedModel, name: str
) -> list[int]:
    """The prompt, checked against the context; its end, where truncate_prompt_tokens says so."""
    in_vocabulary(ids, name, model)
    wanted = max(1, max_tokens or 1)
    if request.truncate_prompt_tokens is not None:
        keep = request.truncate_prompt_tokens
        ids = ids[-(keep if keep > 0 else max(1, model.max_model_len - wanted)) :]
    if not ids:
        raise bad_request(f"{name}: the prompt is empty, and this tokenizer adds no beginning token to it", name)
    if len(ids) + wanted > model.max_model_len:
        limit = "max_tokens" if getattr(request, "max_completion_tokens", None) is None else "max_completion_tokens"
        raise bad_request(
            f"{name}: {len(ids)} tokens, and at least {wanted} are to follow; the context of this model is "
            f"{model.max_model_len} tokens. Shorten the prompt or lower {limit}",
            name if len(ids) >= model.max_model_len else limit,
        )
    return ids


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: the arguments of a call as an object, the content always there."""
    for call in message.get("tool_calls", ()):
        try:
            call["function"]["arguments"] = msgspec.json.decode(call["function"]["arguments"] or "{}")
        except (msgspec.DecodeError, RecursionError):
            raise bad_request("messages: tool_calls[].function.arguments is not JSON", "messages") from None
    if "reasoning" in message:
        message.setdefault("reasoning_content", message["reasoning"])
    message.setdefault("content", "")
    return message
