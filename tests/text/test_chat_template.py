"""Chat templates give what transformers' apply_chat_template gives, or an error that says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from octavo.text.chat_template import ChatTemplate, ChatTemplateError

TINY = Path(__file__).parent.parent / "fixtures" / "tiny"
SPECIAL = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}

# The constructs that templates of real models use: namespaces, loop controls, tojson, dates, generation, strip.
TEMPLATES = {
    "chatml": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama 3": "{{ bos_token }}{% for m in messages %}\n    {% if loop.index0 > 9 %}{% break %}{% endif %}\n"
    "<|{{ m.role }}|>\n{{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}\n"
    "{%- if add_generation_prompt %}<|assistant|>{%- endif %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}[{{ m | tojson }}]{% endif %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m.content | length %}"
    "{% endfor %}{{ ns.n }}{{ strftime_now('%Y') }}{{ thinking | default(true) }}",
    "parts": "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}<{{ part.text }}>{% endfor %}{% endif %}{% endfor %}",
}
CHATS = [
    [{"role": "user", "content": 'Hi <b>"there"</b> é'}],
    [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "1 < 2?\n"},
        {"role": "assistant", "content": "Yes, "},
    ],
]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_rendering_equals_transformers(name: str, add_generation_prompt: bool) -> None:
    theirs = PreTrainedTokenizerFast.from_pretrained(TINY, **SPECIAL)
    ours = ChatTemplate({"default": TEMPLATES[name]}, SPECIAL)
    for chat in CHATS:
        expected = theirs.apply_chat_template(
            chat,
            chat_template=TEMPLATES[name],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            thinking=False,
        )
        rendered = ours.render(chat, add_generation_prompt=add_generation_prompt, variables={"thinking": False})
        assert rendered == expected


@pytest.mark.parametrize("name", ["chatml", "llama 3"])
def test_continuing_the_final_message_equals_transformers(name: str) -> None:
    theirs = PreTrainedTokenizerFast.from_pretrained(TINY, **SPECIAL)
    expected = theirs.apply_chat_template(
        CHATS[1], chat_template=TEMPLATES[name], tokenize=False, continue_final_message=True
    )
    rendered = ChatTemplate({"default": TEMPLATES[name]}, SPECIAL).render(
        CHATS[1], add_generation_prompt=False, continue_final_message=True
    )
    assert rendered == expected
    assert rendered.endswith(("Yes,", "Yes, "))


def test_text_parts_are_joined_unless_the_template_walks_over_them() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    chat = [{"role": "user", "content": parts}]
    assert "one\ntwo" in ChatTemplate({"default": TEMPLATES["chatml"]}, {}).render(chat)
    assert ChatTemplate({"default": TEMPLATES["parts"]}, {}).render(chat) == "<one><two>"
    assert chat[0]["content"] is parts, "the caller's messages must stay as they are"


def test_where_templates_come_from(tmp_path: Path) -> None:
    assert "<|im_start|>" in ChatTemplate.open(TINY, {}).templates["default"]
    (tmp_path / "tokenizer_config.json").write_text(
        '{"chat_template": [{"name": "default", "template": "A"}, {"name": "rag", "template": "B"}]}'
    )
    listed = ChatTemplate.open(tmp_path, {})
    assert listed.render([]) == "A"
    assert listed.render([], template="rag") == "B"
    (tmp_path / "chat_template.jinja").write_text("C")
    assert ChatTemplate.open(tmp_path, {}).render([]) == "C"
    assert ChatTemplate.open(tmp_path, {}, str(tmp_path / "chat_template.jinja")).render([]) == "C"
    assert ChatTemplate.open(tmp_path, {}, "{{ 'D' }}").render([]) == "D"
    with pytest.raises(ChatTemplateError, match="neither a file nor a template"):
        ChatTemplate.open(tmp_path, {}, "missing.jinja")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("x\n{% for %}", "chat template, line 2: "),
        ("{{ messages[0]['content'] + 1 }}", "refused"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|refused"),
        ("{{ messages.clear() }}", "unsafe|refused"),
        ("{{ 1 // 0 }}", "refused"),
    ],
)
def test_a_failing_template_is_one_kind_of_error(template: str, says: str) -> None:
    with pytest.raises(ChatTemplateError, match=says):
        ChatTemplate({"default": template}, {}).render([{"role": "user", "content": "x"}])


def test_a_template_may_grow_a_list_of_copies() -> None:
    """Kimi K2's keeps its calls' ids in one, which transformers refuses; the caller's values stay as they are."""
    messages = [{"role": "user", "content": "x"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    variables = {"seen": ["a"]}
    template = "{% set _ = seen.append('b') %}{% set _ = tools.append(1) %}{% set _ = messages.pop(0) %}{{ seen }}"
    assert ChatTemplate({"default": template}, {}).render(messages, tools=tools, variables=variables) == "['a', 'b']"
    assert (len(messages), len(tools), variables) == (1, 1, {"seen": ["a"]})


CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "look", "arguments": {"word": 'a "b" é'}}}
TOOL_CHAT = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "Let me see.", "reasoning": "hm", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "abcdefghi", "name": "look", "content": "found"},
]
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks up.",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string", "description": "it"}},
            "required": [],
        },
    },
}
RELEASED = sorted((Path(__file__).parents[1] / "fixtures" / "templates").glob("*.jinja"))
MORE_THAN_TRANSFORMERS = {  # which refuses them, or wants to be told more than it is
    "Kimi-K2-Instruct",
    "Kimi-K2-Thinking",
    "llama-cpp-deepseek-r1",
    "fireworks-ai-llama-3-firefunction-v2",
}


