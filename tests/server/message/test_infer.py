"""Chat templates of released models: what is found out from each, and that turns which transformers writes are read.

The truth is transformers' own apply_chat_template: it renders a turn with reasoning, content and calls, and the parser
must give the same back by value, however the text is cut.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jsonschema
import pytest
from call_walks import CALL_SCHEMAS, FIRST_SPECIAL, Walker
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import FIXTURES, TOKENIZER, inference, source, template
from transformers.utils import chat_template_utils

from octavo.runtime.messages import Constraint
from octavo.server.message.call_constraint import WantedCalls, WantedTool, grammar_of_calls
from octavo.server.message.format import ReasoningFormat, ToolFormat
from octavo.server.message.infer import is_proved
from octavo.server.message.parse import Formats, Machine
from octavo.server.message.parts import Part, append_parts, calls_of, reasoning_of, text_of
from octavo.server.message.presets import TOOL_PRESETS
from octavo.server.message.probe import Probe

NO_CALLS = "none: the template doesn't show tool calls"
NO_RENDERING = "none: the template can't render a tool call"

# How the tool format of each template is found; 49 of them know tool calls.
TABLE = {
    "Apertus-8B-Instruct": "inferred",
    "Apriel-1.6-15b-Thinker-fixed": "inferred",
    "Bielik-11B-v3.0-Instruct": "inferred",
    "ByteDance-Seed-OSS": "inferred",
    "Cohere2MoE": "inferred",
    "CohereForAI-c4ai-command-r-plus-tool_use": "inferred",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "inferred",
    "GLM-4.6": "inferred",
    "GLM-4.7-Flash": "inferred",
    "GLM-5.2": "inferred",
    "GigaChat3-10B-A1.8B": "inferred",
    "GigaChat3.1-10B-A1.8B": "inferred",
    "HuggingFaceTB-SmolLM3-3B": NO_CALLS,
    "Kimi-K2-Instruct": "inferred",
    "Kimi-K2-Thinking": "inferred",
    "LFM2-8B-A1B": NO_CALLS,
    "LFM2.5-Instruct": NO_CALLS,
    "MiMo-VL": "inferred",
    "MiroThinker": NO_RENDERING,  # for llama.cpp's engine: it assigns to a tool's fields, which jinja2 refuses
    "Mistral-Small-3.2-24B-Instruct-2506": "inferred",
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": "inferred",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": "inferred",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "inferred",
    "Qwen-QwQ-32B": "inferred",
    "Qwen-Qwen2.5-7B-Instruct": "inferred",
    "Qwen-Qwen3-0.6B": "inferred",
    "Qwen3-Coder": "inferred",
    "Qwen3.5-4B": "inferred",
    "Reka-Edge": "inferred",
    "StepFun3.5-Flash": "inferred",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "inferred",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "inferred",
    "deepseek-ai-DeepSeek-V3.1": "inferred",
    "deepseek-ai-DeepSeek-V3.2": "inferred",
    "deepseek-ai-DeepSeek-V4": "inferred",
    "fireworks-ai-llama-3-firefunction-v2": "inferred",
    "google-gemma-2-2b-it": NO_CALLS,
    "google-gemma-4-31B-it-interleaved": "preset gemma4",
    "google-gemma-4-31B-it": "preset gemma4",
    "ibm-granite-granite-3.3-2B-Instruct": NO_CALLS,
    "llama-cpp-deepseek-r1": "inferred",
    "llama-cpp-rwkv-world": NO_CALLS,
    "meetkai-functionary-medium-v3.1": "inferred",
    "meetkai-functionary-medium-v3.2": "preset functionary_v3_2",
    "meta-llama-Llama-3.1-8B-Instruct": "inferred",
    "meta-llama-Llama-3.2-3B-Instruct": "inferred",
    "meta-llama-Llama-3.3-70B-Instruct": "inferred",
    "microsoft-Phi-3.5-mini-instruct": NO_CALLS,
    "mistralai-Ministral-3-14B-Reasoning-2512": "inferred",
    "mistralai-Mistral-Nemo-Instruct-2407": "inferred",
    "moonshotai-Kimi-K2": "inferred",
    "octavo-qwen2.5-coder": "inferred",
    "octavo-smollm2": NO_CALLS,
    "openai-gpt-oss-120b": "preset openai",
    "stepfun-ai-Step-3.5-Flash": "inferred",
    "unsloth-Apriel-1.5": "inferred",
    "unsloth-mistral-Devstral-Small-2507": "inferred",
}  # fmt: skip
WORKING = sorted(name for name, how in TABLE.items() if not how.startswith("none"))

THINK = ("<think>", "</think>")
COHERE = ("<|START_THINKING|>", "<|END_THINKING|>")

# markers, the switch, whether the model thinks without it, whether "off" ends the thinking
REASONING = {
    "Apertus-8B-Instruct": ("<|inner_prefix|>", "<|inner_suffix|>", "enable_thinking", False, True),
    "Apriel-1.6-15b-Thinker-fixed": ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]", None, True, False),
    "Bielik-11B-v3.0-Instruct": (*THINK, "enable_thinking", False, True),
    "ByteDance-Seed-OSS": ("<seed:think>", "</seed:think>", None, True, False),
    "Cohere2MoE": (*COHERE, None, True, False),
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": (*COHERE, "enable_thinking", False, True),
    "GLM-4.6": (*THINK, "enable_thinking", True, True),
    "GLM-4.7-Flash": (*THINK, "enable_thinking", True, True),
    "GLM-5.2": (*THINK, "enable_thinking", True, True),
    "HuggingFaceTB-SmolLM3-3B": (*THINK, "enable_thinking", True, True),
    "Kimi-K2-Thinking": (*THINK, None, True, False),
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": (*THINK, "enable_thinking", True, True),
    "Qwen-QwQ-32B": (*THINK, "enable_thinking", False, True),
    "Qwen-Qwen3-0.6B": (*THINK, "enable_thinking", True, True),
    "Qwen3.5-4B": (*THINK, "enable_thinking", True, True),
    "StepFun3.5-Flash": (*THINK, None, True, False),
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": (*THINK, None, True, False),
    "deepseek-ai-DeepSeek-V3.1": (*THINK, "enable_thinking", False, True),
    "deepseek-ai-DeepSeek-V3.2": (*THINK, "enable_thinking", False, True),
    "deepseek-ai-DeepSeek-V4": (*THINK, "enable_thinking", False, True),
    "google-gemma-4-31B-it": ("<|channel>thought", "<channel|>", "enable_thinking", False, True),
    "mistralai-Ministral-3-14B-Reasoning-2512": ("[THINK]", "[/THINK]", None, True, False),
    "octavo-qwen2.5-coder": None,
    "meta-llama-Llama-3.1-8B-Instruct": None,
}  # fmt: skip

PROPERTIES = {
    "path": {"type": "string", "description": "a path"},
    "query": {"type": "string", "description": "what to look for"},
    "count": {"type": "integer", "description": "how many"},
    "ratio": {"type": "number", "description": "how much"},
    "flag": {"type": "boolean", "description": "whether"},
    "items": {"type": "array", "items": {"type": "string"}, "description": "some"},
    "options": {"type": "object", "additionalProperties": {"type": "string"}, "description": "more"},
}
SCHEMA = {"type": "object", "properties": PROPERTIES, "required": ["path"]}
NAMES = ("get_weather", "read-file", "search_2")
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "A tool.", "parameters": SCHEMA}} for name in NAMES
]
SCHEMAS = dict.fromkeys(NAMES, SCHEMA)
USER = {"role": "user", "content": "What do you say?"}

Calls = list[tuple[str, dict[str, Any]]]

texts = st.text("ab c\n\t\"'\\{}[],:=()<>/&é✓𝄞0", max_size=12)
values = st.fixed_dictionaries(
    {},
    optional={
        "path": texts,
        "query": texts,
        "count": st.integers(-(2**40), 2**40),
        "ratio": st.floats(-1e6, 1e6, allow_subnormal=False),
        "flag": st.booleans(),
        "items": st.lists(texts, max_size=3),
        "options": st.dictionaries(st.text("abc", min_size=1), texts | st.integers() | st.booleans(), max_size=2),
    },
)
call_sets = st.lists(st.tuples(st.sampled_from(NAMES), values), min_size=1, max_size=3)


def golden(name: str, messages: Sequence[dict[str, Any]], *, prompt: bool = False, **variables: object) -> str:
    """What transformers renders. Three templates are beyond it, each in one point, which is mended here."""
    text = source(name)
    if name in ("Kimi-K2-Instruct", "Kimi-K2-Thinking"):  # they append to a list
        environment = chat_template_utils._compile_jinja_template(text).environment
        environment.is_safe_attribute = lambda _value, attribute, _found: not attribute.startswith("_")
    if name == "fireworks-ai-llama-3-firefunction-v2":  # as its model card has it
        functions = json.dumps([tool["function"] for tool in TOOLS], indent=4)
        variables = {"functions": functions, "datetime": "2024-06-01 12:00:00"}
    tools = None if name == "llama-cpp-deepseek-r1" else TOOLS  # its list of tools is a generator, which json refuses
    if name == "deepseek-ai-DeepSeek-R1-Distill-Llama-8B":  # it wants content: null, which apply_chat_template drops
        rendered, _ = chat_template_utils.render_jinja_template(
            [list(messages)],
            tools=tools,
            chat_template=text,
            add_generation_prompt=prompt,
            **TOKENIZER.special_tokens_map,
        )
        return str(rendered[0])
    return str(
        TOKENIZER.apply_chat_template(
            list(messages), tools=tools, chat_template=text, add_generation_prompt=prompt, tokenize=False, **variables
        )
    )


def turn(name: str, calls: Calls, content: str, reasoning: str) -> dict[str, Any]:
    """An assistant's message as the template takes it."""
    history = inference(name).history
    message: dict[str, Any] = {"role": "assistant"}
    if content:
        message["content"] = content
    elif history.empty_content != "absent":
        message["content"] = "" if history.empty_content == "empty" else None
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [
            {
                "id": f"callid{number:03d}",
                "type": "function",
                "function": {
                    "name": called,
                    "arguments": arguments if history.arguments_are_objects else json.dumps(arguments),
                },
            }
            for number, (called, arguments) in enumerate(calls)
        ]
    return message


