"""What the requests of all dialects have in common: types of fields, and the fields that say how to sample.

A field is either honoured, or accepted at the one value that asks for nothing (`tools: null`, `best_of: 1`), or refused
by name: extra fields are forbidden. What only the model can decide (token ids in the vocabulary, the length that
fits) is checked in server/prompts.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cache
from types import NoneType
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    model_validator,
)

from octavo.server.dialects.constraint_fields import ConstraintFields
from octavo.server.errors import field_error
from octavo.server.hints import Hint, OpenAIHints

MAX_CHOICES = 128
MAX_LOGPROB_TOKENS = 128
MAX_TOKENS_SENT = 1 << 22  # to the engine for one request, each answer's prompt counted; they take 200 MB there
MAX_ENTRIES = 1024  # of an object: pydantic makes an error for each wrong one, and these must not fill the memory
ALL_LOGPROBS = -1  # vLLM's: those of the whole vocabulary
INT64 = 2**63


def named_twice(names: Iterable[str]) -> str | None:
    """The first of these names that stands there more than once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _whole(value: object) -> object:
    """JSON Schema's integer: 4.0 is one. Many clients know no other numbers than these."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Text = Annotated[str, StringConstraints(strict=True)]
Integer = Annotated[int, BeforeValidator(_whole), Field(strict=True)]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]  # of long lists, each of which a Python call would slow
Count = Annotated[Integer, Field(ge=0, lt=2**31)]
LogprobCount = Annotated[Integer, Field(ge=ALL_LOGPROBS, lt=2**31)]
RequestName = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=256)]
StopString = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=1024)]
StopStrings = Annotated[list[StopString], Field(max_length=32, fail_fast=True)]
Flag = Annotated[bool, Field(strict=True)]


def _number(value: object) -> object:
    """JSON's true is no number, nor is a string of digits; pydantic alone would take both."""
    if isinstance(value, (bool, str)):
        raise ValueError("must be a number")
    return value


def bounded_entries(value: Any) -> Any:
    """Refuse an object of too many entries: pydantic would make an error for each wrong one."""
    if isinstance(value, dict) and len(value) > MAX_ENTRIES:
        raise ValueError(f"an object of {len(value)} entries; {MAX_ENTRIES} is the most")
    return value


def text_or_list(value: object) -> str:
    return "<list>" if isinstance(value, list) else "<text>"


Number = Annotated[float, BeforeValidator(_number, json_schema_input_type=float), Field(allow_inf_nan=False)]
TextOption = Annotated[Text, Tag("<text>")]
LogitBias = Annotated[dict[str, Annotated[Number, Field(ge=-100, le=100)]], BeforeValidator(bounded_entries)]


@cache
def _absent_if_null(kind: type[BaseModel]) -> frozenset[str]:
    """The fields of a request that have a default and no meaning for null."""
    fields = kind.model_fields.items()
    return frozenset(
        name
        for name, field in fields
        if not field.is_required() and field.default is not None and NoneType not in get_args(field.annotation)
    )


class RequestObject(BaseModel):
    """An object of a request: it has a bounded number of entries, and an optional field that is null is absent."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        bounded_entries(fields)
        if not isinstance(fields, dict) or None not in fields.values():
            return fields
        absent = _absent_if_null(cls)
        return {name: value for name, value in fields.items() if value is not None or name not in absent}


class Strict(RequestObject):
    """Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


class Open(RequestObject):
    """A part of a conversation's history: clients send back what other servers put in it, so extra keys are taken."""

    model_config = ConfigDict(extra="allow")


class StreamOptions(Strict):
    """include_usage: a last chunk with the token counts; continuous_usage_stats: in every chunk too (vLLM's).

    include_obfuscation is about padding that hides how long tokens are; nothing is padded here.
    """

    include_usage: Flag | None = None
    continuous_usage_stats: Flag | None = None
    include_obfuscation: Hint = None


class RepetitionRule(Strict):
    """vLLM's: an answer ends when its last tokens are a pattern that has come min_count times in a row."""

    max_pattern_size: Annotated[Integer, Field(ge=0, le=1024)] = 0
    min_pattern_size: Annotated[Integer, Field(ge=0, le=1024)] = 0
    min_count: Annotated[Integer, Field(ge=0, lt=2**31)] = 0

    @model_validator(mode="after")
    def _check_sizes(self) -> RepetitionRule:
        if self.min_pattern_size > self.max_pattern_size:
            raise ValueError("min_pattern_size is above max_pattern_size")
        if self.max_pattern_size > 0 and self.min_count < 2:
            raise ValueError("min_count must be 2 or more; max_pattern_size 0 looks for nothing")
        return self