@pytest.mark.parametrize("file", RELEASED, ids=lambda file: file.stem)
def test_tools_and_reasoning_render_as_in_transformers(file: Path) -> None:
    source = file.read_text()
    theirs = PreTrainedTokenizerFast.from_pretrained(TINY, **SPECIAL)
    try:
        expected = theirs.apply_chat_template(
            TOOL_CHAT, tools=[TOOL], chat_template=source, add_generation_prompt=True, tokenize=False
        )
    except Exception:
        expected = None
    try:
        rendered = ChatTemplate({"default": source}, SPECIAL).render(TOOL_CHAT, tools=[TOOL])
    except ChatTemplateError:
        rendered = None
    assert rendered == expected or (expected is None and file.stem in MORE_THAN_TRANSFORMERS)


def test_a_template_that_can_not_be_compiled_is_named_with_its_line(tmp_path: Path) -> None:
    broken = "line one\n{% if %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": broken}))
    with pytest.raises(ChatTemplateError, match=r"^tokenizer_config\.json, chat_template, line 2: "):
        ChatTemplate.open(tmp_path, {}).check()
    (tmp_path / "chat_template.jinja").write_text("{{ messages | no_such_filter }}")
    with pytest.raises(ChatTemplateError, match=r"^chat_template\.jinja, line 1: .*no_such_filter"):
        ChatTemplate.open(tmp_path, {}).check()
    with pytest.raises(ChatTemplateError, match=r"^--chat-template, line 2: "):
        ChatTemplate.open(tmp_path, {}, broken).check()
    (tmp_path / "chat_template.jinja").write_text("fine")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text(broken)
    with pytest.raises(ChatTemplateError, match=r"^additional_chat_templates/rag\.jinja, line 2: "):
        ChatTemplate.open(tmp_path, {}).check()


@pytest.mark.parametrize("template", [5, ["x"], [{"name": "default"}], {"default": 5}])
def test_a_template_of_a_wrong_type_is_told_by_its_file(tmp_path: Path, template: object) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(ChatTemplateError, match=r"tokenizer_config\.json: chat_template must be"):
        ChatTemplate.open(tmp_path, {})


def test_no_template_says_what_to_do() -> None:
    with pytest.raises(ChatTemplateError, match="--chat-template"):
        ChatTemplate({}, {}).render([{"role": "user", "content": "x"}])
    with pytest.raises(ChatTemplateError, match="'rag'"):
        ChatTemplate({"rag": "B"}, {}).render([])
