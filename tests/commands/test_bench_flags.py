"""What `octavo bench` refuses before it speaks to anyone."""

from __future__ import annotations

import pytest

from octavo.cli import main


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--goodput", "itl:5"], "not METRIC:MS"),
        (["--goodput", "ttft:soon"], "'soon' is not a number"),
        (["--request-rate", "0"], "not a number above 0"),
        (["--random-range-ratio", "1"], "not a number from 0 to below 1"),
        (["--num-prompts", "0"], "not a whole number from 1 up"),
        (["--percentile-metrics", "ttft,speed"], "'speed' is none of"),
        (["--metric-percentiles", "101"], "from 0 to 100"),
        (["--extra-body", "[]"], "not a JSON object"),
        (["--header", "X"], "not NAME=VALUE"),
        (["--max-seconds", "inf"], "'inf' is not a number"),
        (["--warmup-seconds", "inf"], "'inf' is not a number"),
        (["--length-scale", "inf"], "'inf' is not a number"),
        (["--trace-speed", "inf"], "'inf' is not a number"),
        (["--ramp-up-end-rps", "inf"], "'inf' is not a number"),
    ],
)
def test_flags_that_mean_nothing_are_refused(
    options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["bench", *options])
    assert reason in capsys.readouterr().err


RAMP = ("--ramp-up-strategy", "linear", "--ramp-up-start-rps", "1", "--ramp-up-end-rps", "2")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--dataset-name", "custom"], "--dataset-path FILE goes with"),
        (["--dataset-path", "x.jsonl"], "--dataset-path FILE goes with"),
        (["--workload", "chat", "--trace", "x.jsonl"], "--workload and --trace exclude each other"),
        (["--workload", "chat", "--dataset-name", "prefix_repetition"], "--workload takes the place of --dataset-name"),
        (["--length-scale", "0.5"], "--length-scale goes with --workload"),
        (["--trace-speed", "2"], "--trace-speed goes with --trace"),
        (["--ramp-up-strategy", "linear", "--ramp-up-start-rps", "1"], "go together"),
        (["--ramp-up-end-rps", "1"], "go together"),
        ([*RAMP, "--request-rate", "3"], "--request-rate and --ramp-up-strategy exclude"),
        ([*RAMP, "--max-seconds", "3"], "--max-seconds goes with a rate that stays"),
        (["--self-timed"], "--self-timed goes with --trace"),
        (["--self-timed", "--trace", "x", "--request-rate", "2"], "--self-timed excludes"),
        (["--trace", "no such file"], "No such file"),
        (["--extra-body", '{"stream": false}'], "stream is for octavo bench to set"),
        (["--extra-body", '{"n": 2}'], "n must be 1"),
        (["--extra-body", '{"input": "x"}', "--backend", "openai-embeddings"], "input is for octavo bench to set"),
        (["--tokenizer", "no such directory"], "--tokenizer: no such directory: no such directory"),
        (["--base-url", "http://[::1"], "http://[::1: Invalid IPv6 URL"),
        (["--base-url", "http://a..b"], "'a..b' is no name of a host"),
        (["--header", "X-A=b\r\nX-C: d"], "the header 'X-A' has a line break"),
        (["--metadata", "completed=5"], "--metadata completed=5: the file has another completed"),
        (["--metadata", "card=a", "card=b"], "--metadata card=a: the file has another card"),
        (["--save-detailed"], "--save-detailed goes with --save-result or --append-result"),
    ],
)
def test_flags_that_exclude_each_other_are_refused(
    options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--model", "m", *options]) == 1
    assert reason in capsys.readouterr().err
