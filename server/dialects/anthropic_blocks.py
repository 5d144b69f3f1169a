"""The messages of Anthropic's dialect: content blocks as values, checked and bounded.

What a block means for the prompt is decided in anthropic_request.py. A block that octavo can't read (a result of a
server's own tool) is refused by its type.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, StringConstraints, Tag, model_validator

from octavo.server.dialects.conversation import MAX_PARTS, bounded_json
from octavo.server.dialects.fields import Flag, Open, Strict, Text, TextOption, text_or_list
from octavo.server.hints import Hint

ToolId = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=256)]
Object = Annotated[dict[str, Any], BeforeValidator(bounded_json)]


class Block(Strict):
    """Any block may say where a cache should end; the prefix cache here needs no such mark."""

    cache_control: Hint = None


class TextBlock(Block):
    """Text. Citations are what another server has found out about it."""

    type: Literal["text"]
    text: Text
    citations: Hint = None


class Base64Source(Strict):
    """An image itself."""

    type: Literal["base64"]
    media_type: Literal["image/jpeg", "image/png", "image/gif", "image/webp"]
    data: Text

    @property
    def url(self) -> str:
        return f"data:{self.media_type};base64,{self.data}"


class UrlSource(Strict):
    """Where an image is."""

    type: Literal["url"]
    url: Text


class ImageBlock(Block):
    """An image, for a model that sees."""

    type: Literal["image"]
    source: Annotated[Base64Source | UrlSource, Field(discriminator="type")]


class TextSource(Strict):
    """A document's text."""

    type: Literal["text"]
    media_type: Literal["text/plain"] = "text/plain"
    data: Text


class BlockSource(Strict):
    """A document's text, in blocks."""

    type: Literal["content"]
    content: Annotated[
        TextOption | Annotated[Annotated[list[TextBlock], Field(fail_fast=True)], Tag("<list>")],
        Discriminator(text_or_list),
    ]


class UnreadSource(Open):
    """A file, in whatever way it is named: octavo reads none."""

    type: Text

    @model_validator(mode="after")
    def _refuse(self) -> UnreadSource:
        raise ValueError(f"octavo reads documents of text only (type text or content), not of type {self.type[:40]!r}")


def _kind_of_source(value: object) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return {"text": "<text>", "content": "<content>"}.get(str(kind), "<other>")


class Citations(Strict):
    """Whether the answer should cite the document: no answer here does."""

    enabled: Literal[False] | None = None


class DocumentBlock(Block):
    """A document of text."""

    type: Literal["document"]
    source: Annotated[
        Annotated[TextSource, Tag("<text>")]
        | Annotated[BlockSource, Tag("<content>")]
        | Annotated[UnreadSource, Tag("<other>")],
        Discriminator(_kind_of_source),
    ]
    title: Text | None = None
    context: Text | None = None
    citations: Citations | None = None


class SearchResultBlock(Block):
    """What a client's own search has found."""

    type: Literal["search_result"]
    source: Text
    title: Text
    content: Annotated[list[TextBlock], Field(fail_fast=True)]
    citations: Citations | None = None


class ThinkingBlock(Block):
    """What the assistant thought before it answered. The signature is for the server that has made it."""

    type: Literal["thinking"]
    thinking: Text
    signature: Hint = None


class RedactedThinkingBlock(Block):
    """What another server's assistant thought: only that server can read it, so it is left out of the prompt."""

    type: Literal["redacted_thinking"]
    data: Hint = None


class ToolUseBlock(Block):
    """A call that the assistant made."""

    type: Literal["tool_use"]
    id: ToolId
    name: Text
    input: Object
    caller: Hint = None


class ToolReferenceBlock(Block):
    """A tool that was deferred, and is shown from here on: what a client's own search for tools has found."""

    type: Literal["tool_reference"]
    tool_name: Text


class ToolChange(Strict):
    """The tool that a tool_addition or a tool_removal is about."""

    type: Literal["tool_reference"]
    name: Text


class ToolAdditionBlock(Block):
    """From here on the tool may be called."""

    type: Literal["tool_addition"]
    tool: ToolChange


class ToolRemovalBlock(Block):
    """From here on the tool may not be called."""

    type: Literal["tool_removal"]
    tool: ToolChange


