"""Calibration workers on the nodes of a Ray cluster: `make test-ray`. Two nodes on this machine, with a CPU each."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from quantize_runs import digest, tuning, write_text

from octavo.calibration.workspace import partial_of, read_manifest

PATIENCE = 300.0  # seconds; only a hang takes as long
ON_RAY = ("--distributed-executor-backend", "ray")

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("default")]  # Ray's own warnings are not ours to mend


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes; this process starts them, and is no part of the cluster."""
    monkeypatch.setenv("RAY_worker_register_timeout_seconds", "300")  # a loaded machine is slow
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


def command(model: Path, out: Path, text: Path, *more: str) -> list[str]:
    return tuning(model, out, text, "--calibration-workers", "2", *more)


def run(command: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False, **how)


def test_nodes_compute_what_processes_of_one_machine_do(
    cluster: Any, fixtures: Path, tmp_path: Path, text: Path
) -> None:
    """Two members' sums have one order; each has a thread here as there. A lost node ends the run, to be resumed."""
    local = run(command(fixtures / "tiny", tmp_path / "here", text), env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert local.returncode == 0, local.stderr
    out = tmp_path / "out"
    with subprocess.Popen(
        command(fixtures / "tiny", out, text, *ON_RAY), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        deadline = time.monotonic() + PATIENCE
        while len(read_manifest(partial_of(out))["units"]) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert re.search("octavo quantize: (calibration worker 1 of 2: |another calibration worker is gone: )", said)
    assert "--resume" in said
    cluster.add_node(num_cpus=1)
    resumed = run(command(fixtures / "tiny", out, text, *ON_RAY, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert digest(out) == digest(tmp_path / "here")


def test_a_cluster_without_room_is_told(
    cluster: Any, fixtures: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.remove_node(cluster.worker_nodes.copy().pop())
    refused = run(command(fixtures / "tiny", tmp_path / "out", text, *ON_RAY))
    assert refused.returncode == 1
    assert "within 60 s the Ray cluster has had no room for so many, each with 1 CPU" in refused.stderr
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    refused = run(command(fixtures / "tiny", tmp_path / "out", text, *ON_RAY))
    assert refused.returncode == 1
    assert "no cluster answers at" in refused.stderr
    assert not (tmp_path / "out").exists()
    assert not partial_of(tmp_path / "out").exists()
