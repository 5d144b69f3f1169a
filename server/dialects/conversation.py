"""Messages of a conversation, and how they become a prompt: shared by chat completions and /tokenize."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, StringConstraints, Tag, model_validator

from octavo.server.dialects.custom_input import wrapped
from octavo.server.dialects.fields import Flag, Open, Strict, Text, TextOption, text_or_list
from octavo.server.errors import ApiError, bad_request, field_error
from octavo.server.media.images import NO_IMAGES
from octavo.server.media.prompt import ReadImage
from octavo.server.media.sources import ImageSource
from octavo.server.message.probe import History
from octavo.server.prompts import encode, max_text_bytes
from octavo.server.served_model import ServedModel
from octavo.server.template_renderer import RendererStoppedError, RenderRequest
from octavo.text.chat_template import REQUEST_ORIGIN, ChatTemplateError
from octavo.text.template_process import Job

MAX_PARTS = 1 << 14  # messages of a conversation, with their parts and calls; each is an object, and takes 5 us
MAY_SAY_NOTHING = ("assistant", "tool", "function")  # an answer cut while the model thought, a call without a result
MAX_TEMPLATE_DATA = 1 << 20  # bytes, as JSON, of what goes to the chat template beside the messages


def bounded_json(value: Any) -> Any:
    """Refuse megabytes of values: a chat template would iterate over them."""
    size = len(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    if size > MAX_TEMPLATE_DATA:
        raise ValueError(f"{size} bytes as JSON; {MAX_TEMPLATE_DATA} is the most")
    return value


def bounded_parts(value: Any) -> Any:
    """Refuse a conversation of too many messages, parts and calls."""
    if isinstance(value, list):
        lists = [
            message.get(name) for message in value if isinstance(message, dict) for name in ("content", "tool_calls")
        ]
        count = len(value) + sum(len(parts) for parts in lists if isinstance(parts, list))
        if count > MAX_PARTS:
            raise ValueError(f"{count} messages, parts and calls; {MAX_PARTS} is the most")
    return value


class TextPart(Open):
    """A piece of a message, under the names that OpenAI's two dialects have for it; audio is refused."""

    type: Literal["text", "input_text", "output_text"]
    text: Text


class ImageUrl(Open):
    """Where an image is: in a data: URL itself, or in a file that the server may read."""

    url: Text


class ImagePart(Open):
    """An image, for a model that sees. What clients say of how closely to look changes nothing."""

    type: Literal["image_url", "input_image"]
    image_url: Annotated[
        Annotated[Text, Tag("<text>")] | Annotated[ImageUrl, Tag("<object>")],
        Discriminator(lambda value: "<text>" if isinstance(value, str) else "<object>"),
    ]

    @property
    def url(self) -> str:
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


class RefusalPart(Open):
    """What an assistant said instead of an answer."""

    type: Literal["refusal"]
    refusal: Text


class ThinkingPart(Open):
    """What an assistant thought before it answered."""

    type: Literal["thinking"]
    thinking: Text


class ReasoningPart(Open):
    """The same, as gateways write it."""

    type: Literal["reasoning"]
    text: Text


def _as_part(value: object) -> object:
    """A string among parts is a text, as in vLLM."""
    return {"type": "text", "text": value} if isinstance(value, str) else value


def _as_json(value: object) -> object:
    """Arguments as JSON text, whichever of both a client keeps."""
    return msgspec.json.encode(value).decode() if isinstance(value, dict) else value


THOUGHTS = (ThinkingPart, ReasoningPart)
AnyPart = Annotated[TextPart | ImagePart | RefusalPart | ThinkingPart | ReasoningPart, Field(discriminator="type")]
Part = Annotated[AnyPart, BeforeValidator(_as_part, json_schema_input_type=AnyPart | str)]
Parts = Annotated[list[Part], Field(fail_fast=True)]
Arguments = Annotated[Text, BeforeValidator(_as_json, json_schema_input_type=str | dict[str, Any])]


class FunctionCall(Open):
    """A call that an assistant made earlier in the conversation; its arguments are JSON, or an object."""

    name: Text
    arguments: Arguments = "{}"


class ToolCall(Open):
    """One call in an assistant's message; it is shown to the chat template."""

    id: Text | None = None
    type: Literal["function"] = "function"
    function: FunctionCall

    @model_validator(mode="before")
    @classmethod
    def _of_custom(cls, value: Any) -> Any:
        """A call with text is one of a function of one string."""
        custom = value.get("custom") if isinstance(value, dict) and value.get("type") == "custom" else None
        if not isinstance(custom, dict) or not isinstance(custom.get("input"), str):
            return value
        function = {"name": custom.get("name"), "arguments": wrapped(custom["input"])}
        return {**{key: value[key] for key in value if key != "custom"}, "type": "function", "function": function}


class ChatMessage(Open):
    """One message. Everything in it goes to the chat template, what only the client knows of it too."""

    role: Annotated[str, StringConstraints(strict=True, min_length=1, max_length=64)]
    content: Annotated[TextOption | Annotated[Parts, Tag("<list>")], Discriminator(text_or_list)] | None = None
    name: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: Text | None = None
    reasoning: Text | None = None
    reasoning_content: Text | None = None
    refusal: Text | None = None
    audio: None = None
    function_call: FunctionCall | None = None

    @model_validator(mode="after")
    def _check_content(self) -> ChatMessage:
        if self.content in (None, []) and self.role not in MAY_SAY_NOTHING:
            raise ValueError(f"content is missing; it may be left out where role is {' or '.join(MAY_SAY_NOTHING)}")
        return self


