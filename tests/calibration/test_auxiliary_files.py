"""The files beside the weights: what goes along into a copy that people publish, and what must not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from octavo.calibration.auxiliary_files import other_files
from octavo.cli import main
from octavo.quant.checkpoint import CheckpointError

SECRET = "nobody else may read this"


@pytest.fixture
def model(tmp_path: Path, fixtures: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(fixtures / "tiny", copy, ignore=shutil.ignore_patterns("expected.safetensors"))
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key.jinja").write_text(SECRET)
    return copy


def link(model: Path, name: str, target: Path) -> None:
    path = model / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


LEAVING: dict[str, Callable[[Path], object]] = {
    "README.md": lambda m: link(m, "README.md", m.parent / "secret"),
    "LICENSE": lambda m: link(m, "LICENSE", m.parent / "secret"),
    "generation_config.json": lambda m: link(m, "generation_config.json", m.parent / "secret"),
    "a link to a link": lambda m: (link(m, "a", m.parent / "secret"), link(m, "NOTICE", m / "a")),
    "upward": lambda m: link(m, "NOTICE", Path("../secret")),
    "a device": lambda m: link(m, "NOTICE", Path("/dev/zero")),
    "templates": lambda m: link(m, "additional_chat_templates", m.parent / "secrets"),
    "a template": lambda m: link(m, "additional_chat_templates/x.jinja", m.parent / "secret"),
}


@pytest.mark.parametrize("case", LEAVING)
def test_links_out_of_the_model_are_refused(model: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    LEAVING[case](model)
    out = model.parent / "out"
    assert main(["quantize", str(model), "-o", str(out), "--scheme", "W8A8", "--no-eval"]) == 1
    assert "out of the model: what it leads to would be copied" in capsys.readouterr().err
    assert not out.exists()
    assert not (model.parent / ".out.partial").exists()


def test_a_pipe_is_refused(model: Path) -> None:
    os.mkfifo(model / "NOTICE")
    with pytest.raises(CheckpointError, match="NOTICE is no regular file but a device, a pipe or a socket"):
        other_files(model)


def test_links_within_the_model_and_its_hub_cache_are_followed(model: Path, tmp_path: Path) -> None:
    """As the Hub's client lays a model out: snapshots/COMMIT/NAME -> ../../blobs/HASH."""
    cache = tmp_path / "models--someone--tiny"
    snapshot = cache / "snapshots" / ("0" * 40)
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (model / "README.md").write_text("The original's own words.")
    for number, path in enumerate(sorted(model.iterdir())):
        path.rename(cache / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    (snapshot / "LICENSE").symlink_to("README.md")
    out = tmp_path / "out"
    assert main(["quantize", str(snapshot), "-o", str(out), "--scheme", "FP8_DYNAMIC", "--no-eval"]) == 0
    assert (out / "LICENSE").read_text() == "The original's own words."
    assert "The original's own words." in (out / "README.md").read_text()
    assert not (out / "tokenizer.json").is_symlink()
    assert (out / "tokenizer.json").read_bytes() == (snapshot / "tokenizer.json").read_bytes()


def test_a_model_behind_a_link_is_its_own_root(model: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(model)
    assert set(other_files(tmp_path / "alias")) == set(other_files(model)) > {"tokenizer.json"}
