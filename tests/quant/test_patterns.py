"""Regexes of a config: what they match is what `re` says, and none of them hangs."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.quant.formats.format import FormatError
from octavo.quant.formats.patterns import MAX_LENGTH, Regexes

NAMES = st.lists(st.sampled_from(["model", "layers", "0", "11", "self_attn", "q_proj", "mlp", "gate", "lm_head", "["]))
ATOMS = st.sampled_from(
    ["model", r"\.", ".", r"\d+", "q_proj", "(?:mlp|gate)", "[a-z_]", "lm_head", "[]|)]", r"\(", ""]
)
REPEATS = st.sampled_from(["", "*", "+", "?", "{1,2}", "*?"])
BODIES = st.lists(st.tuples(ATOMS, REPEATS), max_size=5).map(
    lambda parts: "".join(f"(?:{atom}){repeat}" if repeat else atom for atom, repeat in parts)
)
LOOKAHEADS = st.lists(st.tuples(st.sampled_from(["(?=", "(?!"]), BODIES), max_size=2).map(
    lambda heads: "".join(f"{kind}.*{body})" for kind, body in heads)
)
REGEXES = st.tuples(st.sampled_from(["", "^", "(?i)"]), LOOKAHEADS, BODIES, st.sampled_from(["", "$"])).map("".join)


@given(st.lists(REGEXES, min_size=1, max_size=3), NAMES.map(".".join))
def test_they_match_what_python_says(patterns: list[str], name: str) -> None:
    regexes = Regexes(patterns, "ignore")
    assert regexes.match(name) == any(re.match(pattern, name) is not None for pattern in patterns)
    assert regexes.search(name) == any(re.search(pattern, name) is not None for pattern in patterns)


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(.*)*(.*)*(.*)*x", r"^(?!(a|a)*!)(\w*\w*)*\.$", "(?=(a*)*b)(a*)*", "(a|ab|b)*c"]
)
def test_none_of_them_hangs(pattern: str) -> None:
    """`re` takes hours for each."""
    assert not Regexes([pattern], "ignore").match("a" * 60 + "?")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", r"is not a regex that RE2 takes \(missing \)"),
        (r"(a)\1", "is not a regex that RE2 takes"),
        (r".*(?<!gate)_proj", "without backreferences, and with lookaheads at the beginning alone"),
        ("(?!a)b|c", "is not a regex that RE2 takes"),
        ("(?!a", "is not a regex that RE2 takes"),
        ("a{2000}", "invalid repetition size"),
        ("\ud800", "is not a regex: surrogates not allowed"),
        ("x" * (MAX_LENGTH + 1), "has 100,001 characters of regexes; at most 100,000"),
    ],
)
def test_what_is_not_taken_is_refused_by_name(pattern: str, message: str) -> None:
    with pytest.raises(FormatError, match=f"quantization_config: ignore .*{message}"):
        Regexes([pattern], "ignore")
