"""From what a program asks to the server's own requests: sampling parameters, prompts, conversations."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

import msgspec
from pydantic import BaseModel, ValidationError

from octavo.inputs import Given
from octavo.lora_request import LoRARequest
from octavo.offline.pictures import data_url_of, with_urls
from octavo.sampling_params import BeamSearchParams, SamplingParams
from octavo.server.dialects.conversation import (
    ChatMessage,
    ChatOptions,
    image_sources,
    render_request,
    rendered,
)
from octavo.server.dialects.fields import GenerationRequest, Strict
from octavo.server.dialects.tools import ToolHints, ToolOptions, Tools, as_functions, reading_of
from octavo.server.errors import bad_request, explain
from octavo.server.generation import Choice, make_choices
from octavo.server.media.images import NO_IMAGES
from octavo.server.media.prompt import ReadImage
from octavo.server.media.sources import ImageSource
from octavo.server.prompts import Prompt, Wanted, decoder_begin, encode, fitted
from octavo.server.reading import Reading
from octavo.server.served_model import ServedModel
from octavo.server.template_renderer import RenderRequest

Kind = TypeVar("Kind", bound=BaseModel)
SAME = (  # fields of SamplingParams that a request has, under the same name
    "n", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k", "min_p",
    "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens", "prompt_logprobs", "logprob_token_ids",
    "skip_special_tokens", "include_stop_str_in_output", "allowed_token_ids", "bad_words", "truncate_prompt_tokens",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Asked:
    """How prompts are to be answered: the server's request, and what each of its dialects names differently.

    logprobs: of the likeliest tokens, how many are told; None: none at all. decodes: answers have text. budget: the
    most tokens of their reasoning; None: no limit. adapter: what the model answers with; None: alone.
    """

    request: GenerationRequest
    wanted: Wanted
    logprobs: int | None = None
    decodes: bool = True
    budget: int | None = None
    adapter: LoRARequest | None = None

    def adapted(self, adapter: LoRARequest | None) -> Asked:
        """The same of an adapter, which is loaded by then."""
        if adapter is None:
            return self
        return replace(self, request=self.request.model_copy(update={"model": adapter.lora_name}), adapter=adapter)

    def own(self, given: Given | Conversation, priority: int) -> Asked:
        """The same with what one prompt brings."""
        changes: dict[str, object] = {"priority": priority, "cache_salt": given.cache_salt}
        kept = {name: value for name, value in changes.items() if value}
        return replace(self, request=self.request.model_copy(update=kept)) if kept else self


class _ToolList(Strict):
    tools: Tools


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages on their way through the chat template.

    messages, tools: the same, and what it shows, as the server knows them; kept where answers are told apart. sources:
    of its images.
    """

    asked: RenderRequest
    sources: Sequence[ImageSource] = ()
    messages: Sequence[ChatMessage] = ()
    tools: Sequence[dict[str, Any]] = ()
    cache_salt: None = None


class Written(NamedTuple):
    """A prompt as text or token ids, and its images, decoded. adds_special: the tokenizer adds its special tokens."""

    given: Given
    adds_special: bool
    images: Sequence[ReadImage] = ()


@dataclass(slots=True)
class Job:
    """One prompt, and how it is to be answered."""

    request_id: str
    given: Given | Conversation
    asked: Asked


def asked_by(params: SamplingParams) -> Asked:
    """What sampling parameters ask. Raises ValueError and ApiError."""
    params.check()
    fields = {name: value for name in SAME if (value := getattr(params, name)) is not None}
    if params.logit_bias:
        fields["logit_bias"] = {str(token): max(-100.0, min(100.0, bias)) for token, bias in params.logit_bias.items()}
    if params.structured_outputs is not None:
        fields["structured_outputs"] = params.structured_outputs.given()
    if params.repetition_detection is not None:
        fields["repetition_detection"] = msgspec.to_builtins(params.repetition_detection)
    logprobs = params.logprobs
    if logprobs is None and params.logprob_token_ids:
        logprobs = 0
    wanted = Wanted(params.max_tokens, logprobs, params.prompt_logprobs, clamps=True)
    budget = params.thinking_token_budget
    return Asked(
        _validated(GenerationRequest, fields), wanted, logprobs, params.detokenize, None if budget == -1 else budget
    )


def asked_by_beams(params: BeamSearchParams, model: ServedModel) -> Asked:
    """What a beam search asks; log-probabilities are told as vLLM's search looks at them, two for each beam."""
    fields = {
        "n": params.beam_width,
        "use_beam_search": True,
        "length_penalty": params.length_penalty,
        "ignore_eos": params.ignore_eos,
        "include_stop_str_in_output": params.include_stop_str_in_output,
        "skip_special_tokens": params.skip_special_tokens,
    }
    logprobs = min(2 * params.beam_width, model.max_logprobs)
    wanted = Wanted(params.max_tokens, logprobs, None, clamps=True)
    return Asked(_validated(GenerationRequest, fields), wanted, logprobs)


