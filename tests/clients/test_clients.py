"""Real clients against a real server of Qwen2.5-Coder-0.5B: libraries as their documentation shows them, and coding
agents at a one-file edit. They may edit badly, but every request of theirs is answered.

`make clients` installs them, beside octavo, and runs this.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import conversations
import httpx
import pytest
from octavo_server import PATIENCE, Server, started
from prometheus_client.parser import text_string_to_metric_families

from octavo.demo_models import fetch_model

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
CLIENTS = Path(os.environ.get("OCTAVO_CLIENTS", HERE.parents[1] / ".clients")).resolve()
MODEL = "qwen2.5-coder"
TASK = "In calc.py, add must add. Change that file."


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    if not CLIENTS.is_dir():
        pytest.fail(f"the clients are not in {CLIENTS}: `make clients` installs them")
    with started("--served-model-name", "*", model=fetch_model("qwen2", Path("models"))) as server:
        server.wait_until_ready()
        yield server


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory with a file and a history; the agents' home stands beside it."""
    project = tmp_path / "project"
    project.mkdir()
    (project.parent / "home").mkdir()
    (project / "calc.py").write_text("def add(a, b):\n    return a - b\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "--quiet"], ["add", "calc.py"], ["commit", "--quiet", "-m", "Add"]):
        subprocess.run([*git, *command], cwd=project, check=True)
    return project


@pytest.mark.parametrize("name", conversations.CONVERSATIONS)
def test_a_library_talks_as_its_documentation_shows(name: str, server: Server) -> None:
    command = [CLIENTS / "libraries/bin/python", Path(conversations.__file__), name, server.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def run(command: list[str], project: Path, environment: dict[str, str]) -> str:
    """What an agent says on its standard output, when it has ended well."""
    places = {"HOME": str(project.parent / "home"), "PWD": str(project)}
    variables = os.environ | places | {"NO_COLOR": "1"} | environment
    done = subprocess.run(
        command,
        cwd=project,
        env=variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def requests_by_status(server: Server) -> dict[str, float]:
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text):
        for sample in family.samples:
            if sample.name == "http_requests_total" and sample.labels["method"] == "POST":
                status = sample.labels["status"]
                found[status] = found.get(status, 0) + sample.value
    return found


@pytest.fixture
def answered(server: Server) -> Iterator[None]:
    """Every request of a test is answered with success, and there is one at least."""
    before = requests_by_status(server)
    yield
    after = requests_by_status(server)
    new = {status: count - before.get(status, 0) for status, count in after.items() if count != before.get(status, 0)}
    assert set(new) == {"2xx"}, new


@pytest.mark.usefixtures("answered")
def test_claude_code(server: Server, project: Path) -> None:
    command = [str(CLIENTS / "node_modules/.bin/claude"), "-p", TASK, "--output-format", "json", "--max-turns", "3"]
    command += ["--permission-mode", "acceptEdits", "--allowedTools", "Edit,Read,Write"]
    environment = {
        "ANTHROPIC_BASE_URL": server.url,
        "ANTHROPIC_AUTH_TOKEN": "none",
        "ANTHROPIC_MODEL": MODEL,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "300",
    }
    result = json.loads(run(command, project, environment))
    assert not result["is_error"]
    assert result["usage"]["output_tokens"] > 0


@pytest.mark.usefixtures("answered")
def test_codex(server: Server, project: Path) -> None:
    home = project.parent / "home/.codex"
    home.mkdir()
    (home / "config.toml").write_text(
        f'model = "{MODEL}"\nmodel_provider = "octavo"\n[model_providers.octavo]\nname = "octavo"\n'
        f'base_url = "{server.url}/v1"\nwire_api = "responses"\n'
    )
    command = [str(CLIENTS / "node_modules/.bin/codex"), "exec", "--json", "--sandbox", "workspace-write", TASK]
    events = [json.loads(line) for line in run(command, project, {}).splitlines() if line.startswith("{")]
    assert events[-1]["type"] == "turn.completed"
    assert events[-1]["usage"]["output_tokens"] > 0


@pytest.mark.usefixtures("answered")
def test_opencode(server: Server, project: Path) -> None:
    options = {"baseURL": f"{server.url}/v1", "apiKey": "none"}
    models = {MODEL: {"name": MODEL, "limit": {"context": 32768, "output": 300}}}
    provider = {"npm": "@ai-sdk/openai-compatible", "name": "octavo", "options": options, "models": models}
    (project / "opencode.json").write_text(json.dumps({"provider": {"octavo": provider}}))
    command = [str(CLIENTS / "node_modules/.bin/opencode"), "run", "-m", f"octavo/{MODEL}", "--format", "json", TASK]
    events = [json.loads(line) for line in run(command, project, {}).splitlines() if line.startswith("{")]
    assert events[-1]["type"] == "step_finish"


@pytest.mark.usefixtures("answered")
def test_aider(server: Server, project: Path) -> None:
    command = [str(CLIENTS / "aider/bin/aider"), "--model", f"openai/{MODEL}", "--no-git", "--yes-always"]
    command += ["--no-show-model-warnings", "--no-check-update", "--analytics-disable", "--no-pretty"]
    command += ["--message", TASK, "calc.py"]
    said = run(command, project, {"OPENAI_API_BASE": f"{server.url}/v1", "OPENAI_API_KEY": "none"})
    assert "Applied edit to calc.py" in said or "def add" in said


@pytest.mark.usefixtures("answered")
def test_continue(server: Server, project: Path) -> None:
    config = project.parent / "config.yaml"
    model = {"name": "octavo", "provider": "openai", "model": MODEL, "apiBase": f"{server.url}/v1", "apiKey": "none"}
    config.write_text(json.dumps({"name": "octavo", "version": "1.0.0", "schema": "v1", "models": [model]}))
    command = [str(CLIENTS / "node_modules/.bin/cn"), "-p", TASK, "--config", str(config), "--auto", "--format", "json"]
    assert json.loads(run(command, project, {}))["status"] == "success"