class NoOps(Strict):
    """Fields of OpenAI's and vLLM's that are accepted only at the values that ask for nothing."""

    # gateways (sglang-router, vllm-router) add these to every request
    no_stop_trim: Literal[False] | None = None
    return_hidden_states: Literal[False] | None = None
    return_routed_experts: Literal[False] | None = None
    lora_path: None = None
    session_params: None = None
    custom_logit_processor: None = None


class GenerationRequest(OpenAIHints, ConstraintFields, NoOps):
    """What completions and chat completions have in common."""

    model: Text | None = None
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[Integer, Field(ge=1, le=MAX_CHOICES)] | None = None
    best_of: Annotated[Integer, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[Integer, Field(ge=-INT64, lt=INT64)] | None = None
    stop: (
        Annotated[
            Annotated[StopString, Tag("<text>")] | Annotated[StopStrings, Tag("<list>")], Discriminator(text_or_list)
        ]
        | None
    ) = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: LogitBias | None = None
    # vLLM's own
    top_k: Annotated[Integer, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=1e-6, le=10)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256, fail_fast=True)] | None = None
    include_stop_str_in_output: Flag = False
    ignore_eos: Flag = False
    min_tokens: Count = 0
    skip_special_tokens: Flag = True
    truncate_prompt_tokens: Annotated[Integer, Field(ge=-1, lt=2**31)] | None = None
    prompt_logprobs: LogprobCount | None = None
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=2**18, fail_fast=True)] | None = None
    return_token_ids: Flag | None = None
    cache_salt: Annotated[str, StringConstraints(strict=True, min_length=1, max_length=1024)] | None = None
    priority: Annotated[Integer, Field(ge=-(2**31), lt=2**31)] | None = None
    request_id: RequestName | None = None
    bad_words: Annotated[list[StopString], Field(max_length=1000, fail_fast=True)] | None = None
    use_beam_search: Flag | None = None
    length_penalty: Annotated[Number, Field(ge=-100, le=100)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    logprob_token_ids: Annotated[list[TokenId], Field(max_length=MAX_LOGPROB_TOKENS, fail_fast=True)] | None = None
    return_tokens_as_token_ids: Flag | None = None
    return_prompt_text: Flag | None = None
    repetition_detection: RepetitionRule | None = None
    stream_interval: Annotated[Integer, Field(ge=1, lt=2**31)] | None = None
    spaces_between_special_tokens: Flag | None = None  # a text is its tokens' bytes: there are none to leave out
    # SGLang's
    rid: RequestName | None = None
    stop_regex: (
        Annotated[
            Annotated[StopString, Tag("<text>")] | Annotated[StopStrings, Tag("<list>")], Discriminator(text_or_list)
        ]
        | None
    ) = None

    @property
    def num_choices(self) -> int:
        """How many answers to each prompt are computed."""
        return self.n or 1

    @property
    def user_name(self) -> str:
        """Whose request it is, as far as --fair-by user goes by it."""
        return self.user[:256] if isinstance(self.user, str) else ""

    @property
    def stop_patterns(self) -> list[str]:
        """The regular expressions that end an answer."""
        return [self.stop_regex] if isinstance(self.stop_regex, str) else self.stop_regex or []

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @model_validator(mode="after")
    def _check_combinations(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise field_error("stream_options", "stream_options is for stream: true only")
        if self.best_of is not None and self.best_of != self.num_choices:
            raise field_error(
                "best_of",
                f"best_of {self.best_of} is not available with n {self.n or 1}: completions take "
                "more than n, and chat n itself",
            )
        if self.length_penalty not in (None, 1) and not self.use_beam_search:
            raise field_error("length_penalty", "length_penalty is for use_beam_search: true only")
        if self.truncate_prompt_tokens == 0:
            raise field_error(
                "truncate_prompt_tokens", "truncate_prompt_tokens must be positive, or -1 for what the context holds"
            )
        return self
