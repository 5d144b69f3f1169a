"""Reasoning and tool calls out of text: what is passed on byte for byte, what is converted, what is given back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from octavo.server.message.format import ReasoningFormat, ToolFormat, is_call_id, new_call_id
from octavo.server.message.layout import layout_of
from octavo.server.message.parse import FormatParser, Formats, Machine
from octavo.server.message.parts import Part, append_parts, calls_of, reasoning_of, text_of
from octavo.server.message.presets import REASONING_PRESETS, TOOL_PRESETS
from octavo.text.detokenizer import Detokenizer, MarkingDecoder
from octavo.text.tokenizer import Tokenizer

TINY = Path(__file__).parents[2] / "fixtures" / "tiny"
HERMES = TOOL_PRESETS["hermes"]
THINK = REASONING_PRESETS["qwen3"]
SCHEMAS = {
    "f": {
        "type": "object",
        "properties": {
            "text": {"type": "string"},
            "number": {"type": "integer"},
            "either": {"anyOf": [{"type": "string"}, {"type": "number"}]},
            "maybe": {"type": ["string", "null"]},
            "choice": {"enum": ["1", "2"]},
            "ref": {"$ref": "#/$defs/word"},
            "list": {"type": "array"},
        },
        "$defs": {"word": {"type": "string"}},
    }
}


def parts_of(
    text: str, tools: ToolFormat | None, reasoning: ReasoningFormat | None = None, *, size: int = 1, **opened: bool
) -> list[Part]:
    machine = Machine(Formats(tools, reasoning), tools=SCHEMAS, **opened)
    parts: list[Part] = []
    for start in range(0, len(text), size):
        machine.feed(text[start : start + size])
        append_parts(parts, machine.take())
    machine.finish()
    append_parts(parts, machine.take())
    return parts


def calls(text: str, tools: ToolFormat, **opened: bool) -> list[tuple[str, str]]:
    whole = parts_of(text, tools, size=len(text), **opened)
    by_character = parts_of(text, tools, **opened)
    found = [(call.name, call.arguments) for call in calls_of(by_character)]
    assert [(call.name, call.arguments) for call in calls_of(whole)] == found
    assert text_of(whole) == text_of(by_character)
    return found


# One turn of each preset, written by hand from what is known of the format. Where a template in the fixtures shows the
# format, test_infer.py has transformers' rendering as the truth; for the others there is no independent one yet.
TURNS = {
    "hermes": '<tool_call>\n{"name": "f", "arguments": {"text": "a"}}\n</tool_call>',
    "llama3_json": '{"name": "f", "parameters": {"text": "a"}}',
    "llama4_pythonic": '<|python_start|>[f(text="a")]<|python_end|>',
    "pythonic": "[f(text='a')]",
    "mistral": '[TOOL_CALLS]f[ARGS]{"text": "a"}',
    "mistral_array": '[TOOL_CALLS][{"name": "f", "arguments": {"text": "a"}}]',
    "deepseek_v3": (
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"text": "a"}\n```'
        '<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
    ),
    "deepseek_v31": (
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"text": "a"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
    ),
    "deepseek_v32": (
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="text" string="true">a'
        '</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>'
    ),
    "deepseek_v4": (
        '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="text" string="true">a'
        '</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
    ),
    "glm45": "<tool_call>f\n<arg_key>text</arg_key>\n<arg_value>a</arg_value>\n</tool_call>",
    "glm47": "<tool_call>f<arg_key>text</arg_key><arg_value>a</arg_value></tool_call>",
    "kimi_k2": (
        '<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0'
        '<|tool_call_argument_begin|>{"text": "a"}<|tool_call_end|><|tool_calls_section_end|>'
    ),
    "openai": '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"text": "a"}<|call|>',
    "granite": '<|tool_call|>[{"name": "f", "arguments": {"text": "a"}}]',
    "granite4": '<tool_call>\n{"name": "f", "arguments": {"text": "a"}}\n</tool_call>',
    "phi4_mini_json": 'functools[{"name": "f", "arguments": {"text": "a"}}]',
    "qwen3_coder": "<tool_call>\n<function=f>\n<parameter=text>\na\n</parameter>\n</function>\n</tool_call>",
    "minimax_m2": (
        '<minimax:tool_call>\n<invoke name="f">\n<parameter name="text">a</parameter>\n</invoke>\n'
        '</minimax:tool_call>'
    ),
    "seed_oss": "<seed:tool_call>\n<function=f>\n<parameter=text>a</parameter>\n</function>\n</seed:tool_call>",
    "gemma4": '<|tool_call>call:f{text:<|"|>a<|"|>}<tool_call|>',
    "lfm2": '<|tool_call_start|>[f(text="a")]<|tool_call_end|>',
    "olmo3": '<function_calls>\nf(text="a")\n</function_calls>',
    "xlam": '[{"name": "f", "arguments": {"text": "a"}}]',
    "jamba": '<tool_calls>[\n{"name": "f", "arguments": {"text": "a"}}\n]</tool_calls>',
    "internlm": '<|action_start|><|plugin|>\n{"name": "f", "parameters": {"text": "a"}}<|action_end|>',
    "step3": (
        '<｜tool_calls_begin｜>\n<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="f">'
        '<steptml:parameter name="text">a</steptml:parameter></steptml:invoke><｜tool_call_end｜>\n'
        '<｜tool_calls_end｜>'
    ),
    "functiongemma": "<start_function_call>call:f{text:<escape>a<escape>}<end_function_call>",
    "hunyuan": (
        "<tool_calls><tool_call>f<tool_sep>\n<arg_key>text</arg_key>\n<arg_value>a</arg_value>\n"
        "</tool_call></tool_calls>"
    ),
    "longcat": '<longcat_tool_call>\n{"name": "f", "arguments": {"text": "a"}}\n</longcat_tool_call>',
    "granite-20b-fc": '<function_call> {"name": "f", "arguments": {"text": "a"}}',
    "cohere_command3": (
        '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "f", "parameters": {"text": "a"}}]<|END_ACTION|>'
    ),
    "apertus": '<|tools_prefix|>[{"f": {"text": "a"}}]<|tools_suffix|>',
    "gigachat3": '<|function_call|>{"name": "f", "arguments": {"text": "a"}}',
    "functionary_v3_2": '>>>f\n{"text": "a"}',
}  # fmt: skip


def test_every_preset_has_a_turn() -> None:
    shown = [TOOL_PRESETS[name] for name in TURNS]
    assert all(preset in shown for preset in TOOL_PRESETS.values())


@pytest.mark.parametrize("name", sorted(TURNS))
def test_a_turn_of_each_preset(name: str) -> None:
    form = TOOL_PRESETS[name]
    assert calls(TURNS[name], form) == [("f", '{"text": "a"}')]
    assert text_of(parts_of(TURNS[name], form)) == ""
    with_content = parts_of("Now: " + TURNS[name], form)
    if not form.may_be_bare and form.kind != "channel":
        assert [call.name for call in calls_of(with_content)] == ["f"]
        assert text_of(with_content) == "Now:"


@pytest.mark.parametrize("name", sorted(TURNS))
@pytest.mark.parametrize("cut_at", [0.3, 0.5, 0.7, 0.9])
def test_nothing_is_taken_back(name: str, cut_at: float) -> None:
    """What is said of a beginning is the beginning of what is said of all."""
    text = TURNS[name]
    machine = Machine(Formats(TOOL_PRESETS[name], None), tools=SCHEMAS)
    machine.feed(text[: int(len(text) * cut_at)])
    early = [(part.kind, part.text) for part in machine.take()]
    whole = [(part.kind, part.text) for part in parts_of(text, TOOL_PRESETS[name])]
    for (kind, said), (final_kind, final) in zip(early, whole, strict=False):
        assert kind == final_kind
        assert final.startswith(said)


def test_json_passes_byte_for_byte() -> None:
    raw = '{"text":  "\\u00e9\\n</tool_call>\\\\",\n "list":[1,  {"a":null}],"number":1.50e+3}'
    assert calls(f'<tool_call>\n{{"name": "f", "arguments": {raw}}}\n</tool_call>', HERMES) == [("f", raw)]


def test_whitespace_and_order_are_free() -> None:
    text = (
        '<tool_call>{ "arguments" : {"number":1} , "id": 7,"name":"f"}</tool_call><tool_call>{"name":"f"}</tool_call>'
    )
    assert calls(text, HERMES) == [("f", '{"number":1}'), ("f", "{}")]


def test_arguments_as_a_string_of_json() -> None:
    text = '<tool_call>\n{"name": "f", "arguments": "{\\"text\\": \\"a\\"}"}\n</tool_call>'
    assert calls(text, HERMES) == [("f", '{"text": "a"}')]


def test_null_is_no_arguments() -> None:
    assert calls('<tool_call>\n{"name": "f", "arguments": null}\n</tool_call>', HERMES) == [("f", "{}")]


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ('{"name": "f", "arguments": {"text": "a\nb"}}', '{"text": "a\\nb"}'),  # a raw line break in a string
        ('{"name": "f", "arguments": {"list": [1, 2}', '{"list": [1, 2]}'),  # brackets left open
        ('{"name": "f", "arguments": {"text": "a"}', '{"text": "a"}'),
        ('{"name": "f", "arguments": {"text": "a"}}}', '{"text": "a"}'),  # one too many
    ],
)
def test_slips_that_are_mended(written: str, arguments: str) -> None:
    assert calls(f"<tool_call>\n{written}\n</tool_call>", HERMES) == [("f", arguments)]


def test_a_missing_end() -> None:
    one = '<tool_call>\n{"name": "f", "arguments": {}}\n'
    assert calls(one + one, HERMES) == [("f", "{}"), ("f", "{}")]


@pytest.mark.parametrize(
    "text",
    [
        "before\n<tool_call>\nnot json\n</tool_call> after",
        'before <tool_call>\n{"nome": "f"}\n</tool_call>',
        'before <tool_call>\n{"name": 7}\n</tool_call>',
        'before <tool_call>\n{"name": "two words", "arguments": {}}\n</tool_call>',
        'before <tool_call>\n{"name": "f", "arguments": 7}\n</tool_call>',
        "before <tool_call>",
        'before <tool_call>\n{"name": "f',
    ],
)
def test_malformed_calls_are_content(text: str) -> None:
    for size in (1, 3, len(text)):
        assert parts_of(text, HERMES, size=size) == [Part("text", text)]


def test_malformed_calls_are_counted() -> None:
    machine = Machine(Formats(HERMES, None))
    machine.feed('<tool_call>{"nome": 1}</tool_call> and <tool_call>{"name": "f"}</tool_call>')
    machine.finish()
    assert machine.num_malformed == 1
    assert [call.name for call in calls_of(machine.take())] == ["f"]


@pytest.mark.parametrize(
    "text", ["a <tool", "a < b", "a <tool_calling>", "\n\n", " ", "a\n", "{}", '{"name": "g"}', ""]
)
def test_what_only_looks_like_a_marker_is_content(text: str) -> None:
    assert text_of(parts_of(text, HERMES)) == text
    assert text_of(parts_of(text, None)) == text


@pytest.mark.parametrize(
    ("written", "content"),
    [
        ("hi {} tail", "hi tail"),
        ("hi{} tail", "hi tail"),
        ("hi\n\n{}\n{} tail", "hi\n\ntail"),
        ("hi{}tail", "hitail"),
        ("hi {}\n", "hi"),
        ("\n{} tail", "tail"),
        ("hi {}\n<tool", "hi <tool"),
    ],
)
def test_texts_on_both_sides_of_a_call_keep_the_whitespace_between_them(written: str, content: str) -> None:
    for name in ("hermes", "qwen3_coder", "kimi_k2", "jamba"):
        text = written.replace("{}", TURNS[name])
        for size in (1, 4, len(text)):
            assert text_of(parts_of(text, TOOL_PRESETS[name], size=size)) == content


def test_text_comes_as_soon_as_it_can() -> None:
    machine = Machine(Formats(HERMES, THINK))
    said = []
    for piece in ("He", "llo <", "b> wo", "rld \n"):
        machine.feed(piece)
        said.append(text_of(machine.take()))
    assert said == ["He", "llo", " <b> wo", "rld"]
    machine.finish()
    assert text_of(machine.take()) == " \n"


def test_what_was_taken_is_the_callers() -> None:
    machine = Machine(Formats(HERMES, None))
    taken = machine.take()
    machine.feed("later")
    assert taken == []
    assert machine.take() == [Part("text", "later")]


def test_arguments_come_as_they_are_written() -> None:
    machine = Machine(Formats(TOOL_PRESETS["qwen3_coder"], None), tools=SCHEMAS)
    machine.feed("<tool_call>\n<function=f>\n<parameter=text>\nsome ")
    assert [(part.kind, part.text) for part in machine.take()] == [("call", "f"), ("arguments", '{"text": "some ')]
    machine.feed('"word')
    assert [(part.kind, part.text) for part in machine.take()] == [("arguments", '\\"word')]


@pytest.mark.parametrize("end", range(60, 100, 7))
def test_a_call_that_is_cut(end: int) -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {"text": "some words in a row", "list": [1, 2, 3]}}\n</tool_call>'
    raw = '{"text": "some words in a row", "list": [1, 2, 3]}'
    [call] = calls_of(parts_of(text[:end], HERMES))
    assert call.name == "f"
    assert raw.startswith(call.arguments)
    assert len(call.arguments) == min(len(raw), end - text.index(raw))
    assert not call.is_complete or end > text.index("}}") + 1


def cut_parts(text: str, tools: ToolFormat, **options: Any) -> list[Part]:
    machine = Machine(Formats(tools, None), tools=SCHEMAS, **options)
    parts: list[Part] = []
    for character in text:
        machine.feed(character)
        append_parts(parts, machine.take())
    machine.finish(is_cut=True)
    append_parts(parts, machine.take())
    return parts


@pytest.mark.parametrize("must_call", [True, False])
@pytest.mark.parametrize("name", sorted(TURNS))
def test_a_limit_shows_no_markup(name: str, must_call: bool) -> None:
    """Wherever a turn of calls is cut, what there is of the call is the beginning of it, and nothing is content."""
    form = TOOL_PRESETS[name]
    text = TURNS[name]
    [(function, arguments)] = calls(text, form)
    name_ends = text.rindex("f", 0, text.index("text")) + 1
    start = min((text.index(piece) + len(piece) for piece in layout_of(form).openers if piece in text), default=0)
    for end in range(1, len(text) + 1):
        parts = cut_parts(text[:end], form, must_call=must_call, strictness="exact")
        for call in calls_of(parts):
            assert call.name == function
            assert arguments.startswith(call.arguments)
        assert bool(calls_of(parts)) <= (end >= name_ends)
        if must_call or (start and start <= end and form.kind != "channel"):
            assert text_of(parts) == "", text[:end]


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('<tool_call>\n{"name": "f"', ""),
        ('<tool_call>\n{"name": "f", "arguments"', ""),
        ('<tool_call>\n{"name": "f", "arguments": {"te', '{"te'),
        ('<tool_call>\n{"arguments": {"text": "a"}, "name": "f"', '{"text": "a"}'),
        ('{"name": "f", "argu', ""),
    ],
)
def test_a_limit_behind_the_name_leaves_an_open_call(text: str, arguments: str) -> None:
    [call] = calls_of(cut_parts(text, HERMES))
    assert (call.name, call.arguments, call.is_complete) == ("f", arguments, False)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", "a <tool"),
        ("hermes", "a < "),
        ("hermes", "a <tool_call> b"),
        ("hermes", '{"name": "Ann'),
        ("llama3_json", '{"name": "Ann'),
        ("llama3_json", '{"age": 7'),
        ("pythonic", "[1, 2"),
    ],
)
def test_a_limit_leaves_what_only_looks_like_a_call(name: str, text: str) -> None:
    assert cut_parts(text, TOOL_PRESETS[name]) == [Part("text", text)]


@pytest.mark.parametrize(("name", "text"), [("hermes", 'a <tool_call>{"name": "f'), ("hermes", "a <tool_call>")])
def test_a_limit_within_a_name_drops_the_call(name: str, text: str) -> None:
    assert cut_parts(text, TOOL_PRESETS[name]) == [Part("text", "a")]


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("text", "7", "7"),
        ("text", 'a "b"\n', 'a "b"\n'),
        ("number", "7", 7),
        ("number", "seven", "seven"),
        ("either", "7", 7),
        ("either", "seven", "seven"),
        ("maybe", "null", None),
        ("maybe", "7", "7"),
        ("choice", "1", "1"),
        ("ref", "true", "true"),
        ("list", "[1, 'a', None]", [1, "a", None]),
        ("list", '[1, "a"]', [1, "a"]),
        ("unknown", "true", True),
        ("unknown", "True", True),
        ("unknown", "NaN", "NaN"),
        ("unknown", "[oops", "[oops"),
        ("unknown", "plain", "plain"),
    ],
)
def test_types_are_the_schemas(key: str, written: str, value: Any) -> None:
    text = f"<tool_call>\n<function=f>\n<parameter={key}>\n{written}\n</parameter>\n</function>\n</tool_call>"
    [(_, arguments)] = calls(text, TOOL_PRESETS["qwen3_coder"])
    assert json.loads(arguments) == {key: value}


def test_qwen_coder_without_its_outer_marker() -> None:
    text = "Well.\n<function=f>\n<parameter=number>7</parameter>\n</function>\n</tool_call>"
    assert calls(text, TOOL_PRESETS["qwen3_coder"]) == [("f", '{"number": 7}')]


@pytest.mark.parametrize(
    ("literal", "value"),
    [
        ('"a\\n\\"\\x41\\u00e9\\q"', 'a\n"Aé\\q'),
        ("'it\\'s'", "it's"),
        ("-1.5e3", -1500.0),
        ("[1, 'a', True, None, (2,), {'k': {}}]", [1, "a", True, None, [2], {"k": {}}]),
        ("{'a': [], \"b\": false}", {"a": [], "b": False}),
        ("0x1F", "0x1F"),
        ('"\\ud83d"', "\ud83d"),
    ],
)
def test_literals_become_json(literal: str, value: Any) -> None:
    [(_, arguments)] = calls(f"[f(a={literal}, number=1)]", TOOL_PRESETS["pythonic"])
    assert json.loads(arguments) == {"a": value, "number": 1}
    arguments.encode()  # no half of a surrogate pair is left


def test_bare_calls_must_name_a_tool() -> None:
    llama = TOOL_PRESETS["llama3_json"]
    assert calls('{"name": "f", "parameters": {}}; {"name": "f", "parameters": {"number": 2}}', llama) == [
        ("f", "{}"),
        ("f", '{"number": 2}'),
    ]
    for text in ('{"name": "g", "parameters": {}}', '{"a": 1}', '{"name"', "[1, 2]", ' {"name": "f", "x'):
        assert calls(text, llama) == []
        assert text_of(parts_of(text, llama)).strip() == text.strip()
    assert calls('So: {"name": "f", "parameters": {}}', llama) == []


def test_a_call_without_its_marker() -> None:
    """Qwen2.5-Coder-0.5B's answer to tools, more often than not."""
    text = '{"name": "f", "arguments": {"text": "a"}}'
    assert calls(text, HERMES) == calls(text + "\n</tool_call>", HERMES) == [("f", '{"text": "a"}')]
    assert parts_of(text + "\n</tool_call>", HERMES)[-1].kind == "call_end"
    assert calls("So " + text, HERMES) == []


