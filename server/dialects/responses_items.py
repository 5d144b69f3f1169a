"""Items of /v1/responses: what a request brings, and the messages that a conversation of items is for a chat template.

Items are kept as JSON, those that came and those that were answered alike, so that a conversation which goes on from a
stored response is made of the same things as one that is sent whole.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StringConstraints, Tag

from octavo.server.dialects.custom_input import wrapped
from octavo.server.dialects.fields import Open, Text, TextOption, text_or_list
from octavo.server.errors import bad_request

Json = dict[str, Any]
Name = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=256)]

MAX_ITEMS = 1 << 14
OUTPUTS = ("function_call_output", "custom_tool_call_output")
SEALED = "octavo:"  # in front of reasoning that was sent as encrypted_content


class TextContent(Open):
    """A piece of text, under the names that it has in each place."""

    type: Literal["input_text", "output_text", "text", "summary_text", "reasoning_text"]
    text: Text


class ImageContent(Open):
    """An image, for a model that sees: in a data: URL itself, or in a file that the server may read."""

    type: Literal["input_image"]
    image_url: Text


class RefusalContent(Open):
    """What an assistant said instead of an answer."""

    type: Literal["refusal"]
    refusal: Text


Content = Annotated[TextContent | ImageContent | RefusalContent, Field(discriminator="type")]
Contents = Annotated[list[Content], Field(max_length=MAX_ITEMS, fail_fast=True)]
TextOrContents = Annotated[TextOption | Annotated[Contents, Tag("<list>")], Discriminator(text_or_list)]


class MessageItem(Open):
    """What somebody said."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: TextOrContents


class FunctionCallItem(Open):
    """A call that the model made earlier."""

    type: Literal["function_call"]
    call_id: Name
    name: Name
    arguments: Text
    namespace: Name | None = None


class CustomToolCallItem(Open):
    """A call with free text that the model made earlier."""

    type: Literal["custom_tool_call"]
    call_id: Name
    name: Name
    input: Text
    namespace: Name | None = None


class CallOutputItem(Open):
    """What a call has brought."""

    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: Name
    output: TextOrContents


class ReasoningItem(Open):
    """What the model thought earlier; it goes back into the prompt where the chat template takes it."""

    type: Literal["reasoning"]
    summary: Contents | None = None
    content: Contents | None = None
    encrypted_content: Text | None = None


class ItemReference(Open):
    """An item of a stored response, by its id."""

    type: Literal["item_reference"] | None = None
    id: Name


def _kind_of_item(item: Any) -> str:
    """An item without a type is a message, or else a reference."""
    if not isinstance(item, dict):
        return "<item>"
    kind = item.get("type")
    if kind is None:
        return "message" if "role" in item else "item_reference"
    return kind if isinstance(kind, str) else "<item>"


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[CustomToolCallItem, Tag("custom_tool_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[CallOutputItem, Tag("custom_tool_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[ItemReference, Tag("item_reference")],
    Discriminator(_kind_of_item),
]
InputItems = Annotated[list[InputItem], Field(max_length=MAX_ITEMS, fail_fast=True)]

_PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
    "reasoning": "rs",
}


def item_id(kind: str, response_id: str, place: str) -> str:
    """The id of an item: it tells the response that the item belongs to, and where it stands there."""
    return f"{_PREFIXES[kind]}_{response_id.removeprefix('resp_')}{place}"


def response_of_item(item: str) -> str | None:
    """The id of the response that an item belongs to, by the item's own id."""
    digits = item.partition("_")[2][:32]
    return f"resp_{digits}" if len(digits) == 32 else None


def plain_items(given: str | Sequence[Open], response_id: str) -> list[Json]:
    """The items of a request as they are kept, each with an id. References stay references."""
    if isinstance(given, str):
        content = [{"type": "input_text", "text": given}]
        return [
            {
                "id": item_id("message", response_id, "i0000"),
                "type": "message",
                "role": "user",
                "status": "completed",
                "content": content,
            }
        ]
    return [_plain(item, response_id, f"i{number:04x}") for number, item in enumerate(given)]