def _bounded_extra_keys(messages: list[ChatMessage]) -> list[ChatMessage]:
    """Refuse megabytes under keys that octavo doesn't know."""
    bounded_json([message.model_extra for message in messages if message.model_extra])
    return messages


class ChatOptions(Strict):
    """How messages become a prompt; shared by chat completions and /tokenize."""

    messages: Annotated[
        list[ChatMessage],
        Field(min_length=1, fail_fast=True),
        BeforeValidator(bounded_parts),
        AfterValidator(_bounded_extra_keys),
    ]
    add_generation_prompt: Flag = True
    continue_final_message: Flag = False
    chat_template: Text | None = None
    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(bounded_json)] | None = None
    add_special_tokens: Flag = False

    @model_validator(mode="after")
    def _check_ending(self) -> ChatOptions:
        if self.continue_final_message and self.add_generation_prompt:
            raise field_error("continue_final_message", "continue_final_message needs add_generation_prompt: false")
        return self


def render_request(
    options: ChatOptions,
    model: ServedModel,
    documents: list[dict[str, Any]] | None = None,
    tools: list[dict[str, Any]] | None = None,
) -> RenderRequest:
    """The job, for the process that renders chat templates, of making these messages a prompt."""
    if options.chat_template is not None and not model.trust_request_chat_template:
        raise bad_request(
            "chat_template: a template is code, and this server does not run a client's "
            "(it would with --trust-request-chat-template)",
            "chat_template",
        )
    job = Job(
        messages=[_plain(message, model.formats.found.history) for message in options.messages],
        template=options.chat_template,
        add_generation_prompt=options.add_generation_prompt,
        continue_final_message=options.continue_final_message,
        documents=documents,
        variables={**model.template_variables, **(options.chat_template_kwargs or {})},
        max_characters=max_text_bytes(model, must_fit=False),
        tools=tools,
    )
    try:
        return model.renderer.request(job)
    except ChatTemplateError as error:
        raise bad_request(str(error), "messages") from error


async def rendered(request: RenderRequest, model: ServedModel) -> str:
    """The prompt as text. A template that refuses the messages or exceeds a limit is a 400."""
    try:
        return await model.renderer.render(request)
    except ChatTemplateError as error:
        param = "chat_template" if request.origin == REQUEST_ORIGIN else "messages"
        raise bad_request(str(error), param) from error
    except RendererStoppedError as error:
        raise ApiError(503, str(error)) from error


async def images_of(options: ChatOptions, model: ServedModel) -> list[ReadImage]:
    """The images of a conversation, decoded. Raises ApiError, also where the model reads text alone."""
    sources = image_sources(options, model)
    return [] if model.images is None or not sources else await model.images.read(sources)


def image_sources(options: ChatOptions, model: ServedModel) -> list[ImageSource]:
    """Where the images of a conversation come from. Raises ApiError where the model reads text alone."""
    contents = [message.content for message in options.messages if isinstance(message.content, list)]
    urls = [part.url for content in contents for part in content if isinstance(part, ImagePart)]
    sources = [ImageSource(url, "messages", number) for number, url in enumerate(urls, 1)]
    if sources and model.images is None:
        raise sources[0].refusal(NO_IMAGES)
    return sources


def chat_token_ids(
    text: str, options: ChatOptions, model: ServedModel, images: Sequence[ReadImage], *, must_fit: bool
) -> list[int]:
    """Tokenize what the chat template made of the messages, with all that stands for their images."""
    if images and model.images is not None:
        text = model.images.expanded(text, images)
    return encode(text, "messages", model, add_special_tokens=options.add_special_tokens, must_fit=must_fit)


def _plain(message: ChatMessage, history: History) -> dict[str, Any]:
    """A message as the template expects it: text, thoughts and calls each in one place."""
    plain = message.model_dump(exclude_none=True, exclude={"content", "refusal", "function_call", "cache_control"})
    if not message.tool_calls:
        plain.pop("tool_calls", None)
    if message.function_call is not None:
        plain.setdefault("tool_calls", []).append({"type": "function", "function": message.function_call.model_dump()})
    for call in plain.get("tool_calls", ()):
        if history.arguments_are_objects:
            call["function"]["arguments"] = _arguments(call["function"]["arguments"])
    thoughts = message.reasoning_content or message.reasoning or _thoughts(message)
    if thoughts:
        plain["reasoning_content"] = thoughts
    text = text_of_message(message)
    if text or not plain.get("tool_calls") or history.empty_content == "empty":
        plain["content"] = text
    elif history.empty_content == "null":
        plain["content"] = None
    return plain


def _arguments(text: str) -> Any:
    """The arguments of a call as an object. What is no JSON was cut by max_tokens, and is shown as it is."""
    try:
        return msgspec.json.decode(text or "{}")
    except (msgspec.DecodeError, RecursionError):
        return {"arguments": text}


def _thoughts(message: ChatMessage) -> str:
    parts = message.content if isinstance(message.content, list) else []
    thoughts = [part for part in parts if isinstance(part, THOUGHTS)]
    return "\n".join(part.thinking if isinstance(part, ThinkingPart) else part.text for part in thoughts)


def text_of_message(message: ChatMessage) -> str | list[dict[str, str]]:
    """Text, or parts of text and images: thoughts are no part of it, and a refusal is what was said."""
    if isinstance(message.content, str):
        return message.content
    parts = [_shown(part) for part in message.content or () if not isinstance(part, THOUGHTS)]
    return parts or message.refusal or ""


def _shown(part: TextPart | ImagePart | RefusalPart) -> dict[str, str]:
    """A part as chat templates know it: the image itself is none of theirs."""
    if isinstance(part, ImagePart):
        return {"type": "image"}
    return {"type": "text", "text": part.refusal if isinstance(part, RefusalPart) else part.text}
