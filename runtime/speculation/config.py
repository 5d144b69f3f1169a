"""What --speculative-config may say: vLLM's keys."""

# No `from __future__ import annotations`: the engine's configuration holds this struct, see runtime/config.py.

from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from octavo.flags import parse_json_object

Method = Literal["ngram", "suffix", "auto", "draft_model", "eagle3", "mtp"]
METHODS: tuple[str, ...] = get_args(Method)
HEADS = ("eagle3", "mtp")
OF_MODELS = ("draft_model", *HEADS)
"""Methods that ask a model, or a head on one, and look nothing up."""
NAMES = {"draft_model": "a draft model", "eagle3": "an EAGLE-3 head", "mtp": "an MTP head"}
OLDER_NAMES = {"mimo_mtp": "mtp"}  # vLLM's

Share = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=0, le=64)]


class SpeculativeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How drafts are made. auto is suffix, beside the tokens that a grammar forces, which are taken in any case.

    num_speculative_tokens: the most drafts of a sequence that a step checks; how many it does is decided by what they
    cost and bring (costs.py). num_speculative_tokens_per_batch_size: less than that, by the number of sequences in a
    step: the first and the last number, and the most drafts of each. prompt_lookup_min, prompt_lookup_max: of ngram,
    tokens that must have stood before, and beyond which a match is no better than another one.
    suffix_decoding_max_tree_depth: the latter of suffix. suffix_decoding_max_cached_requests: finished answers that are
    kept for others' drafts, 0 for none. suffix_decoding_max_spec_factor: how many drafts a token of the match is good
    for. suffix_decoding_min_token_prob: how likely a draft must be by what has followed so far. model, revision: of
    draft_model, a directory or a Hub id, with the tokenizer of the model that is served; of eagle3, a head's that was
    trained for it; of mtp the same, or none where the model's own checkpoint has one.
    """

    method: Method
    num_speculative_tokens: Annotated[int, Meta(ge=1, le=64)] = 7
    num_speculative_tokens_per_batch_size: tuple[tuple[Count, Count, Count], ...] = ()
    prompt_lookup_min: Annotated[int, Meta(ge=1, le=16)] = 1
    prompt_lookup_max: Annotated[int, Meta(ge=1, le=1024)] = 32
    suffix_decoding_max_tree_depth: Annotated[int, Meta(ge=1, le=1024)] = 24
    suffix_decoding_max_cached_requests: Annotated[int, Meta(ge=0)] = 10_000
    suffix_decoding_max_spec_factor: Annotated[float, Meta(gt=0)] = 4.0
    suffix_decoding_min_token_prob: Share = 0.3
    model: str = ""
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.prompt_lookup_max < self.prompt_lookup_min:
            raise ValueError(
                f"prompt_lookup_max {self.prompt_lookup_max} is less than prompt_lookup_min {self.prompt_lookup_min}"
            )
        if self.method in ("draft_model", "eagle3") and not self.model:
            raise ValueError(f"method {self.method!r} without a model: model names its directory or Hub id")
        first = 1
        for row in self.num_speculative_tokens_per_batch_size:
            if row[0] != first or row[1] < first:
                raise ValueError(
                    f"num_speculative_tokens_per_batch_size {list(row)}: its first number is {first}, as the rows go "
                    "on from 1 without a gap, and its second one no less"
                )
            first = row[1] + 1

    def check(self, num_ranks: int, *, offloads: bool = False) -> None:
        """Raise ValueError where an engine can't do it that has so many ranks, or keeps its cache in a file."""
        if self.method in OF_MODELS and num_ranks > 1:
            raise ValueError(
                f"--speculative-config with -tp, -pp ({num_ranks} ranks): {NAMES[self.method]} is not divided over "
                "ranks; one rank works, and so does the method ngram"
            )
        if self.method in HEADS and offloads:
            raise ValueError(
                f"--speculative-config with --kv-offloading-path: what {NAMES[self.method]} has read of a prefix is "
                "not in the file; leave one of them out, or take the method ngram, suffix or draft_model"
            )

    def most_of(self, num_sequences: int) -> int:
        """The most drafts of each sequence in a step of so many."""
        for _, last, count in self.num_speculative_tokens_per_batch_size:
            if num_sequences <= last:
                return min(count, self.num_speculative_tokens)
        return self.num_speculative_tokens


SUFFIX_KEYS = ("suffix_decoding_",)
MODEL_KEYS = ("model", "rev")
OF_METHOD: dict[str, tuple[str, ...]] = {"ngram": ("prompt_lookup_",), "suffix": SUFFIX_KEYS, "auto": SUFFIX_KEYS}
OF_METHOD |= dict.fromkeys(OF_MODELS, MODEL_KEYS)
"""How the keys begin that one method has, and not all of them."""


def parse_speculative(text: str) -> SpeculativeConfig:
    """Out of JSON. Raises ValueError, with what would work."""
    return make_speculative(parse_json_object(text))


def make_speculative(given: dict[str, Any]) -> SpeculativeConfig:
    """Out of keys and values. Raises ValueError, with what would work."""
    given = {key: value for key, value in given.items() if value is not None}
    if given.get("model") in METHODS or given.get("model") == "[ngram]":  # vLLM's older way to name a method
        given.setdefault("method", given.pop("model").strip("[]"))
    if "model" in given:
        given.setdefault("method", "draft_model")
        if given.get("draft_tensor_parallel_size") == 1:
            del given["draft_tensor_parallel_size"]
    method = given.get("method")
    if method in OLDER_NAMES:
        method = given["method"] = OLDER_NAMES[method]
    if method not in METHODS:
        what = "no method is named" if method is None else f"method {method!r}"
        raise ValueError(f"{what}: drafts are made by {', '.join(METHODS)}; leave it out, or name one of these")
    keys = [name for name in SpeculativeConfig.__struct_fields__ if _is_of(method, name)]
    for key in given:
        if key not in keys:
            raise ValueError(f"{key!r} is no key of method {method!r}; {', '.join(keys)} are")
    try:
        return msgspec.convert(given, SpeculativeConfig)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$.")
        key = path.rstrip("`").partition("[")[0]
        raise ValueError(f"{key} {given[key]!r}: {what}" if key in given else what) from None


def _is_of(method: str, key: str) -> bool:
    others = {begin for begins in OF_METHOD.values() for begin in begins} - set(OF_METHOD[method])
    return not key.startswith(tuple(others))
