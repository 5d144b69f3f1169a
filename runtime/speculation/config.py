"""What --speculative-config may say: vLLM's keys, of the methods that need no second model."""

# No `from __future__ import annotations`: the engine's configuration holds this struct, see runtime/config.py.

from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

Method = Literal["ngram", "suffix", "auto"]
METHODS: tuple[str, ...] = get_args(Method)

Share = Annotated[float, Meta(ge=0, le=1)]


class SpeculativeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How drafts are made. auto is suffix, beside the tokens that a grammar forces, which are taken in any case.

    num_speculative_tokens: the most drafts of a sequence that a step checks; how many it does is decided by what they
    cost and bring (cost.py). prompt_lookup_min, prompt_lookup_max: of ngram, tokens that must have stood before, and
    beyond which a match is no better than another one. suffix_decoding_max_tree_depth: the latter of suffix.
    suffix_decoding_max_cached_requests: finished answers that are kept for others' drafts, 0 for none.
    suffix_decoding_max_spec_factor: how many drafts a token of the match is good for. suffix_decoding_min_token_prob:
    how likely a draft must be by what has followed so far.
    """

    method: Method
    num_speculative_tokens: Annotated[int, Meta(ge=1, le=64)] = 7
    prompt_lookup_min: Annotated[int, Meta(ge=1, le=16)] = 1
    prompt_lookup_max: Annotated[int, Meta(ge=1, le=1024)] = 32
    suffix_decoding_max_tree_depth: Annotated[int, Meta(ge=1, le=1024)] = 24
    suffix_decoding_max_cached_requests: Annotated[int, Meta(ge=0)] = 10_000
    suffix_decoding_max_spec_factor: Annotated[float, Meta(gt=0)] = 4.0
    suffix_decoding_min_token_prob: Share = 0.3

    def __post_init__(self) -> None:
        if self.prompt_lookup_max < self.prompt_lookup_min:
            raise ValueError(
                f"prompt_lookup_max {self.prompt_lookup_max} is less than prompt_lookup_min {self.prompt_lookup_min}"
            )


OF_METHOD = {"ngram": "prompt_lookup_", "suffix": "suffix_decoding_", "auto": "suffix_decoding_"}


def parse_speculative(text: str) -> SpeculativeConfig:
    """Out of JSON. Raises ValueError, with what would work."""
    try:
        given = msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ValueError(f"{text} is no JSON object: {error}") from None
    return make_speculative(given)


def make_speculative(given: dict[str, Any]) -> SpeculativeConfig:
    """Out of keys and values. Raises ValueError, with what would work."""
    given = {key: value for key, value in given.items() if value is not None}
    if given.get("model") in METHODS or given.get("model") == "[ngram]":  # vLLM's older way to name a method
        given.setdefault("method", given.pop("model").strip("[]"))
    method = given.get("method")
    if method not in METHODS:
        what = "no method is named" if method is None else f"method {method!r}"
        raise ValueError(
            f"{what}: drafts are made by {', '.join(METHODS)}; draft models and heads are not supported: leave it out"
        )
    keys = [name for name in SpeculativeConfig.__struct_fields__ if _is_of(method, name)]
    for key in given:
        if key not in keys:
            raise ValueError(f"{key!r} is no key of method {method!r}; {', '.join(keys)} are")
    try:
        return msgspec.convert(given, SpeculativeConfig)
    except (msgspec.ValidationError, TypeError) as error:
        raise ValueError(f"{error}") from None


def _is_of(method: str, key: str) -> bool:
    others = set(OF_METHOD.values()) - {OF_METHOD[method]}
    return not key.startswith(tuple(others))
