"""What SGLang's /generate takes, and the completions that it stands for: one for each of its prompts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from octavo.server.dialects.completions import MAX_ANSWERS, CompletionRequest, TokenIds, prompts_of, wanted_of
from octavo.server.dialects.constraint_fields import Grammar, Schema
from octavo.server.dialects.constraint_fields import Tag as StructuralTag
from octavo.server.dialects.fields import (
    MAX_LOGPROB_TOKENS,
    MAX_TOKENS_SENT,
    Count,
    Flag,
    Integer,
    Number,
    StopString,
    StopStrings,
    Strict,
    Text,
    TokenId,
)
from octavo.server.dialects.native_sessions import SessionParams
from octavo.server.errors import ApiError, bad_request, explain, field_error
from octavo.server.generation import Choice, make_choices
from octavo.server.hints import NativeHints
from octavo.server.media.images import NO_IMAGES
from octavo.server.media.prompt import ReadImage
from octavo.server.media.sources import ImageSource
from octavo.server.prompts import Prompt, encode, fitted
from octavo.server.served_model import ServedModel
from octavo.server.sessions import Turn

NEW_TOKENS = 128  # SGLang's default
MAX_NAMED = 1 << 22  # log-probabilities of tokens that a request names, of all positions of its prompts
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")  # of a URL; base64 has no colon
ImageList = Annotated[list[Text], Field(max_length=2048, fail_fast=True)]
Start = Annotated[Integer, Field(ge=-1, lt=2**31)]
_OPENAI_NAMES = {  # of completions' fields, in SGLang's words
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "seed": "sampling_seed",
    "logprobs": "top_logprobs_num",
    "prompt_logprobs": "top_logprobs_num",
    "logprob_token_ids": "token_ids_logprob",
    "cache_salt": "extra_key",
}


class NativeSampling(Strict):
    """sampling_params."""

    max_new_tokens: Count | None = NEW_TOKENS
    min_new_tokens: Count | None = None
    stop: StopString | StopStrings | None = None
    stop_token_ids: list[TokenId] | None = None
    stop_regex: StopString | StopStrings | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Integer | None = None
    min_p: Number | None = None
    frequency_penalty: Number | None = None
    presence_penalty: Number | None = None
    repetition_penalty: Number | None = None
    n: Integer | None = None
    beam_width: Integer | None = None
    json_schema: Schema = None
    regex: Grammar | None = None
    ebnf: Grammar | None = None
    structural_tag: StructuralTag = None
    ignore_eos: Flag | None = None
    skip_special_tokens: Flag | None = None
    spaces_between_special_tokens: Flag | None = None
    no_stop_trim: Flag | None = None
    stream_interval: Integer | None = None
    logit_bias: dict[str, Number] | None = None
    sampling_seed: Integer | None = None
    custom_params: None = None
    watermark: Literal[False] | None = None

    def fields(self) -> dict[str, Any]:
        """The same in completions' words, without what is absent. max_new_tokens is left to `choices_of`."""
        found = self.model_dump(exclude_none=True, exclude={"max_new_tokens", "beam_width"})
        renamed = {
            "min_new_tokens": "min_tokens",
            "sampling_seed": "seed",
            "no_stop_trim": "include_stop_str_in_output",
        }
        found = {renamed.get(name, name): value for name, value in found.items()}
        if self.beam_width is not None and self.beam_width > 1:
            found |= {"use_beam_search": True, "best_of": self.beam_width}
        return found


def _kind(value: object) -> object:
    """An empty list has no first element, which would tell what is in it."""
    if isinstance(value, list) and not value:
        raise ValueError("must not be empty")
    return value


