"""From a request's fields to the Constraint that the engine enforces. What can't be enforced is refused here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from octavo.runtime.constraint import GrammarError
from octavo.runtime.messages import Constraint
from octavo.server.dialects.constraint_fields import ConstraintFields
from octavo.server.errors import bad_request
from octavo.server.message.grammars import (
    JsonStyle,
    choice_grammar,
    json_grammar,
    regex_grammar,
    text_grammar,
)
from octavo.server.message.structural_tag import TokenIds, tag_grammar
from octavo.server.options import StructuredOutputsConfig

ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True, slots=True)
class _Wanted:
    """One constraint of a request: the field that asks for it, its kind, and its value."""

    field: str
    kind: str
    value: Any

    @property
    def param(self) -> str:
        """The request's own field."""
        return self.field.partition(".")[0]

    def grammar(self, style: JsonStyle, token_id: TokenIds) -> str:
        """Its grammar. Raises GrammarError."""
        if self.kind in ("json", "json_schema"):
            return json_grammar(_decoded(self.value), style)
        if self.kind == "json_object":
            return json_grammar(ANY_OBJECT, style)
        if self.kind == "structural_tag":
            return tag_grammar(_decoded(self.value), style, token_id)
        if self.kind == "choice":
            return choice_grammar(self.value)
        return regex_grammar(self.value) if self.kind == "regex" else text_grammar(self.value, style)


def constraint_of(
    request: ConstraintFields,
    config: StructuredOutputsConfig,
    token_id: TokenIds,
) -> Constraint | None:
    """The constraint that a request asks for, if it does. Raises ApiError.

    token_id gives the id of a token, by id or by text.
    """
    wanted = _wanted(request)
    _check_alone(request, wanted)
    if not wanted:
        return None
    only = wanted[0]
    try:
        grammar = only.grammar(_style(request, config), token_id)
    except GrammarError as error:
        raise bad_request(f"{only.field}: {error}", only.param) from None
    return Constraint(grammar)


def constraint_field(request: ConstraintFields) -> str:
    """The field that asks for a constraint, `structured_outputs.regex`; "" if none does."""
    return next((each.field for each in _wanted(request)), "")


def _wanted(request: ConstraintFields) -> list[_Wanted]:
    return [*_of_response_format(request), *_of_structured_outputs(request), *_of_older_fields(request)]


def _check_alone(request: ConstraintFields, wanted: list[_Wanted]) -> None:
    if len(wanted) > 1:
        names = " and ".join(each.field for each in wanted[:2])
        raise bad_request(f"{names}: an answer can have one constraint", wanted[1].param)
    if request.structured_outputs is not None and not any(each.param == "structured_outputs" for each in wanted):
        raise bad_request(
            "structured_outputs: needs exactly one of json, regex, choice, grammar, json_object and structural_tag",
            "structured_outputs",
        )


def _style(request: ConstraintFields, config: StructuredOutputsConfig) -> JsonStyle:
    """How JSON is written: as the request says, or else the server."""
    own = request.structured_outputs
    compact = own.disable_any_whitespace if own is not None else None
    closed = own.disable_additional_properties if own is not None else None
    pattern = (own.whitespace_pattern if own is not None else None) or request.guided_whitespace_pattern
    return JsonStyle(
        any_whitespace=not (config.disable_any_whitespace if compact is None else compact),
        pattern=pattern,
        closed=config.disable_additional_properties if closed is None else closed,
    )


def _of_response_format(request: ConstraintFields) -> Iterator[_Wanted]:
    format_ = request.response_format
    if format_ is None or format_.type == "text":
        return
    if format_.json_schema is not None:
        schema = format_.json_schema.schema_
        yield _Wanted("response_format.json_schema.schema", "json", ANY_OBJECT if schema is None else schema)
    elif format_.type == "json_object":
        yield _Wanted("response_format", "json_object", True)
    else:
        tag = {name: getattr(format_, name) for name in ("type", "format", "structures", "triggers")}
        yield _Wanted(
            "response_format", "structural_tag", {name: value for name, value in tag.items() if value is not None}
        )


def _of_structured_outputs(request: ConstraintFields) -> Iterator[_Wanted]:
    own = request.structured_outputs
    if own is not None:
        kinds = {"json": own.json_, "regex": own.regex, "choice": own.choice, "grammar": own.grammar}
        more = {"json_object": own.json_object, "structural_tag": own.structural_tag}
        yield from _given("structured_outputs.", {**kinds, **more})


def _of_older_fields(request: ConstraintFields) -> Iterator[_Wanted]:
    """vLLM's former names, and SGLang's."""
    kinds = {"json": request.guided_json, "regex": request.guided_regex, "choice": request.guided_choice}
    more = {"grammar": request.guided_grammar, "json_object": request.guided_json_object}
    yield from _given("guided_", {**kinds, **more})
    kinds = {"regex": request.regex, "ebnf": request.ebnf, "json_schema": request.json_schema}
    yield from _given("", {**kinds, "structural_tag": request.structural_tag})


def _given(prefix: str, kinds: dict[str, Any]) -> Iterator[_Wanted]:
    """The constraints among these values, by kind."""
    for kind, value in kinds.items():
        if value is not None and not (kind == "json_object" and value is False):
            yield _Wanted(prefix + kind, kind, value)


def _decoded(value: Any) -> Any:
    """A value that may have come as a string of JSON."""
    if not isinstance(value, str):
        return value
    try:
        return msgspec.json.decode(value)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise GrammarError(f"is no JSON: {error}") from None
