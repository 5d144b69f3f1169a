"""Models in several GGUF files, and GGUF files of the Hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_oracle import write_gguf
from hub_server import fake_hub
from torch import Tensor

from octavo.quant.checkpoint import Checkpoint
from octavo.quant.hub import hub_id, model_name, resolve_model
from octavo.quant.model_files import CheckpointError

PROGRAM = """
import json, sys
from octavo.quant.hub import resolve_model
for spec in sys.argv[1:]:
    try:
        print(json.dumps(str(resolve_model(spec))))
    except ValueError as e:
        print(json.dumps(str(e)))
"""


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def split(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], dict[str, Tensor]]:
    """The files of a model with eight tensors in each, by the gguf package, and what its tensors stand for."""
    directory = tmp_path_factory.mktemp("split")
    meaning = write_gguf(fixtures / "tiny", directory / "tiny-Q8_0.gguf", "llama", Kind.Q8_0, per_part=8)
    files = sorted(directory.iterdir())
    assert len(files) == -(-len(meaning) // 8) == 3
    assert files[0].name == "tiny-Q8_0-00001-of-00003.gguf"
    return files, meaning


def check_numbers(directory: Path, meaning: dict[str, Tensor]) -> None:
    original = Checkpoint.open(directory, as_original=True)
    assert original.names == meaning.keys()
    for name, numbers in meaning.items():
        assert torch.equal(original.tensor(name), numbers.to(torch.bfloat16)), name
    served = Checkpoint.open(directory)
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        weight = served.linear(module)
        assert not isinstance(weight, Tensor)
        assert torch.equal(weight.dequantize(torch.float32), meaning[f"{module}.weight"])


def test_all_parts_of_a_model_are_read(split: tuple[list[Path], dict[str, Tensor]], tmp_path: Path) -> None:
    files, meaning = split
    directory = resolve_model(str(files[0]))
    check_numbers(directory, meaning)
    assert resolve_model(f"{files[0].parent}:Q8_0") == resolve_model(str(files[0].parent)) == directory
    assert model_name(f"{files[0].parent}:Q8_0") == model_name(str(files[0])) == "tiny-Q8_0"
    with pytest.raises(
        CheckpointError, match=r"tiny-Q8_0-00002-of-00003.gguf: it is part 2 of 3; name the first, .*-00001-"
    ):
        resolve_model(str(files[1]))
    for file in (files[0], files[2]):
        shutil.copy(file, tmp_path)
    with pytest.raises(CheckpointError, match=r"part 1 of 3, and tiny-Q8_0-00002-of-00003\.gguf is not beside it"):
        resolve_model(str(tmp_path / files[0].name))
    for wrong, message in (
        (files[2], "doesn't say that it is part 2 of 3"),
        (files[0], "doesn't say that it is part 2"),
    ):
        shutil.copy(wrong, tmp_path / files[1].name)
        with pytest.raises(CheckpointError, match=message):
            resolve_model(str(tmp_path / files[0].name))


def test_a_part_with_tensors_of_another_is_refused(split: tuple[list[Path], dict[str, Tensor]], tmp_path: Path) -> None:
    files, _ = split
    for file in files:
        shutil.copy(file, tmp_path)
    reader = gguf.GGUFReader(tmp_path / files[2].name, "r+")
    reader.fields["split.no"].parts[-1][0] = 1
    reader.data.flush()
    shutil.copy(tmp_path / files[2].name, tmp_path / files[1].name)  # two that say that they are the second
    with pytest.raises(CheckpointError, match=r"00003-of-00003\.gguf: it doesn't say that it is part 3 of 3"):
        resolve_model(str(tmp_path / files[0].name))
    reader.fields["split.no"].parts[-1][0] = 2
    reader.data.flush()
    with pytest.raises(CheckpointError, match=r"00003-of-00003\.gguf: it has .*, which a part before it has, too"):
        resolve_model(str(tmp_path / files[0].name))


def test_files_of_the_hub(split: tuple[list[Path], dict[str, Tensor]], fixtures: Path, tmp_path: Path) -> None:
    """Against a server on this machine: what is meant is downloaded, and nothing else; then out of the cache."""
    files, meaning = split
    whole = tmp_path / "whole-Q4_0.gguf"
    other = write_gguf(fixtures / "tiny", whole, "llama", Kind.Q4_0)
    held = {f"Q8_0/{file.name}": file.read_bytes() for file in files} | {
        "README.md": b"two files",
        "tiny-Q4_0.gguf": whole.read_bytes(),
        "tiny-UD-Q4_0.gguf": b"not asked for",
        "mmproj-tiny-Q8_0.gguf": b"no model",
    }

    def run(*specs: str, **environment: str) -> list[str]:
        """The directory of each, or the reason, by a process of its own: the Hub's address is read once a process."""
        command = [sys.executable, "-W", "error", "-c", PROGRAM, *specs]
        env = os.environ | {"HF_HOME": str(tmp_path / "hub"), "HF_ENDPOINT": endpoint} | environment
        source = Path(__file__).parents[2] / "src"
        done = subprocess.run(command, env=env, cwd=source, capture_output=True, text=True, check=True)
        return [json.loads(line) for line in done.stdout.splitlines()]

    with fake_hub("/owner/name", held) as endpoint:
        parts, one, several, none, alone, missing = run(
            "owner/name:Q8_0",
            "owner/name:tiny-q4_0",
            "owner/name:Q4_0",
            "owner/name:Q6_K",
            "owner/name",
            "other/name:Q8_0",
        )
    check_numbers(Path(parts), meaning)
    check_numbers(Path(one), other)
    there = "there are: Q8_0/tiny-Q8_0.gguf, tiny-Q4_0.gguf, tiny-UD-Q4_0.gguf"
    assert several == f"owner/name has 2 GGUF files with Q4_0 in their names; {there}"
    assert none == f"owner/name has no GGUF files with Q6_K in their names; {there}"
    assert "owner/name has 3 GGUF files" in alone
    assert "name one, such as owner/name:Q4_K_M" in alone
    assert "other/name:Q8_0 is not a local directory, and the Hub did not provide it" in missing
    names = {path.name for path in (tmp_path / "hub").rglob("*.gguf")}
    assert names == {*(file.name for file in files), "tiny-Q4_0.gguf"}

    again, only, absent = run("owner/name:Q8_0", "owner/name:Q4_0", "other/name:Q8_0", HF_HUB_OFFLINE="1")
    assert again == parts
    assert only == one  # of its kind the cache has no other
    assert "the Hub did not provide it" in absent
    assert hub_id("owner/name:Q8_0") == "owner/name"
    assert model_name("owner/name:Q8_0") == "name:Q8_0"


def test_the_only_file_of_a_repository(fixtures: Path, tmp_path: Path) -> None:
    """`octavo inspect owner/name`, as every command, reads it without its kind being said."""
    file = tmp_path / "one.gguf"
    write_gguf(fixtures / "tiny", file, "llama", Kind.Q8_0)
    with fake_hub("/owner/name", {"only-Q8_0.gguf": file.read_bytes(), "config.json": b"{}"}) as endpoint:
        environment = os.environ | {"HF_HOME": str(tmp_path / "hub"), "HF_ENDPOINT": endpoint}
        source = Path(__file__).parents[2] / "src"
        done = subprocess.run(
            [sys.executable, "-m", "octavo", "inspect", "owner/name"],
            env=environment,
            cwd=source,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert "gguf" in done.stdout.lower()