class GenerateRequest(NativeHints, Strict):
    """POST /generate. Where text or input_ids is a list of prompts, most other fields may be lists too, one for one."""

    text: Annotated[
        Text | Annotated[list[Text], Field(max_length=2048, fail_fast=True)] | None, BeforeValidator(_kind)
    ] = None
    input_ids: Annotated[
        TokenIds | Annotated[list[TokenIds], Field(max_length=2048, fail_fast=True)] | None, BeforeValidator(_kind)
    ] = None
    sampling_params: NativeSampling | Annotated[list[NativeSampling], Field(max_length=2048)] | None = None
    return_logprob: Flag | list[Flag] | None = None
    logprob_start_len: Start | list[Start] | None = None
    top_logprobs_num: Count | list[Count] | None = None
    token_ids_logprob: (
        Annotated[list[TokenId], Field(max_length=MAX_LOGPROB_TOKENS, fail_fast=True)]
        | list[Annotated[list[TokenId], Field(max_length=MAX_LOGPROB_TOKENS, fail_fast=True)]]
        | None
    ) = None
    return_text_in_logprobs: Flag = False
    stream: Flag = False
    rid: Text | list[Text] | None = None
    priority: Integer | None = None
    session_params: SessionParams | None = None
    extra_key: Text | list[Text] | None = None  # what cache_salt is in OpenAI's dialects
    lora_path: Text | Annotated[list[Text | None], Field(max_length=2048)] | None = None  # an adapter's name
    # of one prompt an image or several, of a list of prompts such a value for each
    image_data: Text | Annotated[list[Text | ImageList | None], Field(max_length=2048)] | None = None
    # not supported: accepted only where they ask for nothing
    input_embeds: None = None
    video_data: None = None
    audio_data: None = None
    modalities: None = None
    custom_logit_processor: None = None
    return_hidden_states: Literal[False] | None = None
    return_routed_experts: Literal[False] | None = None
    return_entropy: Literal[False] | None = None
    require_reasoning: Literal[False] | None = None
    background: Literal[False] | None = None
    no_logs: Literal[False] | None = None
    data_parallel_rank: Literal[0] | None = None
    bootstrap_host: None = None
    bootstrap_port: None = None
    bootstrap_room: None = None
    http_worker_ipc: None = None

    @model_validator(mode="after")
    def _check_prompt(self) -> GenerateRequest:
        if (self.text is None) == (self.input_ids is None):
            raise field_error("text", "exactly one of text and input_ids is needed")
        if self.image_data and self.session_params is not None:
            raise field_error("image_data", "image_data: a session has no images")
        params = self.sampling_params
        searches = isinstance(params, NativeSampling) and (params.beam_width or 1) > 1
        if self.session_params is not None and (self.is_batch or searches):
            raise field_error("session_params", "session_params is for one prompt with one answer")
        return self

    @property
    def _has_prompts(self) -> bool:
        """Whether there is a list of prompts, be it of one."""
        given: Any = self.text if self.text is not None else self.input_ids
        return isinstance(given, list) if self.text is not None else isinstance(given[0], list)

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, be it one."""
        if self.text is not None:
            return [self.text] if isinstance(self.text, str) else self.text
        ids: Any = self.input_ids
        return ids if isinstance(ids[0], list) else [ids]

    @property
    def image_urls(self) -> list[list[str]]:
        """Those of each prompt: as URLs, or base64 without a word of what it is."""
        given = self.image_data
        of_prompts = given if self._has_prompts and isinstance(given, list) else [given]
        return [list(_flat(one)) for one in of_prompts]

    @property
    def is_batch(self) -> bool:
        """Whether the answer is a list, as there are several prompts or answers."""
        params = self.sampling_params
        return self._has_prompts or (isinstance(params, NativeSampling) and (params.n or 1) > 1)


@dataclass(frozen=True)
class Item:
    """One prompt of a request, with its own values of the fields that may be lists. start: see logprob_start_len."""

    request: CompletionRequest
    rid: str | None
    returns_logprob: bool
    start: int
    num_top: int
    named: list[int]
    limit: int | None


def names_in(body: GenerateRequest) -> dict[str, str]:
    """What the fields of the completions that a request stands for are called in it, for errors."""
    return _OPENAI_NAMES | {"prompt": "input_ids" if body.text is None else "text"}


def items_of(body: GenerateRequest) -> list[Item]:
    """Raises ApiError."""
    prompts = body.prompts
    count = len(prompts)
    named: Any = body.token_ids_logprob
    named = named if named and isinstance(named[0], list) else [named] * count
    params = _each("sampling_params", body.sampling_params or NativeSampling(), count)
    returns = _each("return_logprob", body.return_logprob or False, count)
    starts = _each("logprob_start_len", -1 if body.logprob_start_len is None else body.logprob_start_len, count)
    tops = _each("top_logprobs_num", body.top_logprobs_num or 0, count)
    rids = _each("rid", body.rid, count)
    salts = _each("extra_key", body.extra_key, count)
    adapters = _each("lora_path", body.lora_path, count)
    _check_count("token_ids_logprob", named, count)
    return [
        _item(
            {"model": adapter or None, "prompt": prompt, "priority": body.priority, "cache_salt": salt or None},
            sampling,
            bool(returned),
            start,
            top,
            own or [],
            rid,
        )
        for prompt, sampling, returned, start, top, own, rid, salt, adapter in zip(
            prompts, params, returns, starts, tops, named, rids, salts, adapters, strict=True
        )
    ]


def _each(name: str, value: Any, count: int) -> list[Any]:
    if not isinstance(value, list):
        return [value] * count
    _check_count(name, value, count)
    return value


def _check_count(name: str, values: Sequence[object], count: int) -> None:
    if len(values) != count:
        raise bad_request(f"{name}: {len(values)} values for {count} prompts", name)


def _item(
    common: dict[str, Any],
    sampling: NativeSampling,
    returned: bool,
    start: int,
    top: int,
    named: list[int],
    rid: str | None,
) -> Item:
    fields: dict[str, Any] = {**common, "max_tokens": 1, **sampling.fields()}
    if returned:
        fields |= {"logprobs": top, "logprob_token_ids": named or None}
        if start >= 0:
            fields["prompt_logprobs"] = top
    try:
        request = CompletionRequest.model_validate(fields)
    except ValidationError as error:
        message, param = explain(error.errors(include_url=False), fields)
        raise ApiError(400, message, param=param) from None
    return Item(request, rid, returned, start, top, named, sampling.max_new_tokens)


async def images_of(body: GenerateRequest, model: ServedModel) -> list[list[ReadImage]]:
    """The images of each prompt, decoded; nothing where there are none. Raises ApiError."""
    if not body.image_data:
        return []
    urls = body.image_urls
    _check_count("image_data", urls, len(body.prompts))
    sources = [[_source(url, number) for number, url in enumerate(own, 1)] for own in urls]
    first = next((own[0] for own in sources if own), None)
    if first is not None and model.images is None:
        raise first.refusal(NO_IMAGES)
    return [] if model.images is None else [await model.images.read(own) for own in sources]


def choices_of(items: Sequence[Item], model: ServedModel, images: Sequence[Sequence[ReadImage]] = ()) -> list[Choice]:
    """The answers to all prompts. max_new_tokens above what the context leaves means what it leaves, as in SGLang.

    images: of each prompt; (): nobody has any.
    """
    if sum(item.request.num_choices for item in items) > MAX_ANSWERS:
        raise bad_request(f"a request may ask for {MAX_ANSWERS} answers", "n")
    if len({bool(item.request.use_beam_search) for item in items}) > 1:
        raise bad_request("beam_width: all prompts of a request are searched, or none", "beam_width")
    choices: list[Choice] = []
    total = 0
    for item, own_images in zip(items, images or [()] * len(items), strict=True):
        if item.request.model is not None and model.adapter(item.request.model) is None:
            raise bad_request(f"lora_path: the adapter {item.request.model[:80]!r} is not loaded", "lora_path")
        prompt = _prompt_of(item.request, own_images, model)
        total += len(prompt.token_ids) * item.request.num_choices
        room = prompt.room(model)
        limit = room if item.limit is None else min(room, item.limit)
        _check_logprob_start(item, len(prompt.token_ids))
        wanted = replace(wanted_of(item.request), max_tokens=limit, named_beside=True)
        own = make_choices([prompt], item.request, wanted, model)
        for choice in own:
            choice.index += len(choices)
        choices += own
    if total > MAX_TOKENS_SENT:
        raise bad_request(f"{total} tokens of prompts; a request may send {MAX_TOKENS_SENT}", "text")
    return choices


def _flat(given: Any) -> Iterator[str]:
    if isinstance(given, list):
        for one in given:
            yield from _flat(one)
    elif given:
        yield given


def _source(given: str, number: int) -> ImageSource:
    return ImageSource(given if SCHEME.match(given) else f"data:;base64,{given}", "image_data", number)


def _prompt_of(request: CompletionRequest, images: Sequence[ReadImage], model: ServedModel) -> Prompt:
    """The prompt of an item, with what stands for its images; token ids may have it already, as those of /tokenize."""
    if model.images is None or not images:
        return prompts_of(request, model)[0]
    if not isinstance(request.prompt, str):
        ids = fitted(cast("list[int]", request.prompt), request, wanted_of(request), model, "input_ids")
        ids = model.images.expanded_ids(ids, images, model.tokenizer, "input_ids")
        [prompt] = prompts_of(request.model_copy(update={"prompt": ids}), model)
        return replace(prompt, images=model.images.placed(prompt.token_ids, images, "input_ids"))
    text = model.images.expanded(str(request.prompt), images, "text")
    own = {"add_special_tokens": False} if model.images.wants_one else {}
    [prompt] = prompts_of(request.model_copy(update={"prompt": text, **own}), model)
    return replace(prompt, images=model.images.placed(prompt.token_ids, images, "text"))


def rid_of(body: GenerateRequest, name: str) -> str:
    """What the answer to one prompt is called: as the client says, or by the request's name."""
    rid = body.rid[0] if isinstance(body.rid, list) and body.rid else body.rid
    return rid if isinstance(rid, str) and rid else f"{name}-0"


