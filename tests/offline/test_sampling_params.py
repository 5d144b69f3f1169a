"""SamplingParams and its like: vLLM's defaults and bounds, and what octavo does not have, by name."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest

from octavo import BeamSearchParams, RequestOutputKind, SamplingParams, StructuredOutputsParams
from octavo.sampling_params import NOT_AVAILABLE, RepetitionDetectionParams

VLLM_DEFAULTS = {  # of vLLM 0.32
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "stop": [],
    "stop_token_ids": [],
    "ignore_eos": False,
    "max_tokens": 16,
    "min_tokens": 0,
    "logprobs": None,
    "prompt_logprobs": None,
    "logprob_token_ids": None,
    "detokenize": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    "output_kind": RequestOutputKind.CUMULATIVE,
    "stream_interval": None,
    "structured_outputs": None,
    "logit_bias": None,
    "allowed_token_ids": None,
    "extra_args": None,
    "bad_words": [],
    "repetition_detection": None,
    "flat_logprobs": False,
}


def test_defaults_are_vllms() -> None:
    params = SamplingParams()
    assert {name: getattr(params, name) for name in VLLM_DEFAULTS} == VLLM_DEFAULTS
    assert BeamSearchParams(3, 5) == BeamSearchParams(
        beam_width=3, max_tokens=5, ignore_eos=False, temperature=0.0, length_penalty=1.0
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"n": 0}, "n is 0; it must be from 1 up"),
        ({"presence_penalty": 2.1}, "presence_penalty is 2.1; it must be from -2 to 2"),
        ({"frequency_penalty": -3}, "frequency_penalty is -3; it must be from -2 to 2"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"temperature": -0.1}, "temperature is -0.1; it must be from 0 to 2"),
        ({"temperature": 2.5}, "temperature is 2.5; it must be from 0 to 2"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0; it must be above 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": -2}, "top_k is -2"),
        ({"top_k": "5"}, "top_k is '5'; it must be a number"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be from 1 up"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"min_tokens": 17}, "min_tokens 17 is more than max_tokens, 16"),
        ({"logprobs": -2}, "logprobs is -2"),
        ({"prompt_logprobs": -2}, "prompt_logprobs is -2"),
        ({"stream_interval": 0}, "stream_interval is 0"),
        ({"thinking_token_budget": -2}, "thinking_token_budget is -2; it must be from -1 to"),
        ({"temperature": 0, "n": 2}, "n is 2 with temperature 0"),
        ({"stop": [""]}, "stop has an empty string"),
        ({"stop": "a", "detokenize": False}, "stop needs detokenize=True"),
        ({"bad_words": [""]}, "bad_words has an empty string"),
    ],
)
def test_bounds_are_vllms(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"SamplingParams.{said}")):
        SamplingParams(**fields)
    params = SamplingParams()
    for name, value in fields.items():
        setattr(params, name, value)
    with pytest.raises(ValueError, match=re.escape(f"SamplingParams.{said}")):
        params.check()


ASKING: dict[str, object] = {
    "flat_logprobs": True,
    "prompt_logprob_token_ids": [[1]],
    "prompt_logprob_start": 3,
    "extra_args": {"a": 1},
    "skip_reading_prefix_cache": True,
    "watermarking": True,
    "routed_experts_prompt_start": 4,
    "trace_decode_token_ids": [1, 2],
}


def test_what_octavo_does_not_have_is_refused_by_name() -> None:
    assert ASKING.keys() == NOT_AVAILABLE.keys()
    for name, value in ASKING.items():
        with pytest.raises(ValueError, match=rf"SamplingParams\.{name}: octavo does not have it; \w+"):
            SamplingParams(**{name: value})
        for neutral in NOT_AVAILABLE[name][0]:
            SamplingParams(**{name: neutral})
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)  # type: ignore[call-arg]


def test_values_mean_what_vllm_has_them_mean(caplog: pytest.LogCaptureFixture) -> None:
    assert SamplingParams(stop="a").stop == ["a"]
    assert SamplingParams(seed=-1).seed is None
    assert SamplingParams(logprobs=True).logprobs == 1
    assert SamplingParams(stop_token_ids=[3, 2, 3]).stop_token_ids == [3, 2]
    assert SamplingParams(temperature=1e-3).temperature == 0.01
    assert "temperature 0.001 is taken as 0.01" in caplog.text
    assert SamplingParams(temperature=1e-6).is_greedy
    bias: dict[Any, float] = {"5": 200.0, 6: -1.0}
    assert SamplingParams.from_optional(n=None, max_tokens=None, logit_bias=bias) == SamplingParams(
        max_tokens=None, logit_bias={5: 100.0, 6: -1.0}
    )
    params = SamplingParams(stop=["a"])
    clone = params.clone()
    clone.temperature = 0.5
    assert params.temperature == 1.0


def test_of_several_constraints_one_is_taken() -> None:
    with pytest.raises(ValueError, match=r"exactly one of json, regex.* is to be set, not json, regex"):
        StructuredOutputsParams(json={}, regex="a")
    with pytest.raises(ValueError, match="not none"):
        StructuredOutputsParams()
    for bad in ({"min_pattern_size": 2}, {"max_pattern_size": 2}):
        with pytest.raises(ValueError, match="repetition_detection"):
            RepetitionDetectionParams(**bad)
    with pytest.raises(ValueError, match="beam_width is 0"):
        BeamSearchParams(0, 1)


def test_fields_can_be_named_where_they_are_documented() -> None:
    """Whoever looks for a field of vLLM's finds it, or why not."""
    names = set(inspect.signature(SamplingParams).parameters)
    assert set(VLLM_DEFAULTS) <= names
    assert set(NOT_AVAILABLE) <= names