class UnknownBlock(Open):
    """A block that octavo can't read."""

    type: Text = ""

    @model_validator(mode="after")
    def _refuse(self) -> UnknownBlock:
        raise ValueError(f"octavo does not support blocks of type {self.type[:40]!r} here")


_IN_RESULTS = frozenset({"<text>", "<image>", "<document>", "<search_result>", "<tool_reference>"})
_OTHERS = {"<thinking>", "<redacted_thinking>", "<tool_use>", "<tool_result>", "<tool_addition>", "<tool_removal>"}
_KNOWN = _IN_RESULTS | _OTHERS


def _kind(value: object) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>" if f"<{kind}>" in _KNOWN else "<unknown>"


def _kind_in_result(value: object) -> str:
    kind = _kind(value)
    return kind if kind in _IN_RESULTS else "<unknown>"


ResultContent = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ImageBlock, Tag("<image>")]
    | Annotated[DocumentBlock, Tag("<document>")]
    | Annotated[SearchResultBlock, Tag("<search_result>")]
    | Annotated[ToolReferenceBlock, Tag("<tool_reference>")]
    | Annotated[UnknownBlock, Tag("<unknown>")],
    Discriminator(_kind_in_result),
]


class ToolResultBlock(Block):
    """What a call has brought."""

    type: Literal["tool_result"]
    tool_use_id: ToolId
    content: (
        Annotated[
            TextOption | Annotated[Annotated[list[ResultContent], Field(fail_fast=True)], Tag("<list>")],
            Discriminator(text_or_list),
        ]
        | None
    ) = None
    is_error: Flag | None = None


Content = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ImageBlock, Tag("<image>")]
    | Annotated[DocumentBlock, Tag("<document>")]
    | Annotated[SearchResultBlock, Tag("<search_result>")]
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[RedactedThinkingBlock, Tag("<redacted_thinking>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")]
    | Annotated[ToolResultBlock, Tag("<tool_result>")]
    | Annotated[ToolReferenceBlock, Tag("<tool_reference>")]
    | Annotated[ToolAdditionBlock, Tag("<tool_addition>")]
    | Annotated[ToolRemovalBlock, Tag("<tool_removal>")]
    | Annotated[UnknownBlock, Tag("<unknown>")],
    Discriminator(_kind),
]
Contents = Annotated[list[Content], Field(fail_fast=True)]

_OF_ASSISTANT = (TextBlock, ThinkingBlock, RedactedThinkingBlock, ToolUseBlock)
_OF_ASSISTANT_ONLY = (ThinkingBlock, RedactedThinkingBlock, ToolUseBlock)


class Message(Strict):
    """One turn of the conversation, or, under the role system, what its operator says in the midst of it.

    clear_at: a system message that is for the turn before it only is left out once a user's turn follows.
    """

    role: Literal["user", "assistant", "system"]
    content: Annotated[TextOption | Annotated[Contents, Tag("<list>")], Discriminator(text_or_list)]
    clear_at: Literal["next_user_message", "never"] | None = None

    @model_validator(mode="after")
    def _check_blocks(self) -> Message:
        if self.clear_at is not None and self.role != "system":
            raise ValueError("clear_at goes with the role system")
        for number, block in enumerate(self.blocks):
            is_own = isinstance(block, _OF_ASSISTANT) if self.role == "assistant" else self._may_say(block)
            if not is_own:
                raise ValueError(f"content.{number}: a block of type {block.type!r} can't be the {self.role}'s")
        return self

    def _may_say(self, block: Content) -> bool:
        if self.role == "system":
            return isinstance(block, TextBlock | ToolAdditionBlock | ToolRemovalBlock)
        return not isinstance(block, _OF_ASSISTANT_ONLY)

    @property
    def blocks(self) -> list[Any]:
        """The content as blocks."""
        if isinstance(self.content, str):
            return [TextBlock(type="text", text=self.content)]
        return list(self.content)


def bounded_blocks(value: Any) -> Any:
    """Refuse a conversation of too many messages and blocks, those within results and documents counted."""
    count = _num_blocks(value)
    if count > MAX_PARTS:
        raise ValueError(f"{count} messages and blocks; {MAX_PARTS} is the most")
    return value


def _num_blocks(value: Any) -> int:
    if isinstance(value, list):
        return len(value) + sum(map(_num_blocks, value))
    return _num_blocks(value.get("content")) + _num_blocks(value.get("source")) if isinstance(value, dict) else 0