def continued(body: GenerateRequest, turn: Turn, model: ServedModel) -> GenerateRequest:
    """The request with its session's tokens in front of its own, which have no BOS token then. Raises ApiError."""
    ids: Any = body.input_ids
    if isinstance(body.text, str):
        ids = encode(body.text, "text", model, add_special_tokens=True, must_fit=True)
    bos = model.tokenizer.token_id(model.tokenizer.special_tokens.get("bos_token"))
    if turn.parent is not None and bos is not None and ids[:1] == [bos]:
        ids = ids[1:]
    return body.model_copy(update={"text": None, "input_ids": [*turn.before, *ids]})


def _check_logprob_start(item: Item, length: int) -> None:
    """Raise ApiError where the prompt has no token there, or too many log-probabilities are asked of it."""
    if not item.returns_logprob or item.start < 0:
        return
    if item.start >= length:
        raise bad_request(
            f"logprob_start_len {item.start}: the prompt has {length} tokens, of which the first is 0",
            "logprob_start_len",
        )
    if length * len(item.named) > MAX_NAMED:
        raise bad_request(
            f"token_ids_logprob: {len(item.named)} tokens at {length} positions of the prompt; a request may ask for "
            f"{MAX_NAMED} log-probabilities. Name fewer, or leave out logprob_start_len",
            "token_ids_logprob",
        )
