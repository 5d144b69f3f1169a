"""A model's formats, found out from its chat template: by rendering it, and by proof.

The template is rendered with an assistant's turn of known words; where those stand shows what a model writes around
them. What was found counts only if random calls, rendered and parsed back, are the same by value, whole and cut at
every character. Where inference fails, the presets are tried, each by the same proof.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from octavo.server.message.format import IdStyle, ReasoningFormat, Switch, ToolFormat
from octavo.server.message.parse import Formats, Machine
from octavo.server.message.parts import Part, append_parts, calls_of, reasoning_of, text_of
from octavo.server.message.presets import REASONING_PRESETS, TOOL_PRESETS
from octavo.server.message.probe import (
    CONTENT,
    FIRST,
    REASON,
    SCHEMAS,
    SECOND,
    Calls,
    History,
    Probe,
    Turn,
    common_prefix,
    common_suffix,
)

NUM_PROOFS = 24
_ONE = "zqvalone"
_TWO = "zqvaltwo"
_SAMPLE_ID = re.compile(r"zqid\d{5}")
_JSON_BEGIN = re.compile(r"(.*?)\{\s*\"alpha\"\s*:\s*\"\Z", re.DOTALL)
_JSON_END = re.compile(r"\"\s*\}")
_NAME_KEY = re.compile(r"\{\s*\".*?\"?(\w+)\"\s*:\s*\"\Z", re.DOTALL)
_ARGUMENTS_KEY = re.compile(r"\"\s*,\s*\"(\w+)\"\s*:\s*\Z")
_LAST_MARKER = re.compile(r"(?:<[^<>\s]+>\w*|\[[A-Z_]+\]|[^\n<>]+)\Z")
_FIRST_MARKER = re.compile(r"<[^<>\s]+>|\[[^\]\n]+\]|[^\n<>]+")
_ONE_MARKER = re.compile(r"[^<]*(?:<[^<>\s]+>)?")  # behind it stands the next turn
_STRINGS = (
    "",
    "plain",
    "two words",
    'a "quoted" one',
    "line\nline",
    "  spaced ",
    "ünï ✓",
    "{brace: [1]}",
    "back\\slash",
)


@dataclass(frozen=True)
class Inference:
    """What was found, and how: "inferred", "preset NAME", or why there is nothing."""

    tools: ToolFormat | None
    tools_from: str
    reasoning: ReasoningFormat | None
    reasoning_from: str
    history: History


def infer(render: Callable[..., str], source: str) -> Inference:
    """The formats of a template. `render` takes ChatTemplate.render's arguments; `source` is the template's text."""
    probe = Probe(render)
    reasoning, reasoning_from = _reasoning(probe, source)
    probe.history = _history(probe) or History()
    tools, tools_from = _tools(probe)
    if tools is not None and tools.kind == "channel":  # the channels tell
        reasoning = None
        reasoning_from = tools_from
    return Inference(tools, tools_from, reasoning, reasoning_from, probe.history)


def _history(probe: Probe) -> History | None:
    """The first way to pass a call that the template takes."""
    for are_objects in (True, False):
        for empty in ("absent", "empty", "null"):
            probe.history = History(are_objects, empty)
            text = probe.rendered([(FIRST, {"alpha": _ONE})])
            if text is not None and _ONE in text and "None" not in text:
                return probe.history
    return None


def _tools(probe: Probe) -> tuple[ToolFormat | None, str]:
    """The format that is proved, and where it is from."""
    text = probe.rendered([(FIRST, {"alpha": _ONE})])
    if text is None:
        return None, "the template can't render a tool call"
    if _ONE not in text:
        return None, "the template doesn't show tool calls"
    inferred = _tool_format(probe)
    if inferred is not None and is_proved(probe, inferred):
        return inferred, "inferred"
    for name, preset in TOOL_PRESETS.items():
        candidate = preset if inferred is None else dataclasses.replace(preset, may_repeat=inferred.may_repeat)
        if is_proved(probe, candidate):
            return candidate, f"preset {name}"
    return None, "no format that was tried reads back what the template writes"


def _tool_format(probe: Probe) -> ToolFormat | None:
    """The format as the differences between renderings show it, unproved."""
    shape = _Shape.of(probe)
    if shape is None:
        return None
    json_begin = _JSON_BEGIN.fullmatch(shape.middle)
    json_end = _JSON_END.match(shape.tail)
    if json_begin is not None and json_end is not None:
        return _json_format(shape, json_begin[1], shape.tail[json_end.end() :])
    if "alpha" in shape.middle:
        return _params_format(probe, shape)
    return None


@dataclass(frozen=True)
class _Shape:
    """Around the sentinels of one call: head NAME middle VALUE tail, between sections' ends."""

    section_begin: str
    head: str
    middle: str
    tail: str
    between: str
    section_end: str
    may_repeat: bool
    id_style: IdStyle

    @classmethod
    def of(cls, probe: Probe) -> _Shape | None:
        text_turn = probe.turn(content=CONTENT)
        one = probe.turn([(FIRST, {"alpha": _ONE})])
        if text_turn is None or one is None or CONTENT not in text_turn.answer or FIRST not in one.answer:
            return None
        header, _, ending = text_turn.answer.partition(CONTENT)
        before, middle, after = _around(one.answer, FIRST, _ONE)
        lead = before[common_prefix(header, before) :]
        with_content = probe.turn([(FIRST, {"alpha": _ONE})], CONTENT)
        if with_content is not None and CONTENT in with_content.answer:
            _, _, rest = with_content.answer.partition(CONTENT)
            if FIRST in rest:
                lead, middle, after = _around(rest, FIRST, _ONE)
        after = after.removesuffix(common_suffix(ending, after))
        two = probe.turn([(FIRST, {"alpha": _ONE}), (SECOND, {"alpha": _TWO})])
        style = _id_style(lead, middle)
        if two is None or SECOND not in two.answer or _TWO not in two.answer:
            return cls("", lead.lstrip(), _unnumbered(middle), after.rstrip(), "", "", False, style)
        _, _, seam = _around(two.answer[: two.answer.index(SECOND)], FIRST, _ONE)
        _, second_middle, rest = _around(two.answer, SECOND, _TWO)
        head = common_suffix(_plain(lead), _plain(seam))
        seam = _plain(seam)
        tail = seam[: common_prefix(seam, _plain(rest))]
        numbered = head.replace("{index}", "1")
        if len(tail) + len(numbered) > len(seam):
            numbered = head = seam[len(tail) :]
        between = seam[len(tail) : len(seam) - len(numbered)]
        section_begin = _plain(lead)[: len(_plain(lead)) - len(head.replace("{index}", "0"))]
        middle = common_suffix(_plain(middle), _plain(second_middle)) or middle
        rest = _plain(rest)[len(tail) :]
        section_end = _ONE_MARKER.match(rest.removesuffix(common_suffix(ending, rest)).strip())
        end = section_end[0] if section_end is not None and section_begin.strip() else ""
        between = tail[len(tail.rstrip()) :] + between + head[: len(head) - len(head.lstrip())]
        return cls(section_begin.strip(), head.lstrip(), middle, tail.rstrip(), between, end, True, style)