def test_reasoning() -> None:
    opened = {"reasoning_is_open": True}
    for text, opens, thought, said in (
        ("<think>\nhm\n</think>\n\nyes", {}, "hm", "yes"),
        ("hm\n</think>yes", opened, "hm", "yes"),
        ("\n</think>\n\nyes", opened, "", "yes"),
        ("hm, 1 < 2 </thin", opened, "hm, 1 < 2 </thin", ""),
        ("</think>yes", {}, "", "yes"),
        ("yes <think>no</think>", {}, "", "yes <think>no</think>"),
        (" yes", {}, "", " yes"),
        ("<thin", {}, "", "<thin"),
    ):
        for size in (1, 2, len(text)):
            parts = parts_of(text, None, THINK, size=size, **opens)
            assert (reasoning_of(parts), text_of(parts)) == (thought, said)


def test_a_call_in_the_reasoning_is_thought() -> None:
    text = '<think><tool_call>{"name": "f"}</tool_call></think><tool_call>{"name": "f"}</tool_call>'
    parts = parts_of(text, HERMES, THINK)
    assert [part.kind for part in parts] == ["reasoning", "call", "arguments", "call_end"]


def test_what_the_prompt_opens() -> None:
    assert THINK.opened_by("user: hi\nassistant: <think>\n")
    assert not THINK.opened_by("assistant: <think>\n\n</think>\n\n")
    assert not THINK.opened_by("assistant: ")
    closed = "<think>\nhm</think>\n\nParis is"
    assert THINK.closed_by(f"assistant: {closed}", closed)
    assert not THINK.opened_by(f"assistant: {closed}", closed)
    assert REASONING_PRESETS["deepseek_r1"].opened_by("assistant: ")
    assert not REASONING_PRESETS["deepseek_r1"].opened_by(f"assistant: {closed}", closed)
    assert not REASONING_PRESETS["deepseek_r1"].opened_by("assistant: <think></think>")


