"""How a model's reasoning is switched, limited and shown: the fields of requests, and what they mean for this model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from octavo.runtime.messages import Reasoning
from octavo.server.dialects.fields import Count, Flag, Strict
from octavo.server.errors import bad_request, field_error
from octavo.server.message.parse import Formats
from octavo.server.message.parts import Part, append_parts
from octavo.server.message.thoughts import reasoning_of
from octavo.server.served_model import ServedModel

EFFORTS = {"minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
"""The levels that templates know, which are three, by the name that a request has for one."""


class NoReasoning(Strict):
    """Fields about reasoning where answers have none: gateways add them to every request."""

    separate_reasoning: Literal[True] | None = None
    stream_reasoning: Literal[True] | None = None
    include_reasoning: Literal[True] | None = None


class ThinkingOptions(Strict):
    """The fields of a conversation's request that are about what the model thinks before it answers."""

    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    thinking_token_budget: Annotated[Count, Field(lt=2**31)] | None = None  # vLLM's
    max_thinking_tokens: Annotated[Count, Field(lt=2**31)] | None = None  # SGLang's
    include_reasoning: Flag | None = None
    separate_reasoning: Flag | None = None
    stream_reasoning: Flag | None = None

    @model_validator(mode="after")
    def _check_budget(self) -> ThinkingOptions:
        if self.thinking_token_budget is not None and self.max_thinking_tokens is not None:
            raise field_error("max_thinking_tokens", "max_thinking_tokens: the same as thinking_token_budget; name one")
        return self

    @property
    def budget(self) -> int | None:
        """The most tokens that the reasoning may have."""
        return self.max_thinking_tokens if self.thinking_token_budget is None else self.thinking_token_budget


def effort_variables(options: ThinkingOptions, model: ServedModel) -> dict[str, Any]:
    """The template's variables for how much the model should think. Raises ApiError where it has none for this.

    A model that knows no reasoning takes any effort. One whose thinking is only on or off is on at every level.
    """
    effort = options.reasoning_effort
    if effort is None or not can_think(model):
        return {}
    if effort == "none":
        return switched(model, "reasoning_effort", wants=False)
    reasoning = model.formats.found.reasoning
    if takes_effort(model):
        return {"reasoning_effort": EFFORTS[effort]}
    if reasoning is None or reasoning.switch is None:
        raise bad_request(
            f"reasoning_effort: {effort!r} can't be asked of this model: its chat template has no variable for it",
            "reasoning_effort",
        )
    return {reasoning.switch: True}


def can_think(model: ServedModel) -> bool:
    """Whether the model has a way to write what it thinks."""
    return model.formats.found.reasoning is not None or _has_channels(model)


def _has_channels(model: ServedModel) -> bool:
    tools = model.formats.found.tools
    return tools is not None and tools.kind == "channel"


def reasoning_tokens(model: ServedModel, formats: Formats, budget: int | None, *, is_open: bool) -> Reasoning | None:
    """What the model thinks before it answers, as the engine follows it."""
    return reasoning_of(formats, model.tokenizer, is_open=is_open, budget=budget, last_words=model.reasoning_end_str)


class ShownReasoning:
    """What of the reasoning one answer shows, step by step: all, none, or all at once when it is over."""

    def __init__(self, options: ThinkingOptions) -> None:
        self._is_hidden = options.include_reasoning is False
        self._waits = options.stream_reasoning is False
        self._held: list[Part] = []

    def shown(self, parts: list[Part], *, is_last: bool) -> list[Part]:
        """The parts that may be sent now."""
        if self._is_hidden:
            return [part for part in parts if part.kind != "reasoning"]
        if not self._waits:
            return parts
        append_parts(self._held, parts)
        if not is_last and all(part.kind == "reasoning" for part in self._held):
            return []
        now = self._held
        self._held = []
        return now


def thinking_fields(model: ServedModel, field: str, *, wants: bool) -> dict[str, Any]:
    """The fields of a conversation's request by which the model thinks, or doesn't. Raises ApiError, blaming `field`.

    Where its template has no switch, thinking ends before its first token.
    """
    reasoning = model.formats.found.reasoning
    has_no_switch = _has_channels(model) or (reasoning is not None and not reasoning.can_disable)
    if not wants and has_no_switch:
        return {"thinking_token_budget": 0}
    variables = switched(model, field, wants=wants)
    return {"chat_template_kwargs": variables} if variables else {}


def switched(model: ServedModel, field: str, *, wants: bool) -> dict[str, Any]:
    """The template's variables for a model that should think, or should not. Raises ApiError, which blames `field`."""
    reasoning = model.formats.found.reasoning
    if not wants and _has_channels(model):
        raise bad_request(f"{field}: this model's thinking can't be switched off", field.partition(".")[0])
    if reasoning is None:
        return {}
    if not wants and not reasoning.can_disable:
        raise bad_request(f"{field}: this model's thinking can't be switched off", field.partition(".")[0])
    if reasoning.switch in ("enable_thinking", "thinking"):
        return {reasoning.switch: wants}
    return {"reasoning_effort": "none"} if not wants and reasoning.switch is not None else {}


def takes_effort(model: ServedModel) -> bool:
    """Whether the template has a variable for how much the model thinks."""
    reasoning = model.formats.found.reasoning
    return _has_channels(model) or (reasoning is not None and reasoning.switch == "reasoning_effort")
