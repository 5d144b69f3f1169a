"""What a chat template writes for an assistant's turn: rendered with words that stand nowhere else, and compared.

Comparing two renderings finds where they differ; so that no difference falls within a marker, texts are compared in
atoms: a tag, a word, a space.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from octavo.text.chat_template import ChatTemplateError, Message, TemplateLimitError

Calls = Sequence[tuple[str, Mapping[str, Any]]]
Variables = Mapping[str, object]
EmptyContent = Literal["absent", "empty", "null"]

NO_VARIABLES: Variables = {}
FIRST = "zqfunone"
SECOND = "zqfuntwo"
CONTENT = "zqcontent"
REASON = "zqreason"
USER: Message = {"role": "user", "content": "zquser"}
_ATOM = re.compile(r"<[^<>\s]{1,60}>|\[/?[A-Z_]+\]|\w+|.", re.DOTALL)


def _tool(name: str) -> dict[str, Any]:
    properties = {
        "alpha": {"type": "string", "description": "text"},
        "beta": {"type": "string", "description": "text"},
        "count": {"type": "integer", "description": "a whole number"},
        "ratio": {"type": "number", "description": "a number"},
        "flag": {"type": "boolean", "description": "yes or no"},
        "items": {"type": "array", "items": {"type": "integer"}, "description": "numbers"},
        "options": {"type": "object", "additionalProperties": {"type": "string"}, "description": "names and values"},
    }
    schema = {"type": "object", "properties": properties, "required": []}
    return {"type": "function", "function": {"name": name, "description": "a function", "parameters": schema}}


TOOLS = [_tool(FIRST), _tool(SECOND)]
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}


@dataclass(frozen=True, slots=True)
class History:
    """How the template takes an assistant's turn with calls: arguments as an object or as JSON text, and what stands
    for content where there is none.
    """

    arguments_are_objects: bool = True
    empty_content: EmptyContent = "empty"


@dataclass(frozen=True, slots=True)
class Turn:
    """An assistant's turn as rendered: the prompt that it follows, and what the model would have written."""

    prompt: str
    answer: str


class Probe:
    """Renders turns of one template. `render` is ChatTemplate.render, or what stands for it."""

    def __init__(self, render: Callable[..., str], history: History | None = None) -> None:
        self._render = render
        self.history = history or History()
        self._prompts: dict[str, str | None] = {}

    def prompt(self, variables: Variables = NO_VARIABLES) -> str | None:
        """The prompt of the user's turn, up to where the model goes on; None where the template refuses."""
        key = repr(sorted(variables.items()))
        if key not in self._prompts:
            self._prompts[key] = self._rendered([USER], True, variables)
        return self._prompts[key]

    def rendered(
        self,
        calls: Calls = (),
        content: str | None = None,
        reasoning: str | None = None,
        variables: Variables = NO_VARIABLES,
    ) -> str | None:
        """The whole chat with an assistant's turn; None where the template refuses it."""
        turn: Message = {"role": "assistant"}
        if content is not None:
            turn["content"] = content
        elif self.history.empty_content != "absent":
            turn["content"] = "" if self.history.empty_content == "empty" else None
        if reasoning is not None:
            turn["reasoning_content"] = reasoning
        if calls:
            turn["tool_calls"] = [self._call(number, *call) for number, call in enumerate(calls)]
        return self._rendered([USER, turn], False, variables)

    def turn(self, calls: Calls = (), content: str | None = None) -> Turn | None:
        """What the model writes in such a turn, and after what; None where the template refuses it."""
        text = self.rendered(calls, content)
        prompt = self.prompt()
        if text is None or prompt is None:
            return None
        length = common_prefix(prompt, text)
        return Turn(text[:length], text[length:])

    def _call(self, number: int, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        as_given = dict(arguments) if self.history.arguments_are_objects else json.dumps(arguments, ensure_ascii=False)
        function = {"name": name, "arguments": as_given}
        return {"id": f"zqid{number:05d}", "type": "function", "function": function}

    def _rendered(self, messages: list[Message], prompt: bool, variables: Variables) -> str | None:
        try:
            return self._render(messages, tools=TOOLS, add_generation_prompt=prompt, variables=dict(variables))
        except TemplateLimitError:
            raise
        except ChatTemplateError:
            return None


def common_prefix(first: str, second: str) -> int:
    """Characters of the atoms that both texts begin with."""
    low = 0
    high = min(len(first), len(second))
    while low < high:  # the prompt with its tools is long, and nearly all of it is common
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    start = max(first.rfind(end, 0, low) for end in ("\n", " ", ">")) + 1  # an atom ends there in both
    length = start
    for one, other in zip(_ATOM.finditer(first, start), _ATOM.finditer(second, start), strict=False):
        if one[0] != other[0]:
            break
        length += len(one[0])
    return length


def common_suffix(first: str, second: str) -> str:
    """The atoms that both texts end with. Where the first has a call's number 0 and the second 1, it is `{index}`."""
    kept: list[str] = []
    for one, other in zip(reversed(_ATOM.findall(first)), reversed(_ATOM.findall(second)), strict=False):
        if one == other:
            kept.append(one)
        elif (one, other) == ("0", "1"):
            kept.append("{index}")
        else:
            break
    return "".join(reversed(kept))