def test_harmony() -> None:
    text = (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        '<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"number":1}<|call|>'
        "<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{}<|call|>"
        "<|start|>assistant<|channel|>final<|message|>Done.<|return|>"
    )
    for size in (1, 5, len(text)):
        parts = parts_of(text, TOOL_PRESETS["openai"], size=size)
        assert reasoning_of(parts) == "hm"
        assert text_of(parts) == "I look.Done."
        assert [(call.name, call.arguments) for call in calls_of(parts)] == [("f", '{"number":1}'), ("f", "{}")]
    assert parts_of("Just text.", TOOL_PRESETS["openai"]) == [Part("text", "Just text.")]


def test_a_header_that_the_prompt_began() -> None:
    form = TOOL_PRESETS["functionary_v3_2"]
    text = 'all\nLet me see.>>>f\n{"number": 1}'
    assert form.opened_by("assistant\n\n>>>")
    parts = parts_of(text, form, call_is_open=True)
    assert text_of(parts) == "Let me see."
    assert calls(text, form, call_is_open=True) == [("f", '{"number": 1}')]


def test_call_ids() -> None:
    assert re.fullmatch(r"call_[0-9a-f]{24}", new_call_id("hex", "f", 0))
    assert is_call_id("mistral", new_call_id("mistral", "f", 0))
    assert new_call_id("kimi", "f", 3) == "functions.f:3"
    assert new_call_id("hex", "f", 0) != new_call_id("hex", "f", 0)
    machine = Machine(Formats(TOOL_PRESETS["kimi_k2"], None), num_before=2)
    machine.feed(TURNS["kimi_k2"].replace(":0", ""))
    machine.feed(TURNS["kimi_k2"].replace(":0", ":7"))
    machine.finish()
    assert [call.call_id for call in calls_of(machine.take())] == ["functions.f:2", "functions.f:7"]


