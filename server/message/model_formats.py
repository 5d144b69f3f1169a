"""The formats of the served model: named by flags, or inferred from its chat template when the server starts."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from octavo.server.message.format import ReasoningFormat, ToolFormat
from octavo.server.message.infer import Inference, infer
from octavo.server.message.parse import Formats
from octavo.server.message.presets import CHANNEL_NAMES, REASONING_PRESETS, SEVERAL_WAYS, TOOL_PRESETS
from octavo.server.message.probe import History
from octavo.server.template_renderer import TemplateRenderer
from octavo.text.chat_template import ChatTemplateError, Message
from octavo.text.template_process import Job

MAX_PROBE = 1 << 20  # characters of one rendering at start
NO_INFERENCE = Inference(None, "there is no chat template", None, "there is no chat template", History())


@dataclass(frozen=True)
class ModelFormats:
    """What the served model's answers are read with.

    with_tools is for requests that bring tools, without_tools for those that don't.
    """

    found: Inference = NO_INFERENCE
    with_tools: Formats = field(default_factory=lambda: Formats(None, None))
    without_tools: Formats = field(default_factory=lambda: Formats(None, None))

    @classmethod
    def bound(cls, found: Inference, special_tokens: Mapping[str, int]) -> ModelFormats:
        """The formats for this tokenizer's special tokens."""
        is_channel = found.tools is not None and found.tools.kind == "channel"
        return cls(
            found,
            Formats.bind(found.tools, found.reasoning, special_tokens),
            Formats.bind(found.tools if is_channel else None, found.reasoning, special_tokens),
        )

    def lines(self) -> list[str]:
        """What is said at start."""
        found = self.found
        tools = "none" if found.tools is None else f"{found.tools.kind}"
        reasoning = "none"
        if found.reasoning is not None:
            reasoning = f"{found.reasoning.begin} ... {found.reasoning.end}"
            if found.reasoning.switch is not None:
                reasoning += f", switched by {found.reasoning.switch}"
        return [f"tool calls: {tools} ({found.tools_from})", f"reasoning: {reasoning} ({found.reasoning_from})"]


def check_names(tool_parser: str | None, reasoning_parser: str | None) -> None:
    """Raises ValueError for a parser's name that is not known."""
    names: tuple[tuple[str, str | None, Sequence[str]], ...] = (
        ("--tool-call-parser", tool_parser, [*TOOL_PRESETS]),
        ("--reasoning-parser", reasoning_parser, [*REASONING_PRESETS, *CHANNEL_NAMES]),
    )
    for flag, name, presets in names:
        if name is not None and name not in presets and name != "auto":
            raise ValueError(
                f"{flag} {name!r} is not known; auto (inferred from the template), {', '.join(presets)} are"
            )


async def find_formats(
    renderer: TemplateRenderer,
    special_tokens: Mapping[str, int],
    tool_parser: str | None = None,
    reasoning_parser: str | None = None,
) -> ModelFormats:
    """The formats that the flags name, else those that the model's own template shows."""
    found = await _inferred(renderer)
    tools: ToolFormat | None = found.tools
    tools_from = found.tools_from
    reasoning: ReasoningFormat | None = found.reasoning
    reasoning_from = found.reasoning_from
    if tool_parser not in (None, "auto"):
        named = TOOL_PRESETS[str(tool_parser)]
        begin = SEVERAL_WAYS.get(str(tool_parser))
        is_of_template = (
            begin is not None and tools is not None and (tools.section_begin or tools.call_begin).startswith(begin)
        )
        tools = tools if is_of_template else named
        tools_from = f"--tool-call-parser {tool_parser}{', as the template has it' if is_of_template else ''}"
    if reasoning_parser in CHANNEL_NAMES:
        tools = TOOL_PRESETS["openai"]
        reasoning = None
        tools_from = reasoning_from = f"--reasoning-parser {reasoning_parser}"
    elif reasoning_parser not in (None, "auto"):
        reasoning = REASONING_PRESETS[str(reasoning_parser)]
        reasoning_from = f"--reasoning-parser {reasoning_parser}"
    return ModelFormats.bound(Inference(tools, tools_from, reasoning, reasoning_from, found.history), special_tokens)


async def _inferred(renderer: TemplateRenderer) -> Inference:
    """Inference, in a thread: each rendering is done by the process that has limits."""
    loop = asyncio.get_running_loop()
    try:
        source = renderer.template.choose(renderer.template.name_for(None, has_tools=True)).text
    except ChatTemplateError:
        return NO_INFERENCE

    def render(
        messages: Sequence[Message],
        *,
        tools: list[dict[str, Any]],
        add_generation_prompt: bool,
        variables: dict[str, Any],
    ) -> str:
        job = Job(
            list(messages), MAX_PROBE, add_generation_prompt=add_generation_prompt, variables=variables, tools=tools
        )
        return asyncio.run_coroutine_threadsafe(renderer.render(renderer.request(job)), loop).result()

    try:
        return await asyncio.to_thread(infer, render, source)
    except ChatTemplateError as error:  # a limit: the template is not tried any further
        return Inference(None, str(error), None, str(error), History())