def answer_of(name: str, message: dict[str, Any], variables: dict[str, Any]) -> tuple[str, str]:
    """The prompt as far as the turn shares it, and what the model writes after it, without the turn's end."""
    prompt = golden(name, [USER], prompt=True, **variables)
    whole = golden(name, [USER, message], **variables)
    length = next((at for at, pair in enumerate(zip(prompt, whole, strict=False)) if pair[0] != pair[1]), len(prompt))
    if length < len(prompt):  # as far as the last whole tag or word
        length = max(whole.rfind(end, 0, length) for end in (">", "\n", " ")) + 1
    _, _, ending = golden(name, [USER, turn(name, [], "zqend", "")], **variables).rpartition("zqend")
    if name == "Apriel-1.6-15b-Thinker-fixed" and message.get("reasoning_content"):
        return prompt, without_ending(whole[length:], ending)  # history leaves out the words that open the reasoning
    return whole[:length], without_ending(whole[length:], ending)


def without_ending(answer: str, ending: str) -> str:
    """Without the turn's end, as far as it is that of a turn of text alone, in whole tags."""
    for start in [0, *(found.start() for found in re.finditer("<", ending))]:
        if ending[start:] and answer.endswith(ending[start:]):
            return answer.removesuffix(ending[start:])
    return answer