# Special tokens


def tokenizer() -> Tokenizer:
    backend = Backend.from_file(str(TINY / "tokenizer.json"))
    backend.add_special_tokens(
        [AddedToken(text, special=True) for text in ("<call>", "</call>", "<eot>", "<hm>", "</hm>")]
    )
    return Tokenizer(backend, {})


TOKENS = tokenizer()
SPECIAL = {text: TOKENS.token_id(text) or 0 for text in ("<call>", "</call>", "<eot>", "<hm>", "</hm>")}
MARKED = ToolFormat(
    "json",
    call_begin='<call>{"name": "',
    name_to_arguments='", "arguments": ',
    call_end="}</call>",
    keys=("name", "arguments"),
)


def parsed_tokens(ids: list[int], stops: tuple[str, ...] = ()) -> tuple[list[Part], str | None]:
    formats = Formats.bind(MARKED, ReasoningFormat("<hm>", "</hm>"), SPECIAL)
    decoder = MarkingDecoder(TOKENS, marks=formats.marks)
    it = FormatParser(Detokenizer(decoder, stops), Machine(formats))
    parts: list[Part] = []
    for token_id in ids:
        it.push(token_id, silent=False)
        append_parts(parts, it.take())
        if it.stopped_by is not None:
            break
    else:
        it.finish()
    append_parts(parts, it.take())
    return parts, it.stopped_by