def _around(text: str, name: str, value: str) -> tuple[str, str, str]:
    """What stands before the name, between it and the value, and after the value."""
    before, _, rest = text.partition(name)
    middle, _, after = rest.partition(value)
    return before, middle, after


def _plain(text: str) -> str:
    return _SAMPLE_ID.sub("{id}", text)


def _unnumbered(text: str) -> str:
    return re.sub(r"(?<=:)0(?=\W)", "{index}", _plain(text))


def _id_style(lead: str, middle: str) -> IdStyle:
    if lead.endswith("functions.") and middle.startswith(":0"):
        return "kimi"
    return "mistral" if "[TOOL_CALLS]" in lead else "hex"


def _json_format(shape: _Shape, name_to_arguments: str, call_end: str) -> ToolFormat:
    keys = None
    named = _NAME_KEY.search(shape.head)
    argued = _ARGUMENTS_KEY.fullmatch(name_to_arguments)
    if named is not None and argued is not None:
        keys = (named[1], argued[1])
    elif shape.head.endswith('{"') and re.fullmatch(r'"\s*:\s*', name_to_arguments):
        keys = ("", "")
    section_begin = shape.section_begin
    section_end = shape.section_end
    head = shape.head
    if keys is not None and not shape.may_repeat and head[: head.index("{")].rstrip().endswith("["):
        section_begin = head[: head.index("{")]
        head = head[head.index("{") :]
        section_end = call_end[call_end.index("}") + 1 :]
        call_end = call_end[: call_end.index("}") + 1]
    is_array = keys is not None and section_begin.endswith("[")
    return ToolFormat(
        kind="json_array" if is_array else "json",
        section_begin=section_begin,
        section_end=section_end,
        call_begin=head,
        name_to_arguments=name_to_arguments,
        call_end=call_end,
        between=shape.between,
        keys=keys,
        may_repeat=shape.may_repeat,
        id_style=shape.id_style,
    )


