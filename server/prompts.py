"""From a validated request to what the engine samples by: the checks that need the model, and its defaults."""

from __future__ import annotations

from dataclasses import dataclass

import re2

from octavo.runtime.messages import Constraint, RepetitionDetection, SamplingParams
from octavo.runtime.vision.recipes import PromptImage
from octavo.server.dialects.fields import ALL_LOGPROBS, MAX_TOKENS_SENT, GenerationRequest
from octavo.server.errors import bad_request, too_long
from octavo.server.served_model import ServedModel
from octavo.text.detokenizer import Pattern
from octavo.text.tokenizer import EncodingError

LONG_TOKEN = 64  # bytes of a token, where a tokenizer sets no limit to what one token stands for
MAX_PATTERN_BYTES = 1 << 20  # of memory that a compiled stop pattern may take
MAX_TEXT = 1 << 22  # bytes of text that are tokenized where the context sets no limit; that takes seconds
NOT_IN_BEAMS: dict[str, tuple[object, ...]] = {  # fields, and the values that ask for nothing
    "stop": (None, []),
    "stop_regex": (None, []),
    "stop_token_ids": (None, []),
    "bad_words": (None, []),
    "logit_bias": (None, {}),
    "allowed_token_ids": (None,),
    "min_tokens": (0,),
    "top_p": (None, 1),
    "top_k": (None, 0, -1),
    "min_p": (None, 0),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "logprob_token_ids": (None, []),
    "repetition_detection": (None,),
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """What one answer, or n of them, continue. `text` is the client's own, where it gave text.

    decoder_ids: of an encoder-decoder, which reads token_ids, what its decoder begins with; None: the model's own.
    """

    token_ids: list[int]
    text: str | None = None
    images: tuple[PromptImage, ...] = ()
    decoder_ids: list[int] | None = None

    def begin(self, model: ServedModel) -> list[int]:
        """The tokens that the answer goes on from."""
        if model.encoder is None:
            return self.token_ids
        return [model.encoder.start_id] if self.decoder_ids is None else self.decoder_ids

    def room(self, model: ServedModel) -> int:
        """How many tokens the answer may have."""
        return model.max_model_len - len(self.begin(model))


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request asks of each answer in fields that dialects name differently; the names are for errors.

    max_tokens None: as many as the context leaves. logprobs, prompt_logprobs None: none. end_ids: tokens that end an
    answer beside the model's own, because of the prompt's form. named_beside: the tokens that logprob_token_ids names
    are reported behind the likeliest ones, and for the prompt too; else they stand in place of the answer's likeliest.
    clamps: max_tokens above what the context leaves means what it leaves, whatever --max-tokens-policy says.
    """

    max_tokens: int | None
    logprobs: int | None
    prompt_logprobs: int | None
    limit_name: str = "max_tokens"
    logprobs_name: str = "logprobs"
    end_ids: tuple[int, ...] = ()
    named_beside: bool = False
    clamps: bool = False

    def limit(self, room: int, model: ServedModel) -> int:
        """Tokens that the engine may make where the context leaves `room`: one at least, though none be wanted."""
        if self.max_tokens is None:
            return room
        most = max(1, self.max_tokens)
        return min(most, room) if self.clamps or model.clamps_max_tokens else most


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
    in_context = model.max_prompt_len * (per_token or LONG_TOKEN)
    return in_context if must_fit and per_token is not None else max(MAX_TEXT, in_context)


def encode(
    text: str, name: str, model: ServedModel, *, add_special_tokens: bool, must_fit: bool, is_answer: bool = False
) -> list[int]:
    """Token ids of a client's text. must_fit: one that can't fit into the context is refused, and not tokenized.

    is_answer: as of `Tokenizer.encode`.
    """
    limit = max_text_bytes(model, must_fit=must_fit)
    size = _num_bytes(text, limit)
    if size > limit:
        if must_fit and model.tokenizer.max_token_bytes is not None:
            why = f"{name}: {size} bytes of text, and none above {limit} bytes fits. Shorten the prompt"
            raise too_long(model.max_prompt_len, why, name)
        raise bad_request(f"{name}: {size} bytes of text; {limit} is the most that is tokenized", name)
    try:
        return model.tokenizer.encode(text, add_special_tokens=add_special_tokens, is_answer=is_answer)
    except EncodingError as error:
        raise bad_request(f"{name}: {error}", name) from None


def _num_bytes(text: str, limit: int) -> int:
    """The size of a text in UTF-8; approximate where it is far from the limit."""
    if not limit / 4 < len(text) <= limit:
        return len(text)
    return len(text.encode("utf-8", "surrogatepass"))


def check_priority(priority: int | None, model: ServedModel) -> None:
    """Raise ApiError where the server takes requests as they come."""
    if priority and model.scheduling_policy != "priority":
        raise bad_request(
            f"priority {priority}: this server takes requests as they come (it would obey with "
            "--scheduling-policy priority)",
            "priority",
        )


def sampling_params(
    request: GenerationRequest, wanted: Wanted, model: ServedModel, room: int, constraint: Constraint | None = None
) -> SamplingParams:
    """What the engine samples an answer by; `room` is how many tokens the context leaves.

    max_tokens 0 (a prompt's log-probabilities only) becomes 1: the server drops that token.
    """
    defaults = model.defaults
    top_k = _first(request.top_k, defaults.get("top_k"), 0)
    limit = wanted.limit(room, model)
    if request.min_tokens > limit:
        raise bad_request(f"min_tokens {request.min_tokens} is more than max_tokens, {limit}", "min_tokens")
    _check_logprobs(request, wanted, model)
    check_priority(request.priority, model)
    if request.use_beam_search:
        _check_beams(request, wanted, constraint)
    allowed = in_vocabulary(request.allowed_token_ids, "allowed_token_ids", model)
    stops = () if request.ignore_eos else (*model.end_ids, *wanted.end_ids)
    named = in_vocabulary(request.logprob_token_ids, "logprob_token_ids", model) or ()
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
        logprobs=0 if named and not wanted.named_beside else _num_likeliest(wanted.logprobs, model),
        prompt_logprobs=_num_likeliest(wanted.prompt_logprobs, model),
        constraint=constraint,
        forbidden=_bad_words(request, model),
        logprob_token_ids=named,
        prompt_logprob_token_ids=named if wanted.named_beside and wanted.prompt_logprobs is not None else (),
        repetition=_repetition(request),
    )


def _num_likeliest(count: int | None, model: ServedModel) -> int | None:
    return model.vocab_size if count == ALL_LOGPROBS else count


def _check_logprobs(request: GenerationRequest, wanted: Wanted, model: ServedModel) -> None:
    for field, count in ((wanted.logprobs_name, wanted.logprobs), ("prompt_logprobs", wanted.prompt_logprobs)):
        num = _num_likeliest(count, model)
        if num is not None and num > model.max_logprobs:
            what = f"{field} {count}" if num == count else f"{field} {count}, the whole vocabulary of {num},"
            raise bad_request(f"{what} is above this server's limit, {model.max_logprobs} (--max-logprobs)", field)
    if model.encoder is not None and wanted.prompt_logprobs is not None:
        raise bad_request(
            "prompt_logprobs: this model's encoder reads the prompt, and predicts none of its tokens", "prompt_logprobs"
        )
    if request.logprob_token_ids and wanted.logprobs is None:
        raise bad_request("logprob_token_ids needs logprobs: they stand in place of the likeliest", "logprob_token_ids")


def _check_beams(request: GenerationRequest, wanted: Wanted, constraint: Constraint | None) -> None:
    """Beams are ranked by the model's own log-probabilities: nothing may change them, or end one of them alone."""
    wrong = next((name for name, neutral in NOT_IN_BEAMS.items() if getattr(request, name) not in neutral), None)
    if wanted.prompt_logprobs is not None:
        wrong = "prompt_logprobs"
    if wrong is not None:
        raise bad_request(f"{wrong} is not available with use_beam_search: true", wrong)
    if constraint is not None:
        raise bad_request("use_beam_search: an answer with a constraint is sampled; leave out one of both")
    if wanted.max_tokens == 0:
        raise bad_request(f"use_beam_search: {wanted.limit_name} 0 leaves nothing to search", wanted.limit_name)


def _bad_words(request: GenerationRequest, model: ServedModel) -> tuple[tuple[int, ...], ...]:
    """The token sequences of each word, at the beginning of a text and behind a space."""
    found: dict[tuple[int, ...], None] = {}
    for word in request.bad_words or ():
        for text in (word.lstrip(), " " + word.lstrip()):
            ids = encode(text, "bad_words", model, add_special_tokens=False, must_fit=False, is_answer=True)
            if ids:
                found[tuple(ids)] = None
    return tuple(found)


def _repetition(request: GenerationRequest) -> RepetitionDetection | None:
    rule = request.repetition_detection
    if rule is None or rule.max_pattern_size == 0:
        return None
    return RepetitionDetection(rule.max_pattern_size, rule.min_pattern_size, rule.min_count)


def stop_patterns(request: GenerationRequest) -> list[Pattern]:
    """The regular expressions that end an answer, compiled. Raises ApiError."""
    options = re2.Options()
    options.log_errors = False
    options.max_mem = MAX_PATTERN_BYTES
    found = []
    for text in request.stop_patterns:
        try:
            found.append(re2.compile(text, options))
        except re2.error as error:
            reason = error.args[0].decode() if isinstance(error.args[0], bytes) else error
            raise bad_request(
                f"stop_regex: {text[:80]!r} is no regular expression of RE2: {reason}", "stop_regex"
            ) from None
    return found


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
    """The prompt, checked against the context; its end or beginning, where truncate_prompt_tokens says so."""
    in_vocabulary(ids, name, model)
    context = model.max_prompt_len
    num_wanted = max(1, wanted.max_tokens or 1)
    if request.truncate_prompt_tokens is not None:
        keep = request.truncate_prompt_tokens
        if keep > context:
            raise bad_request(
                f"truncate_prompt_tokens {keep} is more than the context of this model, {context} tokens; "
                "-1 keeps what the context holds",
                "truncate_prompt_tokens",
            )
        least = num_wanted if num_wanted < context else min(num_wanted, wanted.limit(1, model))
        least = 0 if model.encoder is not None else least  # what its decoder writes stands elsewhere
        count = keep if keep > 0 else max(1, context - least)
        ids = ids[:count] if request.truncation_side == "right" else ids[-count:]
    if not ids:
        raise bad_request(f"{name}: the prompt is empty, and this tokenizer adds no beginning token to it", name)
    if model.encoder is not None:
        return _read(ids, model, name)
    num_wanted = min(num_wanted, wanted.limit(max(1, context - len(ids)), model))
    if len(ids) + num_wanted > context:
        raise too_long(
            context,
            f"However, {name} has {len(ids)} tokens, and at least {num_wanted} are to follow. Shorten the prompt or "
            f"lower {wanted.limit_name}",
            name if len(ids) >= context else wanted.limit_name,
        )
    return ids


def _read(ids: list[int], model: ServedModel, name: str) -> list[int]:
    """A prompt that an encoder reads, checked against what it can."""
    if len(ids) > model.max_prompt_len:
        raise too_long(
            model.max_prompt_len,
            f"However, {name} has {len(ids)} tokens, which its encoder can't read. Shorten the prompt; "
            "truncate_prompt_tokens cuts it, and --max-source-len says what the encoder reads",
            name,
        )
    return ids


def check_room(limit: int, room: int, wanted: Wanted, model: ServedModel) -> None:
    """Raise ApiError where a decoder that continues no prompt is to write more than it can."""
    if model.encoder is not None and limit > room:
        raise too_long(
            model.max_model_len,
            f"However, {wanted.limit_name} is {limit}, and its decoder writes {room}. Lower {wanted.limit_name}",
            wanted.limit_name,
        )


def decoder_begin(given: str | list[int], model: ServedModel) -> list[int]:
    """What the decoder of an encoder-decoder begins with, of a client's text or ids: its start first, as in vLLM."""
    if model.encoder is None:
        raise bad_request("decoder_prompt: this model has no encoder, and goes on from a prompt", "decoder_prompt")
    ids = given
    if isinstance(ids, str):
        ids = encode(ids, "decoder_prompt", model, add_special_tokens=False, must_fit=False, is_answer=True)
    in_vocabulary(ids, "decoder_prompt", model)
    begin = ids if ids[:1] == [model.encoder.start_id] else [model.encoder.start_id, *ids]
    if len(begin) >= model.max_model_len:
        raise too_long(model.max_model_len, f"However, decoder_prompt has {len(begin)} tokens", "decoder_prompt")
    return begin