def test_special_tokens_match_by_id() -> None:
    ids = TOKENS.encode('<hm>so é</hm>ok<call>{"name": "f", "arguments": {"a": "é"}}</call>')
    parts, _ = parsed_tokens(ids)
    assert reasoning_of(parts) == "so é"
    assert text_of(parts) == "ok"
    assert [(call.name, call.arguments) for call in calls_of(parts)] == [("f", '{"a": "é"}')]


def test_what_is_spelled_out_is_text() -> None:
    spelled = [token_id for character in '<call>{"name": "f"}</call>' for token_id in TOKENS.encode(character)]
    parts, _ = parsed_tokens(spelled)
    assert parts == [Part("text", '<call>{"name": "f"}</call>')]


def test_other_special_tokens_are_left_out() -> None:
    parts, _ = parsed_tokens(TOKENS.encode("a<eot>b</call>c"))
    assert parts == [Part("text", "abc")]


def test_a_special_token_ends_broken_arguments() -> None:
    ids = TOKENS.encode('<call>{"name": "f", "arguments": {"a": "b</call>!')
    parts, _ = parsed_tokens(ids)
    [call] = calls_of(parts)
    assert json.loads(call.arguments) == {"a": "b"}
    assert text_of(parts) == "!"


def test_a_stop_string_within_a_call() -> None:
    ids = TOKENS.encode('<call>{"name": "f", "arguments": {"a": "one two three"}}</call>')
    parts, stop = parsed_tokens(ids, ("two",))
    assert stop == "two"
    [call] = calls_of(parts)
    assert (call.arguments, call.is_complete) == ('{"a": "one ', False)


