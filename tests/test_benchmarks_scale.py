"""The table of benchmarks/scale.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is no package of the wheel

from benchmarks import scale


def test_efficiency_is_relative_to_one_and_to_the_number() -> None:
    values = {4: {"decode": [30.0, 50.0, 41.0]}, 1: {"decode": [10.0, 12.0, 500.0]}}
    assert scale.table("-dp", values).splitlines() == [
        "| `-dp` | decode: tokens/s | efficiency |",
        "|---|---|---|",
        "| 1 | 12.0 | 1.00 |",
        "| 4 | 41.0 | 0.85 |",
    ]


def test_a_share_is_that_of_the_same_round() -> None:
    values = {2: {"decode": [9.0, 19.0, 29.0]}, 1: {"decode": [10.0, 20.0, 30.0]}}
    assert scale.table_of_shares("-dp", values).splitlines()[2:] == [
        "| 1 | 20.0 | 1 |",
        "| 2 | 19.0 | 0.950 (0.900 to 0.967) |",
    ]


def test_one_must_be_among_the_sizes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["scale", "MODEL", "-tp", "2", "4"])
    with pytest.raises(SystemExit):
        scale.parse_arguments()
    assert "1 must be among the sizes" in capsys.readouterr().err
