"""Each wire form of a constraint: what it accepts, and how it is refused."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest
from byte_grammar import ByteGrammar
from pydantic import ValidationError

from octavo.runtime.constraint import GrammarError
from octavo.runtime.messages import Constraint
from octavo.server.dialects.fields import GenerationRequest
from octavo.server.errors import ApiError
from octavo.server.message.constrain import constraint_of
from octavo.server.message.grammars import JsonStyle, regex_grammar, text_grammar
from octavo.server.options import StructuredOutputsConfig
from octavo.server.start.flags import configure, read_options

ITEM = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
LARK = 'start: "yes" | NUMBER\nNUMBER: /[0-9]+/'
EBNF = 'root ::= "yes" | number\nnumber ::= [0-9]+  # digits\n'
CONST = {"type": "const_string", "value": "x"}
CALL = {"type": "tag", "begin": "<f=a>", "content": {"type": "json_schema", "json_schema": ITEM}, "end": "</f>"}
SAY = {"type": "tag", "begin": "<f=b>", "content": {"type": "any_text"}, "end": ["</f>", "</g>"]}
CALLS = {"type": "triggered_tags", "triggers": ["<f="], "tags": [CALL, SAY]}


def byte_of(token: int | str) -> int | None:
    """The vocabulary of byte_grammar: a token is a byte."""
    if isinstance(token, str):
        return ord(token) if len(token) == 1 else None
    return token if 0 <= token < 256 else None


def constraint(config: StructuredOutputsConfig | None = None, **fields: Any) -> Constraint | None:
    request = GenerationRequest.model_validate(fields)
    return constraint_of(request, config or StructuredOutputsConfig(), byte_of)


def grammar(config: StructuredOutputsConfig | None = None, **fields: Any) -> ByteGrammar:
    found = constraint(config, **fields)
    assert found is not None
    return ByteGrammar(found.grammar)


def refusal(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        constraint(**fields)
    assert caught.value.status == 400
    return caught.value


def tag_format(format_: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "structural_tag", "format": format_}}


JSON_FORM = {"type": "json_schema", "json_schema": {"name": "item", "schema": ITEM, "strict": True}}
OLD_TAG = {
    "type": "structural_tag",
    "structures": [{"begin": "<f=a>", "schema": ITEM, "end": "</f>"}],
    "triggers": ["<f="],
}


@pytest.mark.parametrize(
    ("fields", "accepted", "refused"),
    [
        ({"response_format": {"type": "json_object"}}, '{"x": [1]}', "[1]"),
        ({"response_format": JSON_FORM}, '{"a": 1}', '{"a": "1"}'),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "any"}}}, '{"x": 1}', "1"),
        ({"response_format": OLD_TAG}, 'hm <f=a>{"a": 1}</f> so', "hm <f=a>1</f>"),
        (tag_format(CALL), '<f=a>{"a": 1}</f>', "<f=a>{}</f>"),
        ({"structured_outputs": {"json": ITEM}}, '{"a": 1}', "{}"),
        ({"structured_outputs": {"json": json.dumps(ITEM)}}, '{"a": 1}', "{}"),
        ({"structured_outputs": {"regex": r"\w+@x\.org\n?"}}, "me@x.org\n", "me@x.org  "),
        ({"structured_outputs": {"regex": "a|b$"}}, "a", "ab"),
        ({"structured_outputs": {"choice": ["a", "a/b", 'q"']}}, "a/b", "a/"),
        ({"structured_outputs": {"grammar": LARK}}, "123", "no"),
        ({"structured_outputs": {"grammar": EBNF}}, "123", "no"),
        ({"structured_outputs": {"grammar": 'start: "x" %json {"not": {"type": "string"}} "y"'}}, "x1y", 'x""y'),
        ({"structured_outputs": {"json_object": True}}, "{}", "[]"),
        ({"structured_outputs": {"structural_tag": json.dumps(OLD_TAG)}}, "hm", "<f=b>"),
        ({"structured_outputs": {"structural_tag": {"type": "structural_tag", "format": CONST}}}, "x", "y"),
        ({"structured_outputs": {"json": True}}, "[1]", "[1"),
        ({"guided_json": ITEM}, '{"a": 1}', "{}"),
        ({"guided_json": json.dumps(ITEM), "guided_decoding_backend": "xgrammar"}, '{"a": 1}', "{}"),
        ({"guided_regex": "[0-9]{2}"}, "12", "123"),
        ({"guided_choice": ["x", "y"]}, "y", "z"),
        ({"guided_grammar": EBNF}, "yes", "no"),
        ({"guided_json_object": True}, "{}", "1"),
        ({"guided_json": ITEM, "guided_whitespace_pattern": " ?"}, '{"a": 1}', '{"a":  1}'),
        ({"regex": "[0-9]+"}, "1", "x"),
        ({"ebnf": EBNF}, "yes", "no"),
        ({"json_schema": json.dumps(ITEM)}, '{"a": 1}', "{}"),
        ({"structural_tag": json.dumps(OLD_TAG)}, "hm", "<f=b>"),
    ],
    ids=str,
)
def test_each_field_constrains(fields: dict[str, Any], accepted: str, refused: str) -> None:
    made = grammar(**fields)
    assert made.accepts(accepted)
    assert not made.accepts(refused)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": None, "structured_outputs": None},
        {"response_format": {"type": "text"}},
        {"guided_decoding_backend": "outlines"},
        {"guided_json_object": False},
    ],
    ids=str,
)
def test_free_text(fields: dict[str, Any]) -> None:
    assert constraint(**fields) is None


STRING = {"type": "object", "properties": {"s": {"type": "string"}, "n": {"type": "integer"}}, "required": ["s"]}


def parameters(style: str) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": STRING, "style": style}


TOKEN_TAG = {
    "type": "tag",
    "begin": {"type": "token", "token": "@"},
    "content": {"type": "any_tokens"},
    "end": {"type": "token", "token": 33},
}


@pytest.mark.parametrize(
    ("format_", "accepted", "refused"),
    [
        ({"type": "const_string", "value": 'é"/\n'}, ['é"/\n'], ["é"]),
        ({"type": "json_schema", "json_schema": ITEM, "style": "json"}, ['{"a": 1}'], ["{}"]),
        ({"type": "regex", "pattern": "[0-9/]+"}, ["1/2"], [""]),
        ({"type": "grammar", "grammar": 'root ::= "a" | "(" root ")"'}, ["a", "((a))"], ["(a"]),
        ({"type": "grammar", "grammar": LARK}, ["yes"], ["no"]),
        ({"type": "any_text", "excludes": ["no"], "max_chars": 4}, ["", "yééé"], ["no", "abcde"]),
        ({"type": "sequence", "elements": [CONST, {"type": "any_text"}]}, ["x", "xyz"], ["y"]),
        ({"type": "sequence", "elements": [{"type": "any_text"}, CONST, CONST]}, ["xx", "abxx"], ["x", "abxxx"]),
        ({"type": "or", "elements": [CONST, SAY]}, ["x", "<f=b>y</g>"], ["<f=b>y"]),
        ({"type": "optional", "content": CONST}, ["", "x"], ["xx"]),
        ({"type": "plus", "content": CONST}, ["x", "xx"], [""]),
        ({"type": "star", "content": CONST}, ["", "xx"], ["y"]),
        ({"type": "repeat", "min": 2, "max": 3, "content": CONST}, ["xx", "xxx"], ["x", "xxxx"]),
        ({"type": "repeat", "min": 1, "max": -1, "content": CONST}, ["x", "xxxx"], [""]),
        (SAY, ["<f=b></f>", "<f=b>a<b</f>"], ["<f=b>a</f>b</f>", "<f=b>a"]),
        (CALLS, ["hm", 'a<f=a>{"a": 1}</f>b<f=b>c</g>'], ["<f=", "<f=c>", "<f=a>{}</f>"]),
        (CALLS | {"at_least_one": True}, ["<f=b>c</f> so"], ["", "hm <f=b>c</f>"]),
        (CALLS | {"stop_after_first": True}, ["hm", "hm <f=b>c</f>"], ["<f=b>c</f> so"]),
        (CALLS | {"at_least_one": True, "stop_after_first": True}, ["<f=b>c</f>"], ["", "<f=b>c</f> "]),
        (CALLS | {"excludes": ["no"]}, ["yes"], ["no", "no <f=b>c</f>"]),
        ({"type": "tag", "begin": "(", "content": CALLS, "end": ")"}, ["(hm)", "(<f=b>)</f>)"], ["(hm", "(a)b)"]),
        (
            {"type": "tags_with_separator", "tags": [CALL, SAY], "separator": ","},
            ["", "<f=b>c</f>", '<f=b>c</f>,<f=a>{"a": 1}</f>'],
            ["<f=b>c</f>,", "x"],
        ),
        (
            {"type": "tags_with_separator", "tags": [SAY], "separator": ",", "at_least_one": True},
            ["<f=b>c</f>"],
            [""],
        ),
        (
            {"type": "tags_with_separator", "tags": [SAY], "separator": ",", "stop_after_first": True},
            ["", "<f=b>c</f>"],
            ["<f=b>c</f>,<f=b>c</f>"],
        ),
        ({"type": "dispatch", "rules": [["@", CONST]], "excludes": ["!"]}, ["a @x b@x", ""], ["@y", "a!"]),
        ({"type": "dispatch", "rules": [["@", CONST]], "loop": False}, ["a @x", "a"], ["a @x b"]),
        ({"type": "token", "token": 65}, ["A"], ["B"]),
        ({"type": "exclude_token", "exclude_tokens": ["A"]}, ["B"], ["A"]),
        ({"type": "any_tokens", "exclude_tokens": ["A"], "max_tokens": 2}, ["", "BB"], ["A", "BBB"]),
        (TOKEN_TAG, ["@abc!", "@!"], ["@abc", "@a!b!"]),
        (
            {"type": "token_triggered_tags", "trigger_tokens": ["@"], "tags": [TOKEN_TAG | {"content": CONST}]},
            ["hm", "hm@x!so"],
            ["@y!", "@x"],
        ),
        ({"type": "token_dispatch", "rules": [[64, CONST]], "exclude_tokens": [33]}, ["a@xb@x"], ["@y", "!"]),
        ({"type": "qwen_xml_parameter", "json_schema": STRING}, ["<parameter=s>a\n</parameter>"], ["<parameter=s>"]),
        (
            parameters("qwen_xml"),
            ["<parameter=s>a<b\n</parameter>\n<parameter=n>\n1\n</parameter>"],
            ["<parameter=n>1</parameter>", "<parameter=s>a</parameter><parameter=n>x</parameter>"],
        ),
        (parameters("minimax_xml"), ['<parameter name="s">a</parameter>'], ["<parameter=s>a</parameter>"]),
        (
            parameters("deepseek_xml"),
            ['<｜DSML｜parameter name="s" string="true">a</｜DSML｜parameter>'],
            ['<｜DSML｜parameter name="s" string="false">a</｜DSML｜parameter>'],
        ),
        (parameters("glm_xml"), ["<arg_key>s</arg_key><arg_value>a</arg_value>"], ["<arg_key>s</arg_key>"]),
    ],
    ids=str,
)
def test_structural_tags(format_: dict[str, Any], accepted: list[str], refused: list[str]) -> None:
    made = grammar(**tag_format(format_))
    assert [text for text in accepted if not made.accepts(text)] == []
    assert [text for text in refused if made.accepts(text)] == []


@pytest.mark.parametrize(
    ("format_", "message"),
    [
        ({"type": "unknown"}, "response_format: format.type: must be one of const_string, json_schema"),
        ({"type": "const_string"}, "response_format: format.value: missing in const_string"),
        ({**CONST, "x": 1}, "response_format: format.x: no field of const_string"),
        (
            {"type": "json_schema", "json_schema": {"not": {"pattern": "a"}}},
            "response_format: format.json_schema: /not:",
        ),
        ({"type": "json_schema", "json_schema": ITEM, "style": "cohere_xml"}, "response_format: format.style: must be"),
        ({"type": "json_schema", "json_schema": ITEM, "any_order": True}, "response_format: format.any_order: prop"),
        (
            {"type": "json_schema", "json_schema": True, "style": "glm_xml"},
            "response_format: format.json_schema: glm_xml",
        ),
        ({"type": "star", "content": {"type": "any_text"}}, "response_format: format.content: can go on for ever"),
        (
            {"type": "sequence", "elements": [{"type": "any_text"}, CALL]},
            "response_format: format.elements.0: can go on",
        ),
        ({"type": "any_text", "max_tokens": 3}, "response_format: format.max_tokens: not supported; use max_chars"),
        ({"type": "token", "token": 256}, "response_format: format.token: '256' is no token of this model"),
        ({"type": "token", "token": "<|x|>"}, "response_format: format.token: '<|x|>' is no token of this model"),
        (CALLS | {"triggers": ["<g"]}, "response_format: format.tags.0.begin: exactly one trigger must be its"),
        ({"type": "grammar", "grammar": "start: <[5]>"}, "response_format: format.grammar: tokens can't be named"),
        ({"type": "regex", "pattern": "(?=a)"}, "response_format: in the regular expression '(?=a)'"),
        ({"type": "or", "elements": []}, "response_format: format.elements: must be a list of at least one"),
        ({"type": "repeat", "min": 3, "max": 2, "content": CONST}, "response_format: format.max: is below min"),
    ],
    ids=str,
)
def test_structural_tags_that_are_refused(format_: dict[str, Any], message: str) -> None:
    error = refusal(**tag_format(format_))
    assert error.message.startswith(message)
    assert error.param == "response_format"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        (
            {"response_format": JSON_FORM, "structured_outputs": {"regex": "a"}},
            "structured_outputs",
            "response_format.",
        ),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "structured_outputs.regex and"),
        ({"guided_json": ITEM, "regex": "a"}, "regex", "guided_json and regex: an answer can have one constraint"),
        ({"structured_outputs": {}}, "structured_outputs", "structured_outputs: needs exactly one of json"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs", "structured_outputs: needs exactly one"),
        (
            {"structured_outputs": {"disable_any_whitespace": True}, "regex": "a"},
            "structured_outputs",
            "structured_outputs: needs exactly one",
        ),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs", "structured_outputs.json: is no JSON"),
        ({"structured_outputs": {"regex": r"(a)\1"}}, "structured_outputs", "structured_outputs.regex: in the regular"),
        (
            {"structured_outputs": {"grammar": "root ::= x"}},
            "structured_outputs",
            "structured_outputs.grammar: it is no",
        ),
        ({"structured_outputs": {"grammar": "start: x"}}, "structured_outputs", "structured_outputs.grammar: "),
        (
            {"structured_outputs": {"grammar": "start: <|x|>"}},
            "structured_outputs",
            "structured_outputs.grammar: tokens",
        ),
        ({"guided_json": {"not": {"pattern": "a"}}}, "guided_json", "guided_json: /not: what excludes 'pattern'"),
        ({"ebnf": 'r ::= "a"\n' * 501}, "ebnf", "ebnf: it has 501 rules; 500 is the most"),
        ({"ebnf": 'start: "a"\n' + 'r: "a"\n' * 500}, "ebnf", "ebnf: it has 501 rules; 500 is the most"),
        ({"ebnf": "#" * 65537}, "ebnf", "ebnf: it has 65537 characters; 65536 is the most"),
        ({"regex": "a" * 65537}, "regex", "regex: the regular expression has 65537 characters"),
        ({"guided_choice": ["a" * 65536] * 5}, "guided_choice", "guided_choice: the choices have 327680 characters"),
        ({"guided_grammar": 'start: %json {"not": {"pattern": "a"}}'}, "guided_grammar", "guided_grammar: /not: what"),
        ({"guided_grammar": "start: %json x"}, "guided_grammar", "guided_grammar: behind %json stands no JSON"),
        ({"guided_grammar": "root ::= " + "(" * 5000}, "guided_grammar", "guided_grammar: it is nested too deeply"),
        (
            {"guided_json": ITEM, "guided_whitespace_pattern": "x*"},
            "guided_json",
            "guided_json: the schema: the whitespace pattern 'x*' is made of more",
        ),
        (
            {"response_format": JSON_FORM | {"json_schema": {"name": "x", "schema": {"type": "no"}}}},
            "response_format",
            "response_format.json_schema.schema: /type: must be one or several of",
        ),
        ({"response_format": {"type": "structural_tag"}}, "response_format", "response_format: needs either"),
        ({"structural_tag": "[]"}, "structural_tag", "structural_tag: must be an object"),
    ],
    ids=str,
)
def test_what_is_refused_is_named(fields: dict[str, Any], param: str, message: str) -> None:
    error = refusal(**fields)
    assert error.message.startswith(message)
    assert error.param == param


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "text", "json_schema": {"schema": ITEM}}},
        {"response_format": {"type": "json_object", "format": CONST}},
        {"structured_outputs": {"json": 1}},
        {"structured_outputs": {"choice": []}},
        {"structured_outputs": {"choice": [1]}},
        {"structured_outputs": {"lark": LARK}},
        {"structured_outputs": {"backend": "xgrammar"}},
        {"structured_outputs": "x"},
        {"guided_regex": ""},
        {"json_schema": []},
        {"ebnf": 1},
    ],
    ids=str,
)
def test_fields_of_other_types(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GenerationRequest.model_validate(fields)


OPEN = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize("where", ["request", "server"])
def test_how_json_is_written(where: str) -> None:
    options = {"disable_any_whitespace": True, "disable_additional_properties": True}
    asked: dict[str, Any] = {"json": OPEN} | (options if where == "request" else {})
    config = StructuredOutputsConfig(**(options if where == "server" else {}))
    made = grammar(config, structured_outputs=asked)
    assert [made.accepts(text) for text in ('{"a":1}', '{"a": 1}', '{"a":1,"b":1}')] == [True, False, False]
    plain = grammar(structured_outputs={"json": OPEN})
    assert plain.accepts('{"a": 1, "b": 1}')


def test_a_request_wins_over_the_server() -> None:
    made = grammar(
        StructuredOutputsConfig(disable_any_whitespace=True),
        structured_outputs={"json": OPEN, "disable_any_whitespace": False},
    )
    assert made.accepts('{"a": 1}')


def test_flags() -> None:
    import argparse

    parser = argparse.ArgumentParser(exit_on_error=False)
    configure(parser)
    text = '{"backend": "xgrammar", "disable_any_whitespace": true, "enable_in_reasoning": true}'
    found = read_options(parser.parse_args(["m", "--structured-outputs-config", text]))
    assert found.text.structured_outputs_config == StructuredOutputsConfig(
        backend="xgrammar", disable_any_whitespace=True, enable_in_reasoning=True
    )
    with pytest.raises(argparse.ArgumentError, match="no configuration of structured outputs"):
        parser.parse_args(["m", "--structured-outputs-config", '{"backend": "other"}'])


def test_a_schema_is_refused_before_it_is_queued(client: httpx.Client) -> None:
    schema = {"properties": {"a": {"not": {"pattern": "x"}}}}
    body = {"prompt": "The", "response_format": JSON_FORM | {"json_schema": {"name": "x", "schema": schema}}}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "response_format"
    assert error["message"].startswith("response_format.json_schema.schema: /properties/a/not: what excludes 'pattern'")


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_answers_look_as_they_must(client: httpx.Client, temperature: float) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
    }
    body = {"prompt": "The", "max_tokens": 60, "temperature": temperature, "seed": 3, "n": 4}
    fields = {"json": schema | {"additionalProperties": False}, "disable_any_whitespace": True}
    response = client.post("/v1/completions", json=body | {"structured_outputs": fields})
    assert response.status_code == 200, response.text
    for choice in response.json()["choices"]:
        answer = json.loads(choice["text"])
        assert answer["a"] in ("x", "y")
        assert isinstance(answer["b"], bool)
        assert choice["finish_reason"] == "stop"
    response = client.post("/v1/completions", json=body | {"guided_regex": "[0-9]{3}-[a-c]+z"})
    for choice in response.json()["choices"]:
        assert choice["finish_reason"] == "length" or re.fullmatch("[0-9]{3}-[a-c]+z", choice["text"])


@pytest.mark.parametrize(
    ("pattern", "is_fine"),
    [
        ("((a{1,1000}){1,1000}){1,1000}", False),
        ("x(?:[a-z]{1,100}){1,100}", False),
        ("(a{1,300}|b){300}", False),
        ("([a-z]{1,1000} ){1,1000}", True),
        ("(a{1,1000}){1,10}", True),
        (r"(\d{1,3}){1,1000}", True),
        ("a{1,100000}", True),
        ("(a*){1,1000}", True),
        ("(a{1,50}){1,50}", True),
        (r"[({]{1,90}(\({1,90}){1,9}", True),
    ],
)
def test_repetitions_of_repetitions_have_a_limit(pattern: str, is_fine: bool) -> None:
    if is_fine:
        regex_grammar(pattern)
    else:
        with pytest.raises(GrammarError, match=r"repetitions of up to \d+ times \d+"):
            regex_grammar(pattern)


@pytest.mark.parametrize(
    ("grammar", "rule"),
    [
        ('root ::= "a" root', "root"),
        ('root ::= ("a" | "b") root', "root"),
        ('root ::= x\nx ::= "a" y\ny ::= x "b"', "x"),
        ('root ::= "a" x | "b"\nx ::= "c" x', "x"),
        ('start: "a" start', "start"),
        ('start: list\nlist: "a" ("," list) // no end\n', "list"),
        ('root ::= "a" root | "b"', ""),
        ('root ::= "a" root?', ""),
        ('root ::= "(" root* ")"', ""),
        ('start: "a" [start]', ""),
        ('start: /a+/ (start){0,2} | B\nB: "b"', ""),
        ('start: "a" %json {"type": "object"}', ""),
    ],
)
def test_rules_that_never_end_are_refused(grammar: str, rule: str) -> None:
    if not rule:
        text_grammar(grammar, JsonStyle())
    else:
        with pytest.raises(GrammarError, match=f"the rule '{rule}' never ends"):
            text_grammar(grammar, JsonStyle())


@pytest.mark.parametrize("text", ["(" * 30_000 + '"a"' + ")" * 30_000, "[" * 30_000 + '"a"' + "]" * 30_000])
def test_a_grammar_that_is_nested_too_deeply_is_refused(text: str) -> None:
    with pytest.raises(GrammarError):
        text_grammar(f"start: {text}", JsonStyle())


def test_brackets_that_are_not_closed_are_refused_at_once() -> None:
    with pytest.raises(GrammarError, match=r"a \[ isn't closed"):
        regex_grammar("[" * 60_000)
