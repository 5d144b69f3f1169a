"""How an answer is read, and what the engine is told of it: constraint, calls and reasoning of a request together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from octavo.runtime.constraint import GrammarError
from octavo.runtime.messages import Constraint, Reasoning
from octavo.server.dialects.fields import GenerationRequest
from octavo.server.errors import bad_request
from octavo.server.message.call_constraint import WantedCalls, grammar_of_calls
from octavo.server.message.call_grammar import Thinks
from octavo.server.message.constrain import constraint_of
from octavo.server.message.format import Strictness
from octavo.server.message.parse import Formats
from octavo.server.message.thoughts import with_reasoning
from octavo.server.served_model import ServedModel


@dataclass(frozen=True, slots=True)
class Reading:
    """How an answer is read where it may be more than text: see message/parse.py's Machine.

    only_one: what follows the first call is left out. calls: what the answer may call, or must. reasoning: what the
    model thinks first, as tokens; a constraint holds behind it. budget: the most tokens of it, if they are limited.
    reasoning_is_closed: the prompt has ended it. goes_on: the client has begun the answer. trims: whitespace in front
    of the content is none of it, as the model may have written it in front of its reasoning, and then thought nothing.
    """

    formats: Formats
    reasoning_is_open: bool = False
    reasoning_is_closed: bool = False
    call_is_open: bool = False
    goes_on: bool = False
    tools: Mapping[str, Any] = field(default_factory=dict)
    num_before: int = 0
    only_one: bool = False
    strictness: Strictness = "loose"
    calls: WantedCalls | None = None
    reasoning: Reasoning | None = None
    budget: int | None = None
    trims: bool = False


def constrained(
    request: GenerationRequest, model: ServedModel, reading: Reading | None
) -> tuple[Constraint | None, Reading | None]:
    """What the answer must look like, and how it is read then. Raises ApiError."""
    constraint = constraint_of(request, model.structured_outputs, model.token_id)
    if reading is None:
        return constraint, None
    reasoning = reading.reasoning
    thinks: Thinks = "freely" if reading.budget is None else "once" if reading.budget else "never"
    if constraint is not None and model.structured_outputs.enable_in_reasoning:
        if reading.budget is not None:
            raise bad_request(
                "thinking_token_budget: this server's constraints hold from the first token on, with no reasoning "
                "before them (enable_in_reasoning); leave out one of both",
                "thinking_token_budget",
            )
        reasoning = None
        thinks = "never"
    has_channels = reading.formats.has_channels
    is_told_by_grammar = has_channels and (constraint is not None or reading.budget is not None)
    calls = reading.calls or WantedCalls((), level="auto")
    if calls.are_constrained or is_told_by_grammar or (calls.tools and constraint is not None):
        return _with_calls(constraint, dataclasses.replace(reading, calls=calls, reasoning=reasoning), thinks)
    if reasoning is not None and reasoning.budget is None and (constraint is None or reading.reasoning_is_closed):
        reasoning = None
    if constraint is None:
        return None if reasoning is None else Constraint(reasoning=reasoning), reading
    trims = reasoning is not None and bool(reasoning.begin)
    return with_reasoning(Constraint(constraint.grammar, reasoning)), dataclasses.replace(reading, trims=trims)


def _with_calls(constraint: Constraint | None, reading: Reading, thinks: Thinks) -> tuple[Constraint, Reading]:
    """The same for an answer that may call, or whose format's grammar is that of its calls."""
    calls = reading.calls
    assert calls is not None
    try:
        found = grammar_of_calls(calls, reading.formats, constraint, thinks)
    except GrammarError as error:
        raise bad_request(str(error), "tools" if calls.tools else None) from None
    strictness: Strictness = "exact" if constraint is None or calls.mode == "required" else "marked"
    whole = Constraint(found.text, reading.reasoning, found.triggers)
    if not reading.formats.has_channels:
        whole = with_reasoning(whole)
    trims = found.triggers is None and reading.reasoning is not None and bool(reading.reasoning.begin)
    return whole, dataclasses.replace(reading, tools=found.schemas, strictness=strictness, trims=trims)