def test_a_stop_string_in_front_of_a_name() -> None:
    ids = TOKENS.encode('ok <call>{"name": "f", "arguments": {}}</call>')
    parts, stop = parsed_tokens(ids, ("name",))
    assert stop == "name"
    assert parts == [Part("text", "ok")]


@given(st.text("<call>/{}\"name:, f\n'", max_size=40), st.lists(st.integers(1, 5), min_size=1))
def test_any_text_in_any_pieces_says_the_same(text: str, sizes: list[int]) -> None:
    """Whatever the text, no piece is lost on the way: what is no call is content."""
    form = MARKED
    whole = parts_of(text, form, size=max(1, len(text)))
    machine = Machine(Formats(form, None))
    parts: list[Part] = []
    start = 0
    while start < len(text):
        size = sizes[start % len(sizes)]
        machine.feed(text[start : start + size])
        start += size
        append_parts(parts, machine.take())
    machine.finish()
    append_parts(parts, machine.take())
    assert [(part.kind, part.text) for part in parts] == [(part.kind, part.text) for part in whole]
    if not calls_of(whole):
        assert text_of(whole) == text


@pytest.mark.parametrize(
    ("arguments", "is_complete"), [('{"a": 1}', True), ("{}", True), ('{"a": ', False), ("", False)]
)
def test_a_message_that_the_answer_s_end_ends(arguments: str, is_complete: bool) -> None:
    """gpt-oss's calls end by a token that ends the answer too, and says nothing."""
    machine = Machine(Formats(TOOL_PRESETS["openai"], None))
    machine.feed(f"<|channel|>commentary to=functions.f<|message|>{arguments}")
    machine.finish()
    [call] = calls_of(machine.take())
    assert (call.arguments, call.is_complete) == (arguments, is_complete)
