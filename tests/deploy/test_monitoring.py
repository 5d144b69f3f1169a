"""Dashboards and alerts: every metric in them is one that the server has, and a real Prometheus answers every panel.

The slow tests need Debian's `prometheus` (which brings promtool); `make test-scale` runs them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml
from debian import tool
from octavo_server import PATIENCE, Server, by_engine, serving, stream, wait_until
from prometheus_client.parser import text_string_to_metric_families

from octavo.runtime.messages import Ready, StartupReport
from octavo.server.fleet.collector import FleetCollector
from octavo.server.fleet.member import Member
from octavo.server.fleet.restarts import Restarts
from octavo.server.metrics import Metrics

FILES = Path(__file__).parents[2] / "deploy/helm/octavo/files"
COMPOSE = Path(__file__).parents[2] / "deploy/compose"
BOARDS = {path.stem: json.loads(path.read_text()) for path in sorted((FILES / "dashboards").glob("*.json"))}
ALERTS = yaml.safe_load((FILES / "alerts.yaml").read_text())
PROMETHEUS_OWN = {"up"}
TWO_ENGINES: Any = SimpleNamespace(  # of a fleet
    members=[Member(index, Restarts(3)) for index in range(2)], adapters=SimpleNamespace(max_loras=None)
)
NUM_STREAMS = 8
NAME = re.compile(r"\b(?:(?:vllm|octavo):|http_|process_|up\b)\w*")


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    """Of all panels, variables and alerts."""
    found = [target["expr"] for board in BOARDS.values() for panel in panels(board) for target in panel["targets"]]
    for board in BOARDS.values():
        variables = [it["query"] for it in board["templating"]["list"] if it["type"] == "query"]
        found += [re.sub(r"label_values\((.*), \w+\)", r"\1", query) for query in variables]
    return found + [rule["expr"] for group in ALERTS["groups"] for rule in group["rules"]]


def test_every_metric_is_one_that_the_server_has() -> None:
    report = StartupReport("m", "a", "float32", "cpu", "float32", [], 0, 0, {})
    metrics = Metrics("m", Ready(64, 8, 16, 100, report), [{"block_size": "16", "cache_dtype": "x"}])
    metrics.request("/v1/completions", "POST", 200, 0.1)
    metrics.hints(["user"])
    page = metrics.page().decode()
    known = {sample.name for family in text_string_to_metric_families(page) for sample in family.samples}
    for family in FleetCollector(TWO_ENGINES, "m").collect():
        known.add(family.name if family.type == "gauge" else f"{family.name}_total")
    named = {name for expression in expressions() for name in NAME.findall(re.sub(r"\{.*?\}", "", expression))}
    assert len(named) > 20
    assert named - PROMETHEUS_OWN <= known


@pytest.mark.parametrize("name", BOARDS)
def test_a_dashboard_can_be_read(name: str) -> None:
    board = BOARDS[name]
    assert board["uid"] == f"octavo-{name}"
    shown = panels(board)
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, f"{panel['title']} lies over another panel"
        taken |= cells
    for panel in shown:
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert all(target["legendFormat"] for target in panel["targets"])
    known = {it["name"] for it in board["templating"]["list"]} | {"__rate_interval"}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(board))) - {"__all"} <= known


def test_compose_mounts_what_is_there() -> None:
    services = yaml.safe_load((COMPOSE / "compose.yaml").read_text())["services"]
    sources = [volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])]
    assert [it for it in sources if it.startswith(("./", "../"))]
    for source in sources:
        if source.startswith("."):
            assert (COMPOSE / source).exists(), source
    for name in ("octavo", "gateway"):
        build = services[name]["build"]
        assert (COMPOSE / build["context"] / build["dockerfile"]).is_file()
    scrape = yaml.safe_load((COMPOSE / "prometheus.yaml").read_text())["scrape_configs"][0]
    assert scrape["static_configs"][0]["targets"] == ["octavo:8000"]
    for service in services.values():  # nothing is open to the network
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


@pytest.mark.slow
def test_docker_compose_takes_it() -> None:
    command = [tool("docker-compose", "docker-compose"), "-f", str(COMPOSE / "compose.yaml"), "config", "--quiet"]
    key = {"OCTAVO_API_KEY": "k", "PATH": "/usr/bin:/bin"}
    said = subprocess.run(command, capture_output=True, text=True, check=False, env=key).stderr
    assert "name a model" in said
    subprocess.run(command, check=True, env=key | {"MODEL": "m"})
    command[3:3] = ["--profile", "gateway"]
    subprocess.run(command, check=True, env=key | {"MODEL": "m"})


@pytest.mark.slow
def test_promtool_takes_the_alerts_and_they_fire(tmp_path: Path) -> None:
    promtool = tool("promtool", "prometheus")
    shutil.copy(FILES / "alerts.yaml", tmp_path)
    shutil.copy(COMPOSE / "prometheus.yaml", tmp_path)
    shutil.copy(Path(__file__).parent / "alerts_test.yaml", tmp_path)
    for arguments in (["check", "config", "prometheus.yaml"], ["test", "rules", "alerts_test.yaml"]):
        done = subprocess.run([promtool, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextmanager
def prometheus(directory: Path, server: Server) -> Iterator[httpx.Client]:
    """A Prometheus that scrapes the server as deploy/compose has it, every second."""
    config = yaml.safe_load((COMPOSE / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [server.url.removeprefix("http://")]
    shutil.copy(FILES / "alerts.yaml", directory)
    (directory / "prometheus.yaml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = [
        tool("prometheus", "prometheus"),
        f"--config.file={directory / 'prometheus.yaml'}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (directory / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as client:

                def is_ready() -> bool:
                    assert process.poll() is None, (directory / "log").read_text()
                    try:
                        return client.get("/-/ready").status_code == 200
                    except httpx.TransportError:
                        return False

                wait_until(is_ready)
                yield client
        finally:
            process.kill()
            process.wait()


def found(client: httpx.Client, expression: str) -> list[float]:
    """What Grafana would draw at the right end of a panel."""
    for name, value in {"$model": ".*", "$instance": ".*", "$__rate_interval": "1m"}.items():
        expression = expression.replace(name, value)
    response = client.get("/api/v1/query", params={"query": expression})
    assert response.status_code == 200, f"{expression}: {response.text}"
    return [float(it["value"][1]) for it in response.json()["data"]["result"]]


def lose_an_engine(server: Server, client: httpx.Client) -> None:
    """Kill one with answers under way, which all come whole."""
    body = {"model": "tiny", "prompt": [1] * 40, "max_tokens": 400, "ignore_eos": True}
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        streams = [pool.submit(stream, client, "/v1/completions", body) for _ in range(NUM_STREAMS)]
        wait_until(lambda: sum(count > 0 for count in by_engine(client, "vllm:num_requests_running").values()) == 2)
        os.kill(server.engine_pids[0], signal.SIGKILL)
        ends = [it.result()[-1]["choices"][0]["finish_reason"] for it in streams]
    assert ends == ["length"] * NUM_STREAMS


@pytest.mark.slow
def test_every_panel_has_data_from_a_real_server(tmp_path: Path) -> None:
    """Of two engines, one of which dies under its answers and is started again."""
    flags = ("--served-model-name", "tiny", "--data-parallel-size", "2")
    with serving(*flags) as server, prometheus(tmp_path, server) as client, server.client() as asks:
        wait_until(lambda: found(client, "up") == [1.0])
        lose_an_engine(server, asks)
        wait_until(lambda: found(client, "sum(octavo:engine_up)") == [2.0])
        for i in range(12):
            prompt = [i % 3 + 1] * 40
            body = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "ignore_eos": True, "user": "me"}
            assert asks.post("/v1/completions", json=body).status_code == 200
            time.sleep(0.5)  # over several scrapes, from which rates are made
        empty = {
            f"{name}: {panel['title']}: {target['expr']}"
            for name, board in BOARDS.items()
            for panel in panels(board)
            for target in panel["targets"]
            if not any(value == value for value in found(client, target["expr"]))
        }
        assert empty == set()
        assert found(client, "sum(octavo:engine_restarts_total)") == [1.0]
        assert found(client, "sum(octavo:requests_migrated_total)")[0] > 0
        names = {
            rule["name"] for group in client.get("/api/v1/rules").json()["data"]["groups"] for rule in group["rules"]
        }
        assert names == {rule["alert"] for group in ALERTS["groups"] for rule in group["rules"]}