def parsed(name: str, prompt: str, answer: str, sizes: Iterator[int]) -> list[Part]:
    found = inference(name)
    machine = Machine(
        Formats(found.tools, found.reasoning),
        reasoning_is_open=found.reasoning is not None and found.reasoning.opened_by(prompt),
        call_is_open=found.tools is not None and found.tools.opened_by(prompt),
        tools=SCHEMAS,
    )
    parts: list[Part] = []
    while answer:
        size = next(sizes)
        machine.feed(answer[:size])
        answer = answer[size:]
        append_parts(parts, machine.take())
    machine.finish()
    append_parts(parts, machine.take())
    return parts


def without_special_tokens(text: str) -> str:
    """Detokenizing leaves out special tokens that are no markers, such as the end of a turn."""
    return re.sub(r"<(?:[|｜][^<>]*|[^<>]*[|｜])>", "", text).strip()


def check(name: str, calls: Calls, content: str, reasoning: str, sizes: Iterator[int]) -> None:
    found = inference(name)
    assert found.tools is not None
    calls = calls if found.tools.may_repeat else calls[:1]
    if name == "deepseek-ai-DeepSeek-R1-Distill-Llama-8B":
        calls = calls[:2]  # from the third on it writes the section's end after each
        content = ""
    switch = None if found.reasoning is None else found.reasoning.switch
    variables = {switch: True} if switch in ("enable_thinking", "thinking") else {}
    if name == "openai-gpt-oss-120b":
        content = "" if reasoning else content
    message = turn(name, calls, content, reasoning)
    prompt, answer = answer_of(name, message, variables)
    if not all(called in answer for called, _ in calls):
        return  # with content, this template leaves out the calls
    parts = parsed(name, prompt, answer, sizes)
    assert [(call.name, json.loads(call.arguments), call.is_complete) for call in calls_of(parts)] == [
        (called, arguments, True) for called, arguments in calls
    ]
    if name == "openai-gpt-oss-120b":  # content beside a call is shown as analysis
        reasoning, content = reasoning or content, ""
    shown = reasoning if reasoning and reasoning in answer else ""
    assert reasoning_of(parts) == (shown if found.reasoning or name == "openai-gpt-oss-120b" else "")
    said = without_special_tokens(text_of(parts))
    assert said == (content if content and content in answer else "")


