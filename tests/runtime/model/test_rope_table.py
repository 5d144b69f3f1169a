"""The rope's table is computed as far as sequences get, with the rows that it would have as a whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from shutil import copytree

import pytest
import torch
from octavo_server import PATIENCE, TINY
from toy_model import make_request, run_to_end, tokens_of

import octavo
from octavo.runtime.config import EngineConfig
from octavo.runtime.model import rope, weights
from octavo.runtime.model.rope import RopeSpec, RopeTable, cos_sin_table
from octavo.runtime.startup import load_engine


@pytest.mark.parametrize("rows_at_once", [7, 1 << 14])
def test_a_table_that_grows_has_the_rows_of_the_whole_one(rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rope, "ROWS_AT_ONCE", rows_at_once)
    spec = RopeSpec("default", 1e4, 64, 1000, 1000)
    whole = cos_sin_table(spec, 1000)
    table = RopeTable(spec, 1000)
    known = 0
    for num_rows in (1, 3, 2, 50, 333, 900, 1000):
        table.cover(num_rows)
        assert table.num_rows >= max(num_rows, known)
        known = table.num_rows
        assert torch.equal(table.values[:known], whole[:known])
    assert known == 1000


def test_ntk_stretches_base_and_frequencies() -> None:
    """As vLLM's NTKScalingRotaryEmbedding, and GTE's own code, have it, at every length."""
    spec = RopeSpec.parse({"type": "ntk", "factor": 8.0}, theta=20_000.0, head_dim=64, max_position=8192)
    table = cos_sin_table(spec, 9).double()
    frequencies = torch.tensor(
        [(20_000.0 * 8) ** (-2 * i / 64) / 8 ** (2 / 64) for i in range(32)], dtype=torch.float64
    )
    angles = torch.arange(9, dtype=torch.float64)[:, None] * frequencies
    torch.testing.assert_close(table, torch.cat((angles.cos(), angles.sin()), dim=1), rtol=0, atol=4e-6)


def test_a_sequence_beyond_the_first_rows_gets_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    def tokens(**settings: int) -> list[int]:
        config = EngineConfig(model=str(TINY), dtype="float32", num_threads=1, num_blocks=32, **settings)
        engine, _ = load_engine(config, 0.0)
        request = make_request("long", list(range(3, 103)), max_tokens=60)
        return tokens_of(run_to_end(engine, [request])["long"])

    whole = tokens(max_model_len=512)
    monkeypatch.setattr(weights, "FIRST_ROWS", 8)
    assert tokens() == whole


def test_positions_that_nobody_reaches_take_no_memory(tmp_path: Path) -> None:
    """640 MB for ten million of this model, whose weights are 1 MB."""
    code = (
        "import sys; from octavo.runtime.config import EngineConfig; from octavo.runtime.startup import load_engine\n"
        "for model in sys.argv[1:]:\n"
        "    load_engine(EngineConfig(model=model, num_threads=1, num_blocks=64), 0.0)\n"
        "    print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(octavo.__file__).parent.parent)}
    models = []
    for max_position in (512, 10_000_000):
        model = Path(copytree(TINY, tmp_path / str(max_position)))
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": max_position}))
        models.append(str(model))
    command = [sys.executable, "-P", "-c", code, *models]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=PATIENCE)
    few, many = (int(line) << 10 for line in said.stdout.splitlines())
    assert many - few < 100 << 20
