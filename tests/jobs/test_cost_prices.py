"""Prices by hand, the table of machines, and what words on the command line stand for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from octavo.jobs.cost.choice import pareto_front
from octavo.jobs.cost.job import eval_flags, in_one_line
from octavo.jobs.cost.prices import (
    ApiPrice,
    PriceError,
    Traffic,
    break_even,
    machine_named,
    machines,
    machines_needed,
    parse_api_price,
    prefill_share,
    token_prices,
)
from octavo.jobs.cost.targets import Target, TargetError, parse_target, parse_targets
from octavo.jobs.cost.wording import figure


def test_a_bill_is_divided_by_time() -> None:
    """2 requests a second of 1000 and 100 tokens for $7.20 an hour: $0.001 a request, 40 % of it for the prompt."""
    traffic = Traffic(rate=2.0, inputs=1000.0, outputs=100.0)
    share = prefill_share(traffic, prefill_rate=5000.0)
    assert share == pytest.approx(0.4)
    prices = token_prices(7.2, traffic, share, cached_ratio=0.25)
    assert prices.input == pytest.approx(0.4)
    assert prices.output == pytest.approx(6.0)
    assert prices.cached == pytest.approx(0.1)
    assert prices.all_in == pytest.approx(10.0)
    assert machines_needed(2 * 1100 * 86400, traffic) == pytest.approx(1.0)
    # an API at $1 and $4 asks $0.0014 a request; the machine's day costs $172.80
    assert break_even(7.2, traffic, ApiPrice("api", 1.0, 4.0)) == pytest.approx(172.8 / 0.0014 * 1100)


def test_every_price_has_a_date_and_a_source() -> None:
    found = machines()
    assert len(found) >= 5
    for machine in found.values():
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", machine.date)
        assert machine.source
        assert machine.what
        assert machine.cost_per_hour > 0


def test_own_machines_are_added_and_win(tmp_path: Path) -> None:
    own = tmp_path / "prices.toml"
    entry = 'cost_per_hour = 0.5\nwhat = "under the desk"\ndate = "2026-11-30"\nsource = "the bill"\n'
    own.write_text(f'[desk]\n{entry}\n["aws-p5.48xlarge"]\n{entry}')
    assert machine_named("desk", own).cost_per_hour == 0.5
    assert machine_named("aws-p5.48xlarge", own).what == "under the desk"
    assert machine_named("runpod-h100-sxm", own) == machines()["runpod-h100-sxm"]
    with pytest.raises(PriceError, match=r"no machine 'desk' in the table of prices; it has aws-g5"):
        machine_named("desk", None)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[desk", "is no table of prices"),
        ("[desk]\ncost_per_hour = 1\n", "missing required field `what`"),
        ('[desk]\ncost_per_hour = -1\nwhat = "x"\ndate = "y"\nsource = "z"', "desk: cost_per_hour -1.0 is not above 0"),
        ('[desk]\ncost = 1\nwhat = "x"\ndate = "y"\nsource = "z"', "unknown field `cost`"),
    ],
)
def test_a_bad_table_is_one_clear_error(tmp_path: Path, content: str, says: str) -> None:
    own = tmp_path / "prices.toml"
    own.write_text(content)
    with pytest.raises(PriceError, match=re.escape(says)):
        machines(own)


def test_api_prices() -> None:
    assert parse_api_price("gpt=0.15/0.60") == ApiPrice("gpt", 0.15, 0.6)
    for wrong in ("gpt", "gpt=1", "=1/2", "gpt=a/b", "gpt=-1/2", "gpt=0/0", "gpt=1/2/3"):
        with pytest.raises(ValueError, match="is not NAME=IN/OUT"):
            parse_api_price(wrong)


def test_words_for_models(tmp_path: Path) -> None:
    (tmp_path / "a@b").mkdir()
    assert parse_target(str(tmp_path / "a@b")) == Target("a@b", "checkpoint", str(tmp_path / "a@b"))
    assert parse_target("org/model") == Target("model", "checkpoint", "org/model")
    assert parse_target("org/model@fp8") == Target("model FP8_DYNAMIC", "quantized", "org/model", "FP8_DYNAMIC", "auto")
    gptq = parse_target("mine=org/model@w4a16@64/gptq")
    assert gptq == Target("mine", "quantized", "org/model", "W4A16@64", "gptq")
    assert gptq.directory_name == "model-W4A16-64-gptq"
    assert parse_target("http://user:secret@host:8000/v1").label == "host:8000"
    assert parse_target("vllm=http://host:8000") == Target("vllm", "server", "http://host:8000")


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("m@int5", "'int5' is no scheme to quantize to; fp8, int8, int4 or one of "),
        ("m@W4A16@many", "'many' is not a group size"),
        ("m@W4A16@48", "'48' is not a group size; 32, 64, 128, -1 are"),
        ("m@W8A8@64", "W8A8 scales per channel; a group size is for W4A16"),
        ("m@W4A16/best", "'best' is no algorithm; auto, rtn, gptq"),
    ],
)
def test_a_word_that_names_nothing(word: str, says: str) -> None:
    with pytest.raises(TargetError, match=re.escape(says)):
        parse_target(word)


def test_flags_of_the_server_that_change_what_is_computed_are_those_of_the_evaluation_too() -> None:
    flags = ("--dtype=float32", "--max-num-seqs", "8", "--kv-cache-dtype", "int8", "--lm-head-dtype")
    assert eval_flags(flags) == ["--dtype=float32", "--kv-cache-dtype", "int8", "--lm-head-dtype"]
    assert eval_flags(()) == []


def test_an_error_of_a_server_s_start_is_one_line_in_the_report() -> None:
    log = "the server ended with code 1; the end of its log:\n  | reading /some/where\n  | octavo serve: no such scheme"
    assert in_one_line(RuntimeError(log)) == "the server ended with code 1: octavo serve: no such scheme"
    assert in_one_line(RuntimeError("a request failed: HTTP 500")) == "a request failed: HTTP 500"


def test_two_of_one_name() -> None:
    with pytest.raises(TargetError, match="two models are called 'm': LABEL=MODEL gives one another name"):
        parse_targets(["a/m", "b/m"])
    with pytest.raises(TargetError, match="a/m and b/m would be quantized into one directory, m-W8A8-auto: another -o"):
        parse_targets(["one=a/m@int8", "two=b/m@int8"])
    assert len(parse_targets(["one=a/m@int8", "two=a/m@int8", "b/m", "b/m@fp8"])) == 4


def test_nothing_on_the_front_is_beaten_in_both() -> None:
    points = [(3.0, 0.0), (1.0, 0.5), (2.0, 0.1), (2.5, 0.3), (1.0, 0.6)]
    assert pareto_front(points) == [1, 2, 0]


def test_figures_have_three_digits() -> None:
    shown = {0.03124: "0.0312", 4.2: "4.20", 45.67: "45.7", 1350.4: "1,350", 12.3e6: "12.3 M", 2e9: "2 B", 0.0: "0"}
    assert {value: figure(value) for value in shown} == shown
