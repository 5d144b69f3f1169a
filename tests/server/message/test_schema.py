"""JSON Schemas: no instance that isn't valid gets through, and what is refused is named. The truth: published suites,
whose schemas come with valid and invalid instances, and the package `jsonschema`."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from byte_grammar import ByteGrammar, names_in_order
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.runtime.constraint import GrammarError
from octavo.server.message.grammars import JsonStyle, json_grammar
from octavo.server.message.patterns import DATE, PatternError, rust_pattern
from octavo.server.message.schema import MAX_NESTING, normalized
from octavo.server.message.schema_places import SchemaError

SCHEMAS = Path(__file__).parents[2] / "fixtures" / "schemas"
STYLE = JsonStyle()


def cases(name: str) -> list[dict[str, Any]]:
    with gzip.open(SCHEMAS / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def verdicts(case: dict[str, Any]) -> Iterator[tuple[bool, bool, Any]]:
    """Of each instance: whether it is valid, whether it is accepted, and itself."""
    grammar = ByteGrammar(json_grammar(case["schema"], STYLE))
    names = names_in_order(case["schema"])
    for test in case["tests"]:
        yield test["valid"], grammar.accepts_json(test["data"], names), test["data"]


def grammar_of(schema: Any) -> ByteGrammar:
    return ByteGrammar(json_grammar(schema, STYLE))


@pytest.mark.parametrize(
    ("suite", "most_refused", "least_accepted"), [("maskbench", 0.06, 0.97), ("json-schema-test-suite", 0.28, 0.9)]
)
def test_no_invalid_instance_is_accepted(suite: str, most_refused: float, least_accepted: float) -> None:
    """Of the test suite more may be refused: each of its files is about one keyword, common or not."""
    refused = []
    num_valid = 0
    num_accepted = 0
    rows = cases(suite)
    for case in rows:
        try:
            for valid, accepted, data in verdicts(case):
                assert valid or not accepted, (case["name"], data)
                num_valid += valid
                num_accepted += accepted
        except GrammarError as error:
            refused.append(str(error))
    assert [message for message in refused if not message.startswith(("/", "the schema: "))] == []
    assert len(refused) <= most_refused * len(rows), refused
    assert num_accepted >= least_accepted * num_valid


EXACT = [  # schemas that have to be rewritten, with what is valid and what isn't, by jsonschema
    {"oneOf": [{"type": "string"}, {"type": "integer"}]},
    {"oneOf": [{"required": ["a"]}, {"required": ["b"]}], "type": "object", "properties": {"a": {}, "b": {}}},
    {"oneOf": [{"type": "integer", "minimum": 3}, {"type": "integer", "maximum": 5}]},
    {"oneOf": [{"enum": ["x", "y"]}, {"enum": ["y", 1]}]},
    {"not": {"required": ["a"]}},
    {"not": {"enum": ["x", 1, None, True]}},
    {"not": {"const": "a"}, "type": "string"},
    {"not": {"type": ["string", "object"]}},
    {"not": {"anyOf": [{"type": "string"}, {"minimum": 3}]}},
    {"not": {"properties": {"a": {"const": 1}}, "required": ["a"]}},
    {"if": {"properties": {"a": {"const": 1}}, "required": ["a"]}, "then": {"required": ["b"]}, "type": "object"},
    {"if": {"type": "integer"}, "then": {"minimum": 3}, "else": {"type": "string"}},
    {"type": "object", "dependentRequired": {"a": ["b"]}, "properties": {"a": {}, "b": {}}},
    {"type": "object", "dependentSchemas": {"a": {"properties": {"b": {"type": "integer"}}}}},
    {"$schema": "http://json-schema.org/draft-07/schema#", "type": "object", "dependencies": {"a": ["b"]}},
    {"type": "array", "items": {"enum": ["x", "y", 1]}, "uniqueItems": True},
    {"type": "array", "items": {"type": "boolean"}, "uniqueItems": True, "minItems": 1},
    {"type": "array", "contains": {"const": 1}, "maxItems": 3},
    {"type": "object", "propertyNames": {"pattern": "^[ab]$"}, "properties": {"a": {}, "c": {}}},
    {"type": "object", "properties": {"a": {}, "b": {}}, "minProperties": 1},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "unevaluatedProperties": False},
    {"$ref": "#/$defs/a~1b%25", "$defs": {"a/b%": {"type": "integer"}}},
    {"$id": "https://example.com/x", "$ref": "y", "$defs": {"y": {"$id": "y", "type": "null"}}},
    {"$ref": "#here", "$defs": {"here": {"$anchor": "here", "type": "null"}}},
    {"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"a": {"type": "integer"}},
     "properties": {"a": {"$ref": "#/definitions/a", "maximum": 0}}},
    {"$schema": "http://json-schema.org/draft-04/schema#", "type": "integer", "minimum": 1, "exclusiveMinimum": True},
]  # fmt: skip
VALUES = [
    None, True, False, 0, 1, 2, 3, 4, 5, 6, -1, 1.5, "", "a", "x", "y", "xx", "aé", [], [1], ["x"], ["x", "y"],
    ["x", "x"], [True, False], [True, True], [0, 1], [0, 0, 1], [0, 0, 0, 1], [1, "y", "x"], {}, {"a": 1}, {"a": 2},
    {"b": 1}, {"b": "x"}, {"c": 1}, {"a": 1, "b": 1}, {"a": 1, "b": "x"}, {"a": 2, "b": 2}, {"b": 1, "c": 1},
    {"a": "x"}, {"a": 1, "c": 1},
]  # fmt: skip


@pytest.mark.parametrize("schema", EXACT, ids=str)
def test_a_rewriting_is_equal(schema: dict[str, Any]) -> None:
    """Valid values are accepted as well, but for the order of names and, where it isn't written, "1.0" for 1."""
    grammar = grammar_of(schema)
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    validator = kind(schema)
    found = [grammar.accepts_json(value, names_in_order(schema)) for value in VALUES]
    assert found == [validator.is_valid(value) for value in VALUES]
    assert any(found)


