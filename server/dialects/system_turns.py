"""Where a chat template takes system messages and users' turns, and what is done with those that it doesn't take.

Some templates refuse a system message behind the first turn, some drop it, some move it to the head, which changes the
prompt's beginning and loses the prefix cache of the whole conversation. So a template is rendered once to find out, and
what it doesn't take where it stands becomes part of the next user turn. Mistral's templates refuse a user's turn behind
the results of calls, where agents put their reminders: it becomes part of the last result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octavo.server.errors import ApiError
from octavo.server.served_model import ServedModel
from octavo.server.template_renderer import RendererStoppedError
from octavo.text.chat_template import ChatTemplateError, TemplateLimitError
from octavo.text.template_process import Job

Turn = dict[str, Any]

MAX_PROBE = 1 << 16  # characters
_HEAD = "zqsystemhead"
_INLINE = "zqsysteminline"
_BEFORE = "zqanswer"
_AFTER = "zqquestion"


@dataclass(frozen=True, slots=True)
class SystemTurns:
    """Whether the template takes a system message at the head, one behind other turns, and a user's turn behind the
    results of calls.
    """

    at_head: bool
    inline: bool
    behind_results: bool = True


class SystemProbe:
    """Finds out what the model's own template takes, once for chats with tools and once for those without."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._found: dict[bool, SystemTurns] = {}

    async def turns(self, *, has_tools: bool) -> SystemTurns:
        """What the template takes. Raises ApiError where the server is ending."""
        if has_tools not in self._found:
            self._found[has_tools] = SystemTurns(
                at_head=_in_order(await self._rendered(_chat(_HEAD, None), has_tools), _HEAD, _AFTER),
                inline=_in_order(await self._rendered(_chat(None, _INLINE), has_tools), _BEFORE, _INLINE, _AFTER),
                behind_results=not has_tools or await self._takes_turn_behind_results(),
            )
        return self._found[has_tools]

    async def _takes_turn_behind_results(self) -> bool:
        history = self._model.formats.found.history
        arguments: Any = {} if history.arguments_are_objects else "{}"
        call = {"id": "zqcall001", "type": "function", "function": {"name": "zqtool", "arguments": arguments}}
        turns: list[Turn] = [
            {"role": "user", "content": "zqhello"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "zqcall001", "name": "zqtool", "content": _BEFORE},
        ]
        if history.empty_content != "empty":
            del turns[1]["content"]
        if not await self._rendered(turns, True):
            return True  # it takes no calls either, so that this tells nothing
        turns.append({"role": "user", "content": _AFTER})
        return _in_order(await self._rendered(turns, True), _BEFORE, _AFTER)

    async def _rendered(self, messages: list[Turn], has_tools: bool) -> str:
        """The chat as the template writes it; nothing where it refuses."""
        tool = {"type": "function", "function": {"name": "zqtool", "description": "d", "parameters": {}}}
        variables = dict(self._model.template_variables)
        job = Job(messages, MAX_PROBE, variables=variables, tools=[tool] if has_tools else None)
        renderer = self._model.renderer
        try:
            return await renderer.render(renderer.request(job))
        except TemplateLimitError:
            raise ApiError(503, "the chat template takes too long just now; send the request again") from None
        except ChatTemplateError:
            return ""
        except RendererStoppedError as error:
            raise ApiError(503, str(error)) from error


def _chat(head: str | None, inline: str | None) -> list[Turn]:
    turns = [("system", head), ("user", "zqhello"), ("assistant", _BEFORE), ("system", inline), ("user", _AFTER)]
    return [{"role": role, "content": content} for role, content in turns if content is not None]


def _in_order(text: str, *words: str) -> bool:
    places = [text.find(word) for word in words]
    return min(places) >= 0 and places == sorted(places)


def folded(turns: Sequence[Turn], takes: SystemTurns) -> list[Turn]:
    """The conversation, in which each turn that the template doesn't take is part of another one."""
    result: list[Turn] = []
    waiting: list[str] = []
    for turn in turns:
        if turn["role"] == "system" and (waiting or not (takes.inline if result else takes.at_head)):
            waiting.append(_text(turn["content"]))
            continue
        if waiting and turn["role"] == "user":
            turn = {**turn, "content": _before("\n\n".join(waiting), turn["content"])}
            waiting = []
        elif waiting and turn["role"] == "assistant":
            _say(result, waiting, takes)
            waiting = []
        if turn["role"] == "user" and _may_not_follow(result, takes):
            result[-1] = {**result[-1], "content": _joined(result[-1]["content"], turn["content"])}
        else:
            result.append(turn)
    if waiting:
        _say(result, waiting, takes)
    return result


def _may_not_follow(turns: Sequence[Turn], takes: SystemTurns) -> bool:
    """Whether a user's turn can't stand behind these."""
    return bool(turns) and turns[-1]["role"] == "tool" and not takes.behind_results


def _say(turns: list[Turn], waiting: Sequence[str], takes: SystemTurns) -> None:
    """Where no user turn follows: at the end of the user turn before, else as a turn of its own."""
    text = "\n\n".join(waiting)
    if turns and (turns[-1]["role"] == "user" or _may_not_follow(turns, takes)):
        last = turns[-1]
        content = last["content"]
        joined: Any = [*content, _part(text)] if isinstance(content, list) else f"{content}\n\n{text}"
        turns[-1] = {**last, "content": joined}
    else:
        turns.append({"role": "user", "content": text})


def _before(text: str, content: Any) -> Any:
    return [_part(text), *content] if isinstance(content, list) else f"{text}\n\n{content}"


def _joined(first: Any, second: Any) -> Any:
    """One content of two: text, unless there are images in them."""
    parts = [*_parts(first), *_parts(second)]
    return f"{_text(first)}\n\n{_text(second)}" if all(part["type"] == "text" for part in parts) else parts


def _parts(content: Any) -> list[Mapping[str, str]]:
    return content if isinstance(content, list) else [_part(content)]


def _part(text: str) -> Mapping[str, str]:
    return {"type": "text", "text": text}


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)