def test_the_table_is_whole() -> None:
    files = {path.stem for path in (FIXTURES / "templates").glob("*.jinja")}
    assert set(TABLE) == files
    knowing = {name for name in files if "tool_calls" in source(name)}
    assert len(knowing) == 49
    assert len(knowing & set(WORKING)) == 48


@pytest.mark.parametrize("name", sorted(TABLE))
def test_where_the_format_is_from(name: str) -> None:
    found = inference(name)
    assert (found.tools is None) == TABLE[name].startswith("none")
    if found.tools is not None:
        assert found.tools_from == TABLE[name]


@pytest.mark.parametrize("name", sorted(REASONING))
def test_how_the_model_thinks(name: str) -> None:
    expected = REASONING[name]
    form = inference(name).reasoning
    if expected is None:
        assert form is None
        return
    begin, end, switch, default, can_disable = expected
    assert form == ReasoningFormat(begin, end, switch=switch, default=default, can_disable=can_disable)


@pytest.mark.parametrize("name", sorted(name for name, how in REASONING.items() if how and how[4]))
def test_what_the_prompt_opens(name: str) -> None:
    """Where "off" ends the thinking, the prompt never leaves it open; nor does it where thinking is off by default."""
    form = inference(name).reasoning
    assert form is not None
    off = golden(name, [USER], prompt=True, **{str(form.switch): False})
    absent = golden(name, [USER], prompt=True)
    assert not form.opened_by(off)
    assert form.default or not form.opened_by(absent)


@pytest.mark.parametrize("name", WORKING)
@settings(max_examples=10, deadline=None)
@given(calls=call_sets, has_content=st.booleans(), thinks=st.booleans(), sizes=st.lists(st.integers(1, 9), min_size=1))
def test_turns_are_read_back(name: str, calls: Calls, has_content: bool, thinks: bool, sizes: list[int]) -> None:
    def repeated() -> Iterator[int]:
        while True:
            yield from sizes

    content = "I'll look that up: a < b, [c]." if has_content else ""
    reasoning = "The user wants\n\nto know <this> {now}." if thinks else ""
    check(name, calls, content, reasoning, repeated())


@pytest.mark.parametrize("name", WORKING)
@pytest.mark.parametrize("size", [1, 1 << 20])
def test_a_golden_turn_whole_and_by_character(name: str, size: int) -> None:
    calls: Calls = [
        ("get_weather", {"path": 'C:\\a "b"\n', "count": -3, "flag": True, "options": {"a": "b", "c": False}}),
        ("read-file", {}),
        ("search_2", {"query": "", "items": ["x", "{y}"], "ratio": 0.5}),
    ]

    def sizes() -> Iterator[int]:
        while True:
            yield size

    for content in ("", "Some content."):
        for reasoning in ("", "Some thought."):
            check(name, calls, content, reasoning, sizes())


def test_no_format_where_calls_are_not_shown() -> None:
    found = inference("octavo-smollm2")
    assert (found.tools, found.reasoning) == (None, None)


