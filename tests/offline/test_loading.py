"""The bar of a model that loads."""

from __future__ import annotations

import io
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from octavo_server import wait_until

from octavo.offline import loading
from octavo.runtime.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def engines(tmp_path: Path) -> list[SimpleNamespace]:
    return [SimpleNamespace(progress=Progress(str(tmp_path / name))) for name in "ab"]


def test_layers_of_all_engines_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setattr(loading, "FIRST_SECONDS", 0)
    loaded = engines(tmp_path)
    with loading.loading_shown(loaded):  # type: ignore[arg-type]
        for number, engine in enumerate(loaded):
            engine.progress.load(number, 4)
        wait_until(lambda: "1/8" in shown.getvalue())
        loaded[0].progress.load(4, 4)
        wait_until(lambda: "5/8" in shown.getvalue())
    assert "Loading layers" in shown.getvalue()


def test_what_is_soon_loaded_or_no_terminal_shows_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "LOOK_SECONDS", 0.001)
    for shown in (Terminal(), io.StringIO()):
        monkeypatch.setattr("sys.stderr", shown)
        loaded = engines(tmp_path)
        with loading.loading_shown(loaded):  # type: ignore[arg-type]
            loaded[0].progress.load(4, 4)
            time.sleep(0.05)  # some looks
        assert shown.getvalue() == ""