def _validated(kind: type[Kind], fields: dict[str, Any]) -> Kind:
    """Raises ApiError, in the server's words for it."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        message, param = explain(error.errors(include_url=False), fields)
    raise bad_request(message, param)


def conversation_of(
    messages: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    tools: list[Any] | None,
    model: ServedModel,
    *,
    keeps: bool = False,
) -> Conversation:
    """One conversation for the chat template. options: fields of ChatOptions. keeps: its messages. Raises ApiError."""
    given = {name: value for name, value in options.items() if value is not None}
    chat = _validated(ChatOptions, {"messages": with_urls(messages), **given})
    known = as_functions(_validated(_ToolList, {"tools": tools}).tools) if tools else []
    shown = [tool.model_dump(exclude_none=True, exclude=set(ToolHints.model_fields)) for tool in known]
    asked = render_request(chat, model, tools=shown or None)
    sources = image_sources(chat, model)
    return Conversation(asked, sources, chat.messages, shown) if keeps else Conversation(asked, sources)


async def written(given: Given | Conversation, model: ServedModel) -> Written:
    """The prompt with its images read; a conversation has been through the template. Raises ApiError."""
    sources = given.sources if isinstance(given, Conversation) else await _sources_of(given)
    images: Sequence[ReadImage] = ()
    if sources:
        if model.images is None:
            raise sources[0].refusal(NO_IMAGES)
        images = await model.images.read(sources)
    if isinstance(given, Given):
        return Written(given, True, images)
    return Written(Given(await rendered(given.asked, model)), False, images)


async def _sources_of(given: Given) -> list[ImageSource]:
    urls = [await asyncio.to_thread(data_url_of, image, "prompt") for image in given.images]
    return [ImageSource(url, "prompt", number) for number, url in enumerate(urls, 1)]


def tokenized(found: Written, asked: Asked, model: ServedModel) -> Prompt:
    """The prompt as token ids, checked against the context. Raises ApiError."""
    given, adds_special, images = found
    request = asked.request
    ids = given.token_ids
    if images and request.truncate_prompt_tokens is not None:
        raise bad_request("truncate_prompt_tokens: a prompt with images is not cut", "truncate_prompt_tokens")
    if ids is None:
        text = given.text or ""
        if images and model.images is not None:
            text = model.images.expanded(text, images, "prompt")
            adds_special = adds_special and not model.images.wants_one
        must_fit = request.truncate_prompt_tokens is None
        ids = encode(text, "prompt", model, add_special_tokens=adds_special, must_fit=must_fit)
    elif images and model.images is not None:
        ids = fitted(ids, request, asked.wanted, model, "prompt")
        ids = model.images.expanded_ids(ids, images, model.tokenizer, "prompt")
    fitting = fitted(ids, request, asked.wanted, model, "prompt")
    prompt = Prompt(fitting, given.text, decoder_ids=_begin_of(given, model))
    if images and model.images is not None:
        prompt = replace(prompt, images=model.images.placed(prompt.token_ids, images, "prompt"))
    return prompt


def _begin_of(given: Given, model: ServedModel) -> list[int] | None:
    """What an encoder-decoder's decoder begins with, where the prompt says it: its start comes first, as in vLLM."""
    if given.names_encoder and model.encoder is None:
        raise bad_request("encoder_prompt: this model has no encoder, and goes on from a prompt", "encoder_prompt")
    decoder = given.decoder
    if decoder is None:
        return None
    return decoder_begin(decoder.token_ids or decoder.text or [], model)


def reading_for(given: Given | Conversation, prompt: Prompt, asked: Asked, model: ServedModel) -> Reading | None:
    """How the answer to a prompt is read where it is told apart: as the server reads it, but no call is enforced.

    Raises ApiError.
    """
    messages: Sequence[ChatMessage] = [ChatMessage(role="user", content="")]
    tools: Sequence[dict[str, Any]] = ()
    if isinstance(given, Conversation):
        messages = given.messages
        tools = given.tools
    options = _validated(ToolOptions, {"tools": list(tools) or None, "thinking_token_budget": asked.budget})
    text = model.tokenizer.decode(prompt.token_ids) if prompt.text is None else prompt.text
    reading = reading_of(text, options, messages, model)
    if asked.budget is not None and (reading is None or reading.reasoning is None):
        raise bad_request("thinking_token_budget: how this model writes its reasoning is not known", None)
    return None if reading is None else replace(reading, calls=None)


def choices_of(prompts: Sequence[tuple[Asked, Prompt, Reading | None]], model: ServedModel) -> list[Choice]:
    """The answers to these prompts at their beginning, side by side, with indexes of their own. Raises ApiError."""
    choices: list[Choice] = []
    for _, run in groupby(prompts, key=lambda it: (id(it[0]), id(it[2]))):
        alike = list(run)
        asked, _, reading = alike[0]
        choices += make_choices([prompt for _, prompt, _ in alike], asked.request, asked.wanted, model, reading)
    for index, choice in enumerate(choices):
        choice.index = index
    return choices
