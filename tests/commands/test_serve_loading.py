"""How far a load is, as those who wait for it see it; tests/runtime/test_process.py has an engine that tells it."""

from __future__ import annotations

import io
import logging
import time
from pathlib import Path

import pytest
from rich.console import Console

from octavo.commands import serve_loading
from octavo.commands.serve_loading import line, loading_shown
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.weights import load_model
from octavo.runtime.progress import Progress


class Loading:
    """An engine of which nothing but its progress is looked at."""

    def __init__(self, path: Path) -> None:
        self.progress = Progress(str(path))


def test_a_load_is_told_layer_by_layer(fixtures: Path) -> None:
    told: list[tuple[int, int]] = []
    load_model(EngineConfig(model=str(fixtures / "tiny")), on_layer=lambda *step: told.append(step))
    assert told == [(0, 2), (1, 2), (2, 2)]


def shown(engines: list[Loading], console: Console, text: str) -> str:
    """What is shown until `text` is, while half of the first engine's layers have been loaded."""
    engines[0].progress.load(10, 20)
    deadline = time.monotonic() + 30
    with loading_shown(engines, console):  # type: ignore[arg-type]
        while text not in console.file.getvalue():  # type: ignore[attr-defined]
            assert time.monotonic() < deadline
            time.sleep(0.01)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_bar_at_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_loading, "FIRST_SECONDS", 0.0)
    engines = [Loading(tmp_path / "0"), Loading(tmp_path / "1")]
    engines[1].progress.load(0, 20)
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    assert "loading layers" in shown(engines, console, "25%")


def test_lines_in_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(serve_loading, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(serve_loading, "LINE_SECONDS", 0.02)
    engine = Loading(tmp_path / "progress")
    engine.progress.load(0, 20)
    console = Console(file=io.StringIO())
    deadline = time.monotonic() + 30
    with caplog.at_level(logging.INFO), loading_shown([engine], console):  # type: ignore[list-item]
        while "loading: 0 of 20 layers" not in caplog.text:
            assert time.monotonic() < deadline
        engine.progress.load(20, 20)
        while "loading: 20 of 20 layers" not in caplog.text:
            assert time.monotonic() < deadline
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]
    assert line(5, 20, 10.0) == "loading: 5 of 20 layers, some 30 s left"


def test_a_short_load_shows_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = Loading(tmp_path / "progress")
    engine.progress.load(1, 2)
    console = Console(file=io.StringIO(), force_terminal=True)
    with caplog.at_level(logging.INFO), loading_shown([engine], console):  # type: ignore[list-item]
        time.sleep(0.3)
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]
    assert caplog.text == ""