def test_single_calls_are_told() -> None:
    form = inference("meta-llama-Llama-3.1-8B-Instruct").tools
    assert form == ToolFormat(
        "json",
        call_begin='{"name": "',
        name_to_arguments='", "parameters": ',
        call_end="}",
        keys=("name", "parameters"),
        may_repeat=False,
    )


PROVED = {
    "hermes": "Qwen-Qwen2.5-7B-Instruct",
    "llama3_json": "meta-llama-Llama-3.1-8B-Instruct",
    "mistral": "mistralai-Ministral-3-14B-Reasoning-2512",
    "mistral_array": "mistralai-Mistral-Nemo-Instruct-2407",
    "deepseek_v3": "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
    "deepseek_v31": "deepseek-ai-DeepSeek-V3.1",
    "deepseek_v32": "deepseek-ai-DeepSeek-V3.2",
    "deepseek_v4": "deepseek-ai-DeepSeek-V4",
    "glm45": "GLM-4.6",
    "glm47": "GLM-4.7-Flash",
    "kimi_k2": "Kimi-K2-Thinking",
    "openai": "openai-gpt-oss-120b",
    "qwen3_coder": "Qwen3-Coder",
    "step3p5": "stepfun-ai-Step-3.5-Flash",
    "seed_oss": "ByteDance-Seed-OSS",
    "gemma4": "google-gemma-4-31B-it",
    "functionary_v3_2": "meetkai-functionary-medium-v3.2",
    "cohere_command3": "CohereForAI-c4ai-command-r7b-12-2024-tool_use",
    "apertus": "Apertus-8B-Instruct",
    "gigachat3": "GigaChat3.1-10B-A1.8B",
    "phi4_mini_json": "fireworks-ai-llama-3-firefunction-v2",
}


@pytest.mark.parametrize("preset", PROVED)
def test_presets_are_what_the_templates_of_their_models_write(preset: str) -> None:
    """By the same proof as an inferred format's; a preset may leave out how often a model calls."""
    name = PROVED[preset]
    found = inference(name)
    assert found.tools is not None
    form = dataclasses.replace(TOOL_PRESETS[preset], may_repeat=found.tools.may_repeat)
    assert is_proved(Probe(template(name).render, found.history), form)


CALLING = [name for name, origin in TABLE.items() if not origin.startswith("none")]


def test_enough_templates_work() -> None:
    """Of the 49 templates that know tool calls."""
    assert len(CALLING) >= 45


@pytest.mark.parametrize("name", CALLING)
def test_constrained_calls_are_read_back(name: str) -> None:
    """What is written under the mask, by the format as it was inferred, with the template's markers as tokens.

    From the answer's beginning where a call is required; else from its first marker, if that is a token, or where the
    answer begins like a call without one.
    """
    form = inference(name).tools
    assert form is not None
    markers = sorted(set(re.findall(r"<[^<>\s]+>|\[[A-Z_]+\]", "".join(form.markers()))))
    formats = Formats.bind(form, None, {text: FIRST_SPECIAL + number for number, text in enumerate(markers)})
    wanted = [WantedTool(name, schema, name) for name, schema in CALL_SCHEMAS.items()]
    is_open = bool(form.content_name)
    required = grammar_of_calls(WantedCalls(wanted, "required", is_open=is_open), formats)
    found = grammar_of_calls(WantedCalls(wanted, is_open=is_open), formats)
    walker = Walker({mark: token_id for token_id, mark in formats.marks.items()})
    walks = [(required, Constraint(required.text), "")] * 4
    if found.triggers is not None:
        begun = "".join(formats.marks[token_id] for token_id in found.triggers.token_ids[:1])
        begun = begun or (f'{{"{form.keys[0]}": "get"' if form.keys and found.triggers.start == "{" else "")
        walks += [(found, Constraint(found.text, triggers=found.triggers), begun)] * (2 if begun else 0)
    num_calls = 0
    for seed, (found, constraint, begun) in enumerate(walks):
        text = walker.walk(constraint, seed, begun)
        if text is not None:
            machine = Machine(formats, tools=found.schemas, strictness="exact", call_is_open=is_open)
            machine.feed(text)
            machine.finish()
            assert machine.num_malformed == 0
            calls = calls_of(machine.take())
            assert calls
            num_calls += len(calls)
            for call in calls:
                jsonschema.validate(json.loads(call.arguments), CALL_SCHEMAS[call.name])
    assert num_calls
