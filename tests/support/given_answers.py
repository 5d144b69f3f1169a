"""Answers whose tokens are given, for tests of dialects: no engine runs, and all else is the server's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from octavo.runtime.messages import TokenOutput
from octavo.server.dialects.chat_request import ChatCompletionRequest, prompt_of
from octavo.server.dialects.tools import reading_of
from octavo.server.errors import ApiError
from octavo.server.generation import Choice, Delta, Steps, make_choices
from octavo.server.message.format import ReasoningFormat
from octavo.server.message.infer import Inference
from octavo.server.message.model_formats import ModelFormats
from octavo.server.message.presets import TOOL_PRESETS
from octavo.server.message.probe import History
from octavo.server.served_model import ServedModel
from octavo.server.service import Answer
from octavo.server.template_renderer import TemplateRenderer
from octavo.text.chat_template import ChatTemplate
from octavo.text.tokenizer import Tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"
TOKENIZER = Tokenizer.open(FIXTURES / "tiny")
THINKING = ReasoningFormat("<think>", "</think>", switch="enable_thinking", can_disable=True)
FOUND = Inference(TOOL_PRESETS["hermes"], "inferred", THINKING, "inferred", History())
SILENT = Inference(TOOL_PRESETS["hermes"], "inferred", None, "none", History())
ANSWER = (
    "<think>\nhm, two calls\n</think>\n\nI look.\n"
    '<tool_call>\n{"name": "get_weather", "arguments": {"city":  "Zürich", "days": [1, 2]}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
)


def served(found: Inference = FOUND, *, template: str = "octavo-qwen2.5-coder") -> ServedModel:
    """The tiny checkpoint's text side, with another model's formats and template."""
    source = (FIXTURES / "templates" / f"{template}.jinja").read_text(encoding="utf-8")
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return ServedModel(
        names=("tiny",),
        root="tiny",
        tokenizer=TOKENIZER,
        renderer=TemplateRenderer(ChatTemplate({"default": source}, special)),
        end_ids=frozenset(),
        defaults={},
        max_model_len=4096,
        vocab_size=TOKENIZER.num_tokens,
        max_num_seqs=1,
        formats=ModelFormats.bound(found, {}),
    )


def choices_of(chat: ChatCompletionRequest, model: ServedModel, prompt: str = "user: Hi") -> list[Choice]:
    """The one choice of a conversation whose prompt is this text; its limit is clamped."""
    reading = reading_of(prompt, chat, chat.messages, model)
    ids, wanted = prompt_of(prompt, chat, model, clamps=True)
    return make_choices([ids], chat, wanted, model, reading)


def steps_of(choices: Sequence[Choice], text: str, finish: str, size: int, num_cached: int = 3) -> list[list[Delta]]:
    """The deltas of an answer of this text, `size` tokens at a time."""
    [choice] = choices
    ids = TOKENIZER.encode(text)
    found = []
    for start in range(0, max(1, len(ids)), size):
        output = TokenOutput(
            choice.request.request_id,
            ids[start : start + size],
            finish if start + size >= len(ids) else None,  # type: ignore[arg-type]
            num_cached_tokens=num_cached if start == 0 else None,
        )
        found.append([choice.take(output)])
        if choice.finish_reason is not None:
            break
    return found


def folded(steps: Sequence[Sequence[Delta]]) -> list[Delta]:
    """All of them joined, as a whole answer's are."""
    (first,), *later = steps
    for (delta,) in later:
        first.extend(delta)
    return [first]


def pieces_of(answer: Answer, steps: Sequence[list[Delta]]) -> list[bytes]:
    """The pieces of the answer's stream. An error is its last one."""

    async def given() -> Steps:
        for deltas in steps:
            yield deltas

    async def collected() -> list[bytes]:
        pieces: AsyncIterator[bytes] = answer.events(given())
        return [piece async for piece in _with_error(pieces, answer)]

    return asyncio.run(collected())


async def _with_error(pieces: AsyncIterator[bytes], answer: Answer) -> AsyncIterator[bytes]:
    try:
        async for piece in pieces:
            yield piece
    except ApiError as error:
        yield answer.framing.error(error)
