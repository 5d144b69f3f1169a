"""How answers are sampled, by vLLM's names: what programs give to `octavo.LLM` and `octavo.AsyncLLM`.

Defaults and bounds are vLLM's too. What octavo can't do is refused by name, when the value is made and when it is used:
fields may be set in between. What only the model can decide (token ids, lengths) is checked by the server's own code.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from enum import Enum
from math import isfinite
from typing import Any

import msgspec

logger = logging.getLogger(__name__)

GREEDY_BELOW = 1e-5  # of temperature
LEAST_TEMPERATURE = 1e-2  # that is drawn with
KINDS_OF_CONSTRAINT = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
NOT_AVAILABLE: dict[str, tuple[tuple[object, ...], str]] = {  # fields, the values that ask for nothing, what works
    "flat_logprobs": ((False,), "logprobs are a list of dictionaries"),
    "prompt_logprob_token_ids": ((None,), "prompt_logprobs and logprob_token_ids are there"),
    "prompt_logprob_start": ((None,), "prompt_logprobs begins with the first token"),
    "extra_args": ((None, {}), "no code of others is called while sampling"),
    "skip_reading_prefix_cache": ((None, False), "enable_prefix_caching=False of LLM does without the cache"),
    "watermarking": ((None, False), "answers are not watermarked"),
    "routed_experts_prompt_start": ((0,), "which experts a token went to is not told"),
    "trace_decode_token_ids": ((None,), "prompt_logprobs gives the log-probabilities of given tokens"),
}


@dataclass
class StructuredOutputsParams:
    """What an answer must look like: exactly one kind of constraint. json: a schema, or one as a string."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    structural_tag: str | None = None

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS_OF_CONSTRAINT if getattr(self, kind) is not None]
        if len(given) != 1:
            found = ", ".join(given) or "none"
            kinds = ", ".join(KINDS_OF_CONSTRAINT)
            raise ValueError(f"StructuredOutputsParams: exactly one of {kinds} is to be set, not {found}")

    def given(self) -> dict[str, Any]:
        """The fields that say something."""
        return {name: value for name, value in asdict(self).items() if value not in (None, False)}


@dataclass
class RepetitionDetectionParams:
    """End an answer when its last tokens are a pattern that has come min_count times; max_pattern_size 0: never."""

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.min_pattern_size <= self.max_pattern_size:
            raise ValueError(
                f"repetition_detection: min_pattern_size {self.min_pattern_size} is not from 0 to max_pattern_size, "
                f"{self.max_pattern_size}"
            )
        if self.max_pattern_size > 0 and self.min_count < 2:
            raise ValueError(f"repetition_detection: min_count {self.min_count} is not 2 or more")


