"""How a model writes tool calls and reasoning: values that drive the parser, and the grammar of a constrained call.

A ToolFormat holds the exact text around a call's name and arguments, as the chat template writes it. The parser takes
whitespace at the seams freely, and derives its markers from these texts (`literals`); nothing here knows a tokenizer.
"""

from __future__ import annotations

import re
import secrets
import string
from dataclasses import dataclass
from typing import Literal

FormatKind = Literal["json", "json_array", "params", "pythonic", "channel"]
IdStyle = Literal["hex", "mistral", "kimi"]
# How strictly calls are read. loose: as models write them who aren't constrained; exact: only what the grammar of calls
# makes is one; marked: only in an answer that begins like one, since another answer's content has a constraint.
Strictness = Literal["loose", "exact", "marked"]
Switch = Literal["enable_thinking", "thinking", "reasoning_effort"]

_ALPHANUMERICS = string.ascii_letters + string.digits
_PLACEHOLDER = re.compile(r"\{(?:index|id|any|is_string)\}|\s+")


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How one model writes its tool calls.

    kind              json        a call is its name and a JSON object of arguments, in an object (keys) or side by side
                      json_array  the calls are one JSON array of such objects
                      params      each argument stands between markers of its own, strings unquoted
                      pythonic    name(key=value, ...): literals, which become JSON
                      channel     messages with a header that names their recipient (harmony)
    section_begin     before the first call, and section_end after the last one
    call_begin        before a call's name; where keys are set it includes the object's beginning: `<call>{"name": "`
    name_to_arguments from the name to the arguments: `", "arguments": `
    call_end          after the arguments: `}</call>`
    between           from one call to the next; channel: what may stand in front of the arguments' type
    keys              the object's keys for name and arguments; ("", "") where the name itself is the key
    key_begin         params: before an argument's name; key_to_value from there to its value; value_end after it
    string_quote      pythonic: a quote for strings beside Python's own, without escapes within
    content_name      a recipient of this name is no function: what is sent to it is the answer's text
    may_be_bare       a call may stand at the beginning of the content without section_begin
    may_repeat        several calls in one turn; False where the template refuses them
    id_style          how call ids look

    In these texts `{index}` is the call's number in the turn, `{id}` its id, `{is_string}` true or false, and `{any}`
    stands for anything.
    """

    kind: FormatKind
    section_begin: str = ""
    section_end: str = ""
    call_begin: str = ""
    name_to_arguments: str = ""
    call_end: str = ""
    between: str = ""
    keys: tuple[str, str] | None = None
    key_begin: str = ""
    key_to_value: str = ""
    value_end: str = ""
    string_quote: str = ""
    content_name: str = ""
    may_be_bare: bool = False
    may_repeat: bool = True
    id_style: IdStyle = "hex"

    def markers(self) -> list[str]:
        """Every text that may hold a marker; those of its pieces that are special tokens match by id."""
        texts = [self.section_begin, self.section_end, self.call_begin, self.name_to_arguments, self.call_end]
        texts += [self.between, self.key_begin, self.key_to_value, self.value_end, self.string_quote]
        return [text for text in texts if text.strip()]

    def opened_by(self, prompt: str) -> bool:
        """Whether the prompt's end opens a call's header, as Functionary's `>>>` does."""
        return bool(self.content_name) and prompt.endswith(self.call_begin)


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How one model writes what it thinks before it answers.

    begin, end  the markers around it, without the whitespace at their seams
    is_implied  the model thinks first even where neither the prompt nor the answer writes `begin`
    switch      the template's variable that turns thinking on and off, if there is one
    default     whether the model thinks where the switch is absent
    can_disable whether the switch's "off" really ends the thinking, as the rendered prompt shows
    """

    begin: str
    end: str
    is_implied: bool = False
    switch: Switch | None = None
    default: bool = True
    can_disable: bool = False

    def opened_by(self, prompt: str, begun: str = "") -> bool:
        """Whether the answer begins inside the reasoning, since the prompt's end has opened it.

        begun: the turn that the answer goes on with, where the client has begun it.
        """
        if (is_open := self._left_open(begun)) is not None:
            return is_open
        text = prompt.rstrip()
        if self.begin and text.endswith(self.begin):
            return True
        return self.is_implied and not text.endswith(self.end)

    def closed_by(self, prompt: str, begun: str = "") -> bool:
        """Whether the prompt has ended the reasoning."""
        return self._left_open(begun) is False or prompt.rstrip().endswith(self.end)

    def _left_open(self, begun: str) -> bool | None:
        """Whether the last marker in a turn opens the reasoning; None where there is none."""
        begin = begun.rfind(self.begin) if self.begin else -1
        end = begun.rfind(self.end)
        return None if begin == end else begin > end


def literals(text: str) -> tuple[str, ...]:
    """A separator's fixed pieces: between them stand whitespace, or what a placeholder stands for."""
    return tuple(piece for piece in _PLACEHOLDER.split(text) if piece)


def new_call_id(style: IdStyle, name: str, number: int) -> str:
    """A call's id. `number` counts the calls of the conversation from 0; only Kimi's ids show it."""
    if style == "kimi":
        return f"functions.{name}:{number}"
    if style == "mistral":
        return "".join(secrets.choice(_ALPHANUMERICS) for _ in range(9))
    return f"call_{secrets.token_hex(12)}"


def is_call_id(style: IdStyle, text: str) -> bool:
    """Whether an id that the model wrote itself can be the call's."""
    if style == "kimi":
        return re.fullmatch(r"functions\.[\w.-]+:\d+", text) is not None
    return style == "mistral" and re.fullmatch(r"[A-Za-z0-9]{9}", text) is not None
