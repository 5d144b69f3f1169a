"""Answers with tool calls and reasoning, of which the model's tokens are given: no engine runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from openai.types.chat import ChatCompletion, ChatCompletionChunk

from octavo.runtime.messages import TokenOutput
from octavo.server.dialects.chat_request import ChatCompletionRequest, wanted_of
from octavo.server.dialects.openai_chat import ChatAnswer
from octavo.server.dialects.tools import reading_of
from octavo.server.generation import Delta, make_choices
from octavo.server.message.format import ReasoningFormat
from octavo.server.message.infer import Inference
from octavo.server.message.model_formats import ModelFormats
from octavo.server.message.presets import TOOL_PRESETS
from octavo.server.message.probe import History
from octavo.server.prompts import Prompt
from octavo.server.served_model import ServedModel
from octavo.server.template_renderer import TemplateRenderer
from octavo.text.chat_template import ChatTemplate
from octavo.text.tokenizer import Tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"
TOKENIZER = Tokenizer.open(FIXTURES / "tiny")
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "d", "parameters": PARAMETERS}}
    for name in ("get_weather", "get_time")
]
FUNCTIONS = [tool["function"] for tool in TOOLS]
NAMED = {"type": "function", "function": {"name": "get_time"}}
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}
FOUND = Inference(TOOL_PRESETS["hermes"], "inferred", ReasoningFormat("<think>", "</think>"), "inferred", History())
ANSWER = (
    "<think>\nhm, two calls\n</think>\n\nI look.\n"
    '<tool_call>\n{"name": "get_weather", "arguments": {"city":  "Zürich"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
)


def model(found: Inference = FOUND) -> ServedModel:
    source = (FIXTURES / "templates" / "octavo-qwen2.5-coder.jinja").read_text(encoding="utf-8")
    return ServedModel(
        names=("tiny",),
        root="tiny",
        tokenizer=TOKENIZER,
        renderer=TemplateRenderer(ChatTemplate({"default": source}, {})),
        end_ids=frozenset(),
        defaults={},
        max_model_len=4096,
        vocab_size=TOKENIZER.num_tokens,
        max_num_seqs=1,
        formats=ModelFormats.bound(found, {}),
    )


def request(**fields: Any) -> ChatCompletionRequest:
    messages = [{"role": "user", "content": "Hi"}]
    return ChatCompletionRequest.model_validate({"messages": messages, "tools": TOOLS, "stream": True} | fields)


def deltas(answer: ChatAnswer, text: str, finish: str = "stop", step: int = 1) -> list[Delta]:
    ids = TOKENIZER.encode(text)
    [choice] = answer.choices
    found = []
    for start in range(0, len(ids), step):
        is_last = start + step >= len(ids)
        output = TokenOutput(
            choice.request.request_id,
            ids[start : start + step],
            finish if is_last else None,  # type: ignore[arg-type]
            num_cached_tokens=0 if start == 0 else None,
        )
        found.append(choice.take(output))
    return found


def answer_to(body: ChatCompletionRequest, prompt: str = "user: Hi") -> ChatAnswer:
    served = model()
    reading = reading_of(prompt, body, body.messages, served)
    choices = make_choices([Prompt(TOKENIZER.encode(prompt))], body, wanted_of(body), served, reading)
    return ChatAnswer(body, choices, served, "x")


def streamed(text: str, finish: str = "stop", step: int = 1, **fields: Any) -> tuple[dict[str, Any], str | None]:
    """The chunks added up, as a client does it."""
    answer = answer_to(request(**fields))
    message: dict[str, Any] = {"content": "", "reasoning": "", "reasoning_content": "", "calls": []}
    reason = None
    for delta in deltas(answer, text, finish, step):
        for chunk in answer.chunks(delta):
            [choice] = ChatCompletionChunk.model_validate(chunk).choices
            said = chunk["choices"][0]["delta"]
            for name in ("content", "reasoning", "reasoning_content"):
                message[name] += said.get(name) or ""
            for call in choice.delta.tool_calls or ():
                assert call.function is not None
                if call.index == len(message["calls"]):
                    assert (call.type, call.function.arguments) == ("function", "")
                    message["calls"].append([call.id, call.function.name, ""])
                else:
                    assert (call.index, call.id, call.function.name) == (len(message["calls"]) - 1, None, None)
                message["calls"][call.index][2] += call.function.arguments or ""
            assert reason is None
            reason = choice.finish_reason
    return message, reason


def whole(text: str, finish: str = "stop", **fields: Any) -> tuple[dict[str, Any], str | None]:
    answer = answer_to(request(stream=False, **fields))
    first, *later = deltas(answer, text, finish)
    for delta in later:
        first.extend(delta)
    body = answer.whole([first])
    body["choices"] = list(body["choices"])
    [choice] = ChatCompletion.model_validate(body).choices
    message = body["choices"][0]["message"]
    calls = [
        [call["id"], call["function"]["name"], call["function"]["arguments"]] for call in message.get("tool_calls", ())
    ]
    return {**message, "calls": calls}, choice.finish_reason


THINKS = Inference(None, "none", ReasoningFormat("<|im_start|>", "<|im_end|>", is_implied=True), "inferred", History())
SCHEMA = {"response_format": {"type": "json_object"}, "tools": None}


def constrained(found: Inference, prompt: str, **fields: Any) -> ChatAnswer:
    asked = request(**SCHEMA | fields)
    served = model(found)
    reading = reading_of(prompt, asked, asked.messages, served)
    return ChatAnswer(asked, make_choices([Prompt([5])], asked, wanted_of(asked), served, reading), served, "a")
