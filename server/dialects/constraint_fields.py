"""The fields by which a request says what its answer must look like: OpenAI's, vLLM's new and old ones, and SGLang's.

What they mean together is decided in server/message/constrain.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

MAX_CHOICES = 1024
MAX_GRAMMAR = 1 << 20  # characters of a regular expression, or of a grammar


def _schema(value: object) -> object:
    if value is not None and not isinstance(value, dict | bool | str):
        raise ValueError("must be a JSON Schema: an object, true or false, or one of these as a string")
    return value


def _tag(value: object) -> object:
    if value is not None and not isinstance(value, dict | str):
        raise ValueError("must be a structural tag: an object, or one as a string")
    return value


Schema = Annotated[Any, AfterValidator(_schema)]
Tag = Annotated[Any, AfterValidator(_tag)]
Grammar = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=MAX_GRAMMAR)]
Choices = Annotated[
    list[Annotated[str, StringConstraints(strict=True, max_length=1 << 16)]],
    Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True),
]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, StringConstraints(strict=True)]


def _few(fields: Any) -> Any:
    if isinstance(fields, dict) and len(fields) > MAX_CHOICES:
        raise ValueError(f"an object of {len(fields)} entries")
    return fields


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True, protected_namespaces=())

    _bounded = model_validator(mode="before")(_few)


class NamedSchema(_Fields):
    """response_format's json_schema. strict is taken at any value: a schema is always enforced exactly."""

    name: Text | None = None
    description: Text | None = None
    schema_: Schema = Field(default=None, alias="schema")
    strict: Flag | None = None


class ResponseFormat(_Fields):
    """OpenAI's response_format, and xgrammar's structural tags in both forms."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: NamedSchema | None = None
    format: Annotated[dict[str, Any], BeforeValidator(_few)] | None = None
    structures: Annotated[list[Any], Field(max_length=MAX_CHOICES)] | None = None
    triggers: Annotated[list[Any], Field(max_length=MAX_CHOICES)] | None = None

    @model_validator(mode="after")
    def _check_type(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('json_schema goes with type "json_schema", and must be there')
        if self.type != "structural_tag" and (self.format, self.structures, self.triggers) != (None, None, None):
            raise ValueError('format, structures and triggers go with type "structural_tag"')
        return self


class StructuredOutputs(_Fields):
    """vLLM's structured_outputs: exactly one kind of constraint, and how JSON is written."""

    json_: Schema = Field(default=None, alias="json")
    regex: Grammar | None = None
    choice: Choices | None = None
    grammar: Grammar | None = None
    json_object: Flag | None = None
    structural_tag: Tag = None
    disable_any_whitespace: Flag | None = None
    disable_additional_properties: Flag | None = None
    whitespace_pattern: Text | None = None


class ConstraintFields(BaseModel):
    """All of them, for the requests of every dialect that generates text."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    # vLLM's names before 0.12
    guided_json: Schema = None
    guided_regex: Grammar | None = None
    guided_choice: Choices | None = None
    guided_grammar: Grammar | None = None
    guided_json_object: Flag | None = None
    guided_whitespace_pattern: Text | None = None
    guided_decoding_backend: Text | None = None  # there is one, which enforces all of them
    structural_tag: Tag = None
    # SGLang's
    regex: Grammar | None = None
    ebnf: Grammar | None = None
    json_schema: Schema = None

    @property
    def work_of_a_byte(self) -> int:
        """How much more a byte of the request costs than one of plain text: a schema is rewritten and compiled."""
        given = self.model_fields_set & set(ConstraintFields.model_fields)
        return 16 if any(getattr(self, name) is not None for name in given) else 1