class RequestOutputKind(Enum):
    """What each output of a stream has: all so far, what is new, or only the last one comes, with all."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


class SamplingParams(msgspec.Struct, kw_only=True):
    """How the answers to a prompt are sampled.

    temperature 0 is greedy. top_k 0 or -1, top_p 1 and min_p 0 are off. max_tokens None: what the context leaves, which
    is the most in any case. logprobs: beside the sampled token's so many of the likeliest; -1: all. An answer ends at
    one of `stop`, which isn't part of its text unless include_stop_str_in_output, at one of stop_token_ids, or at the
    model's own end tokens, unless ignore_eos. n answers with a seed are drawn with seed, seed + 1 and so on.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    stream_interval: int | None = None
    structured_outputs: StructuredOutputsParams | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    repetition_detection: RepetitionDetectionParams | None = None
    truncate_prompt_tokens: int | None = None
    # octavo has none of these
    flat_logprobs: bool = False
    prompt_logprob_token_ids: list[list[int]] | None = None
    prompt_logprob_start: int | None = None
    thinking_token_budget: int | None = None
    extra_args: dict[str, Any] | None = None
    skip_reading_prefix_cache: bool | None = None
    watermarking: bool | None = None
    routed_experts_prompt_start: int = 0
    trace_decode_token_ids: list[int] | None = None

    def __post_init__(self) -> None:
        if 0 < self.temperature < LEAST_TEMPERATURE and self.temperature >= GREEDY_BELOW:
            logger.warning("temperature %s is taken as %s, the least above 0", self.temperature, LEAST_TEMPERATURE)
            self.temperature = LEAST_TEMPERATURE
        if self.seed == -1:
            self.seed = None
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        self.stop = self.stop or []
        self.stop_token_ids = list(dict.fromkeys(self.stop_token_ids or ()))
        self.bad_words = list(dict.fromkeys(self.bad_words or ()))
        if self.logprobs is True:
            self.logprobs = 1
        if self.prompt_logprobs is True:
            self.prompt_logprobs = 1
        self.check()

    @classmethod
    def from_optional(cls, **fields: Any) -> SamplingParams:
        """The same, where None stands for a field's default, and logit_bias may have keys that are strings."""
        bias = fields.get("logit_bias")
        if bias is not None:
            fields["logit_bias"] = {int(token): min(100.0, max(-100.0, value)) for token, value in bias.items()}
        meaning_of_none = {"max_tokens"}
        return cls(**{name: value for name, value in fields.items() if value is not None or name in meaning_of_none})

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken always."""
        return self.temperature < GREEDY_BELOW

    def clone(self) -> SamplingParams:
        """A copy of its own."""
        return msgspec.structs.replace(self)

    def check(self) -> None:
        """Raise ValueError for the first field that octavo can't honor, or that is out of its bounds."""
        for name, (neutral, instead) in NOT_AVAILABLE.items():
            if getattr(self, name) not in neutral:
                raise ValueError(f"SamplingParams.{name}: octavo does not have it; {instead}")
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"SamplingParams.{name} is {value!r}; it must be a number")
            if not (isfinite(value) and low <= value <= high):
                most = f" to {high:g}" if isfinite(high) else " up"
                raise ValueError(f"SamplingParams.{name} is {value}; it must be from {low:g}{most}")
        self._check_together()

    def _check_together(self) -> None:
        if self.top_p == 0:
            raise ValueError("SamplingParams.top_p is 0; it must be above 0, and 1 is off")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"SamplingParams.min_tokens {self.min_tokens} is more than max_tokens, {self.max_tokens}")
        if self.is_greedy and self.n > 1:
            raise ValueError(
                f"SamplingParams.n is {self.n} with temperature 0: all answers would be the same; n=1 works"
            )
        if not all(self.stop or ()):
            raise ValueError("SamplingParams.stop has an empty string")
        if self.stop and not self.detokenize:
            raise ValueError("SamplingParams.stop needs detokenize=True: it is looked for in the text")
        if not all(self.bad_words or ()):
            raise ValueError("SamplingParams.bad_words has an empty string")


BOUNDS: dict[str, tuple[float, float]] = {
    "n": (1, float("inf")),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (1e-6, 10),
    "temperature": (0, 2),
    "top_p": (0, 1),
    "top_k": (-1, float("inf")),
    "min_p": (0, 1),
    "max_tokens": (1, float("inf")),
    "min_tokens": (0, float("inf")),
    "logprobs": (-1, float("inf")),
    "prompt_logprobs": (-1, float("inf")),
    "stream_interval": (1, float("inf")),
    "thinking_token_budget": (-1, 2**31 - 1),
}
"""The least and the most of each number."""


class BeamSearchParams(msgspec.Struct):
    """How the likeliest answers to a prompt are searched for. temperature changes nothing."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputsParams | None = None
    skip_special_tokens: bool = True
    watermarking: bool | None = None

    def __post_init__(self) -> None:
        for name in ("beam_width", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"BeamSearchParams.{name} is {getattr(self, name)}; it must be 1 at least")
        if self.structured_outputs is not None:
            raise ValueError("BeamSearchParams.structured_outputs: octavo does not have it; LLM.generate does")
        if self.watermarking:
            raise ValueError("BeamSearchParams.watermarking: octavo does not have it; answers are not watermarked")