def random_schema(draw: st.DrawFn) -> Any:
    scalar = st.sampled_from(
        [
            {"type": "integer", "minimum": -3, "maximum": 12},
            {"type": "number", "exclusiveMinimum": 0, "multipleOf": 0.5},
            {"type": "string", "maxLength": 4},
            {"type": "string", "pattern": r"^[a-c\s]+\.[^a-c]$"},
            {"type": "string", "format": "date"},
            {"type": "string", "format": "uuid"},
            {"enum": ["x", 'q"', 1, None]},
            {"const": {"a": [1, "b"]}},
            {"type": ["boolean", "null"]},
            {"type": "string", "not": {"enum": ["", "a", "ab"]}, "maxLength": 3},
        ]
    )
    names = st.sampled_from(["a", "b", "kind", 'quo"te'])

    def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        objects = st.fixed_dictionaries(
            {
                "type": st.just("object"),
                "properties": st.dictionaries(names, inner, max_size=3),
                "required": st.lists(names, unique=True, max_size=2),
                "additionalProperties": st.just(False) | st.just({"type": "integer"}),
            },
            optional={"dependentRequired": st.just({"a": ["b"]})},
        )
        arrays = st.fixed_dictionaries(
            {"type": st.just("array"), "items": inner, "minItems": st.integers(0, 2), "maxItems": st.integers(2, 3)}
        )
        unions = st.lists(inner, min_size=1, max_size=3)
        return objects | arrays | st.builds(lambda x: {"anyOf": x}, unions) | st.builds(lambda x: {"oneOf": x}, unions)

    return draw(st.recursive(scalar, nested, max_leaves=6))


