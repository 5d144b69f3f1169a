"""GGUF files that are named by their directory and their kind."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_oracle import write_gguf

from octavo.quant.hub import hub_id, model_name, resolve_model
from octavo.quant.model_files import CheckpointError


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_file_is_named_by_its_directory_and_kind(fixtures: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    file = models / "tiny-Q8_0.gguf"
    write_gguf(fixtures / "tiny", file, "llama", Kind.Q8_0)
    alone = resolve_model(str(models))
    assert alone == resolve_model(str(file)) == resolve_model(f"{models}:q8_0")
    for name in ("tiny-Q4_K_M.gguf", "tiny.IQ4_XS.gguf", "tiny-UD-Q4_K_M.gguf", "tiny.Q4_K_S.gguf"):
        shutil.copy(file, models / name)
    assert resolve_model(f"{models}:Q4_K_S") == resolve_model(str(models / "tiny.Q4_K_S.gguf"))
    assert resolve_model(f"{models}:UD-Q4_K_M") == resolve_model(str(models / "tiny-UD-Q4_K_M.gguf"))
    assert model_name(f"{models}:IQ4_XS") == "tiny.IQ4_XS"
    assert hub_id(f"{models}:IQ4_XS") is None
    there = "there are: tiny-Q4_K_M.gguf, tiny-Q8_0.gguf, tiny-UD-Q4_K_M.gguf, tiny.IQ4_XS.gguf, tiny.Q4_K_S.gguf"
    for name, message in {
        f"{models}:Q4_K_M": f"models has 2 GGUF files with Q4_K_M in their names; {there}",
        f"{models}:Q4_K": f"models has no GGUF files with Q4_K in their names; {there}",
        f"{models}:Q5_K_M": f"models has no GGUF files with Q5_K_M in their names; {there}",
        str(models): r"models has 5 GGUF files \(.*\): name one, such as .*models:Q4_K_M",
        f"{tmp_path}:Q4_K_M": "has no GGUF files with Q4_K_M in their names; there are: none",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            resolve_model(name)
