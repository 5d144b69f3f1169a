"""POST /parse_function_call and /separate_reasoning: SGLang's routes, which read a text as an answer would be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, BeforeValidator, Field

from octavo.server.dialects.conversation import bounded_json
from octavo.server.dialects.fields import Strict, Text
from octavo.server.dialects.tools import MAX_TOOLS, AnyTool, as_functions
from octavo.server.encoding import JsonResponse, encode_json
from octavo.server.errors import RESPONSES, bad_request
from octavo.server.message.parse import Formats, Machine
from octavo.server.message.parts import Part, calls_of, reasoning_of, text_of
from octavo.server.message.presets import CHANNEL_NAMES, REASONING_PRESETS, TOOL_PRESETS
from octavo.server.service import Service
from octavo.server.strict_json import StrictRoute

Format = TypeVar("Format")


class ParseRequest(Strict):
    """POST /parse_function_call. tool_call_parser: a format's name; without one, the model's own is taken."""

    text: Text
    tools: (
        Annotated[list[AnyTool], Field(max_length=MAX_TOOLS, fail_fast=True), BeforeValidator(bounded_json)] | None
    ) = None
    tool_call_parser: Text | None = None


class ReasoningRequest(Strict):
    """POST /separate_reasoning. reasoning_parser: a format's name; without one, the model's own is taken."""

    text: Text
    reasoning_parser: Text | None = None


class ParsedCall(BaseModel):
    """One call. tool_index: how many calls stand before it. parameters: JSON as it was written."""

    tool_index: int
    name: str
    parameters: str


class ParseResponse(BaseModel):
    """SGLang's shape."""

    normal_text: str
    calls: list[ParsedCall]


class ReasoningResponse(BaseModel):
    """SGLang's shape."""

    reasoning_text: str
    text: str


def routes(service: Service) -> APIRouter:
    """/parse_function_call and /separate_reasoning."""
    router = APIRouter(route_class=StrictRoute, responses=RESPONSES)
    found = service.model.formats.found

    @router.post("/parse_function_call", response_model=ParseResponse)
    async def parse_function_call(body: ParseRequest, http: Request) -> Response:
        """The tool calls in a text."""
        form = _named("tool_call_parser", body.tool_call_parser, TOOL_PRESETS, found.tools)
        schemas = {tool.function.name: tool.function.parameters or {} for tool in as_functions(body.tools or ())}
        machine = Machine(Formats(form, None), tools=schemas)
        parts = await service.off_loop(http, lambda: _read(machine, body.text))
        calls = [
            ParsedCall(tool_index=index, name=call.name, parameters=call.arguments)
            for index, call in enumerate(calls_of(parts))
        ]
        return _sent(ParseResponse(normal_text=text_of(parts), calls=calls))

    @router.post("/separate_reasoning", response_model=ReasoningResponse)
    async def separate_reasoning(body: ReasoningRequest, http: Request) -> Response:
        """The reasoning at a text's beginning, and the rest."""
        name = body.reasoning_parser
        if name in CHANNEL_NAMES or (name is None and service.model.formats.without_tools.has_channels):
            machine = Machine(Formats(TOOL_PRESETS["openai"], None))
        else:
            form = _named("reasoning_parser", name, REASONING_PRESETS, found.reasoning)
            has_end = form.end in body.text  # and no beginning, where the prompt has begun it
            is_open = (has_end or form.is_implied) and not body.text.lstrip().startswith(form.begin)
            machine = Machine(Formats(None, form), reasoning_is_open=is_open)
        parts = await service.off_loop(http, lambda: _read(machine, body.text))
        return _sent(ReasoningResponse(reasoning_text=reasoning_of(parts), text=text_of(parts)))

    return router


def _sent(body: BaseModel) -> Response:
    return JsonResponse(encode_json(body.model_dump()))


def _named(field: str, name: str | None, presets: Mapping[str, Format], own: Format | None) -> Format:
    form = own if name is None else presets.get(name)
    if form is None:
        known = ", ".join(presets)
        said = "this model's own is not known" if name is None else f"{name[:80]!r} is not known"
        raise bad_request(f"{field}: {said}; {known} are", field)
    return form


def _read(machine: Machine, text: str) -> list[Part]:
    machine.feed(text)
    machine.finish()
    return machine.take()