def _params_format(probe: Probe, shape: _Shape) -> ToolFormat | None:
    """A format whose arguments stand between markers."""
    two = probe.turn([(FIRST, {"alpha": _ONE, "beta": _TWO})])
    if two is None or _TWO not in two.answer:
        return None
    _, _, rest = _around(two.answer, FIRST, _ONE)
    seam, _, _ = rest.partition("beta")
    before_key, _, key_to_value = shape.middle.partition("alpha")
    key_begin = common_suffix(seam, before_key).lstrip()
    value_end = seam[: len(seam) - len(key_begin)]
    if not key_begin or not shape.tail.startswith(value_end.rstrip()) or not value_end.strip():
        return None
    number = probe.turn([(FIRST, {"count": 7})])
    if number is not None and "true" in key_to_value:
        _, _, rest = number.answer.partition("count")
        if rest.startswith(key_to_value.replace("true", "false")):
            key_to_value = key_to_value.replace("true", "{is_string}")
    return ToolFormat(
        kind="params",
        section_begin=shape.section_begin,
        section_end=shape.section_end,
        call_begin=shape.head,
        name_to_arguments=before_key[: len(before_key) - len(key_begin)],
        call_end=shape.tail[len(value_end.rstrip()) :].lstrip(),
        between=shape.between,
        key_begin=key_begin,
        key_to_value=key_to_value,
        value_end=value_end,
        may_repeat=shape.may_repeat,
    )


def is_proved(probe: Probe, form: ToolFormat) -> bool:
    """Whether random calls, rendered and parsed, are the same by value: whole and cut at every character."""
    formats = Formats(form, None)
    num_rendered = 0
    for calls, content in _samples(form.may_repeat):
        turn = probe.turn(calls, content)
        if turn is None or any(name not in turn.answer for name, _ in calls):
            continue
        num_rendered += 1
        shows_content = content is not None and content in turn.answer
        expected = [(name, dict(arguments)) for name, arguments in calls]
        whole = _parsed(formats, turn, len(turn.answer))
        said = text_of(whole) + reasoning_of(whole)
        if _values(whole) != expected or (shows_content and CONTENT not in said):
            return False
        if any(name in said for name, _ in calls):
            return False
        single = _parsed(formats, turn, 1)
        if [(part.kind, part.text) for part in single] != [(part.kind, part.text) for part in whole]:
            return False
    return num_rendered >= NUM_PROOFS // 2


def _samples(may_repeat: bool) -> Iterator[tuple[Calls, str | None]]:
    draw = random.Random(NUM_PROOFS)
    for number in range(NUM_PROOFS):
        count = 1 + number % 3 if may_repeat else 1
        calls = [(draw.choice((FIRST, SECOND)), _arguments(draw)) for _ in range(count)]
        yield calls, CONTENT if number % 2 else None