def _plain(item: Open, response_id: str, place: str) -> Json:
    plain: Json = item.model_dump(exclude_none=True)
    if isinstance(item, ItemReference):
        return {"type": "item_reference", "id": item.id}
    if not isinstance(plain.get("id"), str):
        plain["id"] = item_id(plain["type"], response_id, place)
    if isinstance(item, MessageItem) and isinstance(item.content, str):
        kind = "output_text" if item.role == "assistant" else "input_text"
        plain["content"] = [{"type": kind, "text": item.content}]
    if plain["type"] != "reasoning":
        plain.setdefault("status", "completed")
    return plain


def seal(text: str) -> str:
    """Reasoning for a client that sends nothing back but encrypted_content. It hides nothing: the text is beside it."""
    return SEALED + base64.b64encode(text.encode()).decode()


def _unsealed(text: str) -> str:
    """What `seal` was given; nothing where another server has sealed it."""
    if not text.startswith(SEALED):
        return ""
    try:
        return base64.b64decode(text.removeprefix(SEALED), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""


def flat_name(name: str, namespace: str | None) -> str:
    """What the model calls a tool of a namespace."""
    return f"{namespace}__{name}" if namespace else name


def messages_of(items: Iterable[Json], instructions: str | None) -> list[Json]:
    """The chat messages of a conversation. Raises ApiError for the output of a call that was never made.

    One assistant's turn is one message, although its reasoning, its text and its calls are items of their own.
    """
    messages: list[Json] = [{"role": "system", "content": instructions}] if instructions else []
    calls: dict[str, str] = {}
    for item in items:
        match item["type"]:
            case "message":
                _add_message(messages, item)
            case "reasoning":
                if thought := _thought(item):
                    messages.append({"role": "assistant", "content": "", "reasoning_content": thought})
            case "function_call" | "custom_tool_call":
                calls[item["call_id"]] = flat_name(item["name"], item.get("namespace"))
                _add_call(messages, item)
            case _:
                if item["call_id"] not in calls:
                    raise bad_request(
                        f"input: an output is there for call_id {item['call_id'][:80]!r}, and no call before it has "
                        "this id",
                        "input",
                    )
                turn = {"role": "tool", "tool_call_id": item["call_id"], "name": calls[item["call_id"]]}
                messages.append({**turn, "content": _content(item["output"])})
    return messages


def _add_message(messages: list[Json], item: Json) -> None:
    """A developer is a system to templates; of several such messages in a row they get one."""
    text = _content(item["content"])
    role = "system" if item["role"] == "developer" else item["role"]
    last = messages[-1] if messages else {"role": ""}
    if isinstance(text, list):
        messages.append({"role": role, "content": text})
    elif role == "system" and last["role"] == "system" and isinstance(last["content"], str):
        last["content"] += "\n\n" + text
    elif role == "assistant" and last["role"] == "assistant" and not (last["content"] or last.get("tool_calls")):
        last["content"] = text
    else:
        messages.append({"role": role, "content": text})


def _add_call(messages: list[Json], item: Json) -> None:
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    arguments = item["arguments"] if item["type"] == "function_call" else wrapped(item["input"])
    function = {"name": flat_name(item["name"], item.get("namespace")), "arguments": arguments}
    call = {"id": item["call_id"], "type": "function", "function": function}
    messages[-1].setdefault("tool_calls", []).append(call)


def _thought(item: Json) -> str:
    """The reasoning itself; where only its summary was kept, that."""
    sealed = _unsealed(item.get("encrypted_content") or "")
    return _text(item.get("content") or []) or sealed or _text(item.get("summary") or [])


def _content(content: str | list[Json]) -> str | list[Json]:
    """Text, or parts where images are among them."""
    if isinstance(content, str) or all(part["type"] != "input_image" for part in content):
        return _text(content)
    return [part if part["type"] == "input_image" else {"type": "text", "text": _text([part])} for part in content]


def _text(content: str | list[Json]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part["refusal"] if part["type"] == "refusal" else part["text"] for part in content)