@settings(max_examples=150, deadline=None)
@given(schema=st.composite(random_schema)(), seed=st.integers(0, 2**32))
def test_what_the_mask_allows_is_valid(schema: Any, seed: int) -> None:
    try:
        grammar = grammar_of(schema)
    except GrammarError:
        return
    text = grammar.walk(seed)
    if text is not None:
        checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
        jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(text))


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"properties": {"a/b": {"not": {"pattern": "x"}}}}, "/properties/a~1b/not: what excludes 'pattern'"),
        ({"items": {"oneOf": [{"type": "string"}, {"pattern": "a"}]}}, "/items/oneOf: values may be valid for both"),
        ({"type": "strin"}, "/type: must be one or several of null, boolean"),
        ({"enum": []}, "/enum: must be a list of at least one value"),
        ({"anyOf": []}, "/anyOf: must be a list of at least one schema"),
        ({"minLength": -1}, "/minLength: must be a whole number"),
        ({"maximum": "3"}, "/maximum: must be a number"),
        ({"const": 2**53 + 1}, "/const: 9007199254740993 is a number beyond 2**53"),
        ({"pattern": "(?=a)"}, "/pattern: in the regular expression '(?=a)' '(?=a'"),
        ({"pattern": "(a"}, "/pattern: regex parse error"),
        ({"$ref": "https://example.com/x"}, "/$ref: 'https://example.com/x' is not in this schema, and nothing is"),
        ({"$ref": "#/$defs/x"}, "/$ref: nothing stands at '#/$defs/x'"),
        ({"properties": {"a": 1}}, "/properties/a: a schema must be an object, true or false"),
        ({"required": True}, "/required: must be a list of names"),
        ({"type": "array", "uniqueItems": True}, "/uniqueItems: can be enforced only for arrays of an enum"),
        ({"contains": {"const": 1}}, "/contains: can be enforced only beside a maxItems"),
        ({"allOf": [{}], "unevaluatedProperties": False}, "/unevaluatedProperties: can't be enforced beside allOf"),
        ({"$dynamicRef": "#a"}, "/$dynamicRef: can't be enforced"),
        ({"patternProperties": {"a": {}, "b": {}}}, "/patternProperties: patternProperty regexes /a/ and /b/"),
        ({"items": {"properties": {"a": {}, "b": {}, "c": {}}, "minProperties": 2}}, "/items/minProperties: min/max"),
        ({"x-guidance": {"item_separator": ";"}}, "/x-guidance: 'item_separator' can't be set"),
        ({"x-guidance": {"whitespace_pattern": "a*"}}, "the schema: the whitespace pattern 'a*' is made of more"),
        (False, "the schema: no value is valid for it"),
        ({"format": "regex"}, "/format: 'regex' can't be enforced"),
        ([], "the schema: a schema must be an object"),
        ({"$ref": "#"}, "/$ref: it refers to itself"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "/$defs/a/$ref: it"),
    ],
    ids=str,
)
def test_a_refusal_names_keyword_and_place(schema: Any, message: str) -> None:
    with pytest.raises(GrammarError) as caught:
        json_grammar(schema, STYLE)
    assert str(caught.value).startswith(message)


def test_limits_are_counts() -> None:
    deep: Any = {}
    for _ in range(MAX_NESTING):
        deep = {"items": deep}
    with pytest.raises(GrammarError, match="more than 64 levels deep"):
        json_grammar(deep, STYLE)
    with pytest.raises(GrammarError, match="bytes; 1048576 is the most"):
        json_grammar({"description": "x" * (1 << 20)}, STYLE)
    chain = {str(number): {"not": {"$ref": f"#/$defs/{number + 1}"}} for number in range(300)}
    with pytest.raises(GrammarError):
        json_grammar({"$ref": "#/$defs/0", "$defs": {**chain, "300": {"type": "null"}}}, STYLE)


def chain(length: int) -> dict[str, Any]:
    """References one behind another."""
    links = {str(number): {"properties": {"x": {"$ref": f"#/$defs/{number + 1}"}}} for number in range(length)}
    return {"$ref": "#/$defs/0", "$defs": {**links, str(length): {}}}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (chain(1000), "the schema: it goes 300 levels deep through its references"),
        ({"properties": {str(name): {} for name in range(2001)}}, "/properties: an object lists 2001 properties"),
        ({"type": "string", "allOf": [{"pattern": str(n)} for n in range(9)]}, "/pattern: 9 patterns and formats hold"),
        (
            {
                "$ref": "#/$defs/0",
                "$defs": {"0": {"allOf": [{"$ref": "#/$defs/1"}] * 3}, "1": {"allOf": [{"pattern": "a"}] * 3}},
            },
            "/pattern: 9 patterns",
        ),
        (
            {"oneOf": [{"type": "object", "required": [str(name)]} for name in range(300)]},
            "the schema: schema too large",
        ),
    ],
    ids=["chain", "properties", "patterns", "patterns through references", "branches"],
)
def test_what_would_end_or_hold_up_the_server_is_refused(schema: Any, message: str) -> None:
    """A chain of 1,000 references overflows llguidance's stack, and 200 patterns keep it busy for minutes."""
    with pytest.raises(GrammarError) as caught:
        json_grammar(schema, STYLE)
    assert str(caught.value).startswith(message)


def test_a_chain_of_a_hundred_references_is_taken() -> None:
    assert grammar_of(chain(100)).accepts('{"x": {"x": {"x": {}}}}')


def test_lenient_leaves_out_what_can_not_be_enforced() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "not": {"pattern": "x"}}}, "required": ["a"]}
    grammar = grammar_of({**schema, "x-guidance": {"lenient": True}})
    assert grammar.accepts('{"a": "x"}')
    assert not grammar.accepts('{"a": 1}')