def _arguments(draw: random.Random) -> dict[str, object]:
    values: dict[str, object] = {
        "alpha": draw.choice(_STRINGS),
        "beta": draw.choice(_STRINGS),
        "count": draw.randrange(-1000, 1000),
        "ratio": draw.choice((0.5, -2.25, 1e-7)),
        "flag": draw.choice((True, False)),
        "items": [draw.randrange(9) for _ in range(draw.randrange(3))],
        "options": {draw.choice(("key", "other key")): draw.choice((1, "text", True, [1, "a"], {"deep": "er"}))},
    }
    return {key: values[key] for key in draw.sample(sorted(values), draw.randrange(len(values)))}


def _parsed(formats: Formats, turn: Turn, size: int) -> list[Part]:
    form = formats.tools
    machine = Machine(formats, call_is_open=form is not None and form.opened_by(turn.prompt), tools=SCHEMAS)
    parts: list[Part] = []
    for start in range(0, len(turn.answer), max(1, size)):
        machine.feed(turn.answer[start : start + max(1, size)])
        append_parts(parts, machine.take())
    machine.finish()
    append_parts(parts, machine.take())
    return parts


def _values(parts: list[Part]) -> list[tuple[str, object]] | None:
    try:
        return [(call.name, json.loads(call.arguments)) for call in calls_of(parts)]
    except ValueError:
        return None


def _reasoning(probe: Probe, source: str) -> tuple[ReasoningFormat | None, str]:
    """How the model thinks, and where that is from."""
    switch = _switch(probe)
    on: dict[str, object] = {} if switch in (None, "reasoning_effort") else {str(switch): True}
    off: dict[str, object] = dict.fromkeys(on, False)
    prompts = {probe.prompt(), probe.prompt(on), probe.prompt(off)} - {None}
    tails = tuple(str(prompt).rstrip() for prompt in prompts)
    markers = _rendered_markers(probe, on)
    origin = "inferred"
    for name, preset in REASONING_PRESETS.items() if markers is None else ():
        in_prompt = any(tail.endswith((preset.begin, preset.end)) for tail in tails)
        if in_prompt or (preset.begin in source and preset.end in source):
            markers = (preset.begin, preset.end)
            origin = "inferred" if in_prompt else f"preset {name}"
            break
    if markers is None:
        return None, "the template shows none"
    form = ReasoningFormat(*markers, switch=switch)
    absent = probe.prompt()
    enabled = probe.prompt(on)
    disabled = probe.prompt(off)
    can_disable = bool(on) and disabled is not None and enabled != disabled and not form.opened_by(disabled)
    return dataclasses.replace(form, default=absent == enabled, can_disable=can_disable), origin


def _switch(probe: Probe) -> Switch | None:
    """The variable that turns thinking on and off in the prompt."""
    switches: tuple[Switch, ...] = ("enable_thinking", "thinking")
    for switch in switches:
        enabled = probe.prompt({switch: True})
        if enabled is not None and enabled != probe.prompt({switch: False}):
            return switch
    low = probe.prompt({"reasoning_effort": "low"})
    return "reasoning_effort" if low is not None and low != probe.prompt({"reasoning_effort": "high"}) else None


def _rendered_markers(probe: Probe, variables: dict[str, object]) -> tuple[str, str] | None:
    """The markers around a turn's reasoning, where the template writes it: before content, or before a call alone."""
    prompt = probe.prompt(variables) or ""
    calls: Calls = [(FIRST, {"alpha": _ONE})]
    for sentinel, text in (
        (CONTENT, probe.rendered((), CONTENT, REASON, variables)),
        (FIRST, probe.rendered(calls, CONTENT, REASON, variables)),
    ):
        before, found, rest = (text or "").partition(REASON)
        seam, follows, _ = rest.partition(sentinel)
        end = _FIRST_MARKER.match(seam.strip())
        opened = prompt[len(before) :].strip() if prompt.startswith(before) else ""  # Apriel's prompt says more
        begin = _LAST_MARKER.search(opened or before.rstrip())
        if found and follows and begin is not None and end is not None:
            return begin[0].strip(), end[0].strip()
    return None