def test_whitespace_and_closed_objects() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    compact = ByteGrammar(json_grammar(schema, JsonStyle(any_whitespace=False, closed=True)))
    assert [compact.accepts(text) for text in ('{"a":1}', '{"a": 1}', '{"b":1}')] == [True, False, False]
    patterned = ByteGrammar(json_grammar(schema, JsonStyle(pattern=r"\s{0,2}")))
    assert [patterned.accepts(text) for text in ('{"a":  1}', '{"a":   1}', '{"b":1}')] == [True, False, True]


def test_dates_know_leap_years() -> None:
    grammar = grammar_of({"type": "string", "format": "date"})
    leap = [year for year in range(1, 2500) if grammar.accepts(f'"{year:04}-02-29"')]
    assert leap == [year for year in range(1, 2500) if year % 4 == 0 and (year % 100 or year % 400 == 0)]
    assert DATE in normalized({"format": "date"})["pattern"]  # type: ignore[index, call-overload]


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        (r"^[a&&b]$", "&", "c"),
        (r"^[[a]$", "[", "x"),
        (r"^[+--]$", ",", "."),
        (r"^\<x\>$", "<x>", "x"),
        (r"^.$", "é", "\r"),
        (r"^a{,2}$", "a{,2}", "aa"),
        (r"^{x}$", "{x}", "x"),
        (r"^[^]$", "\n", ""),
        (r"^\cA\x41A\u{41}$", "\x01AAA", "AAA"),
        (r"^\ud83d\ude00$", "😀", "x"),
        (r"^a+?b*?$", "aab", "b"),
        (r"^\d\w$", "1a", "١a"),
        (r"^\s$", "\u00a0", "\x85"),
        (r"^\S$", "a", "\ufeff"),
        (r"^[^\s]$", "a", "\ufeff"),
        (r"^[^\S]$", "\t", "\ufeff"),
        (r"^[\S]$", "a", " "),
        (r"^(?<n>a)|b$", "ax", "xbx"),
        ("^a\n/$", "a\n/", "a"),
        (r"b", "abc", "ac"),
    ],
)
def test_regular_expressions_are_ecma_s(pattern: str, yes: str, no: str) -> None:
    grammar = grammar_of({"type": "string", "pattern": pattern})
    assert grammar.accepts(json.dumps(yes, ensure_ascii=False))
    assert not grammar.accepts(json.dumps(no, ensure_ascii=False))


@pytest.mark.parametrize("pattern", [r"(a)\1", r"\bx", "(?!a)", r"\Z", "[", "[]", "a\\", r"\ud800", r"\p", r"(?s)a"])
def test_regular_expressions_that_have_no_equal(pattern: str) -> None:
    with pytest.raises(PatternError):
        rust_pattern(pattern)


def damaged(value: Any, choose: random.Random, depth: int = 0) -> Any:
    """A schema with some of its values replaced."""
    junk: list[Any] = [
        None, True, 0, -1, 1.5, 2**70, 1e308, "", "#", "#/", "(", "a" * 50, [], {}, [{}], {"": {}}, {"$ref": "#"},
        {"$ref": 1}, {"$id": "http://["}, {"$id": "#x"}, {"type": 3}, {"not": {"$ref": "#"}}, {"oneOf": [{}, {}]},
        {"enum": [{}]}, {"pattern": "["}, {"maxLength": 10**9, "minLength": 10**6}, {"minItems": 10**6},
    ]  # fmt: skip
    if choose.random() < 0.12 or depth > 8:
        return choose.choice(junk)
    if isinstance(value, dict):
        keys = ["type", "items", "not", "oneOf", "if", "then", "$ref", "dependencies", "propertyNames", "contains"]
        out = {(choose.choice(keys) if choose.random() < 0.1 else key): part for key, part in value.items()}
        return {key: damaged(part, choose, depth + 1) for key, part in out.items()}
    return [damaged(part, choose, depth + 1) for part in value] if isinstance(value, list) else value


@pytest.mark.parametrize("seed", range(4))
def test_malformed_schemas_are_only_refused(seed: int) -> None:
    choose = random.Random(seed)
    rows = [case["schema"] for case in cases("json-schema-test-suite")]
    num_refused = 0
    for _ in range(250):
        schema = damaged(choose.choice(rows), choose)
        try:
            json_grammar(schema, STYLE)
        except GrammarError:
            num_refused += 1
    assert num_refused > 50


def test_a_reference_to_itself_has_no_opposite() -> None:
    with pytest.raises(SchemaError, match="/not: what excludes"):
        normalized({"not": {"$ref": "#"}})
