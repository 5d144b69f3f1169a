"""Chat templates that take too much time, memory or output: the request is told, and nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import httpx
import pytest
from octavo_server import TINY, Server, said_at_once, serving, wait_until

from octavo.server import template_renderer
from octavo.server.template_renderer import TemplateRenderer
from octavo.text.chat_template import ChatTemplate, TemplateLimitError
from octavo.text.template_process import Job

pytestmark = pytest.mark.long

SPIN = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
GROW = "{% set x = messages[0].content * 9999999999 %}"  # refused at once: filling 1 GiB can take 5 s
WRITE = "{% for i in range(99999) %}{{ messages[0].content * 1000 }}{% endfor %}"
BOMBS = {"spin": (SPIN, "5 s"), "grow": (GROW, "1024 MiB"), "write": (WRITE, "4194304 characters")}
TEMPLATE = (
    "".join(f"{{% if messages[0].content == '{name}' %}}{bomb}{{% endif %}}" for name, (bomb, _) in BOMBS.items())
    + "{{ messages[0].content }}"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    file = tmp_path_factory.mktemp("template") / "bombs.jinja"
    file.write_text(TEMPLATE)
    with serving("--chat-template", str(file), "--trust-request-chat-template") as running:
        yield running


def ask(server: Server, content: str, **fields: Any) -> httpx.Response:
    with server.client() as client:
        return client.post("/tokenize", json={"messages": [{"role": "user", "content": content}]} | fields)


def peak_bytes(pid: int) -> int:
    """The most memory that the process ever had."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def check_refusal(refused: httpx.Response, limit: str, is_the_requests: bool) -> None:
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert limit in error["message"]
    assert ("the request's chat_template" if is_the_requests else "bombs.jinja") in error["message"]
    assert error["param"] == ("chat_template" if is_the_requests else "messages")


@pytest.mark.parametrize(
    ("name", "is_the_requests"), [("grow", False), ("write", False), ("grow", True), ("write", True)]
)
def test_a_limit_is_told_and_the_next_request_served(server: Server, name: str, is_the_requests: bool) -> None:
    bomb, limit = BOMBS[name]
    refused = ask(server, "x", chat_template=bomb) if is_the_requests else ask(server, name)
    check_refusal(refused, limit, is_the_requests)
    fields = {"chat_template": "{{ messages[0].content }}"} if is_the_requests else {}
    assert ask(server, "after", **fields).json()["tokens"] == ask(server, "after").json()["tokens"]
    assert peak_bytes(server.process.pid) < 1 << 30


def test_others_are_served_while_a_request_s_template_spins(server: Server) -> None:
    answers: list[str] = []
    refusals: list[httpx.Response] = []

    def spin() -> None:
        refusals.append(ask(server, "x", chat_template=SPIN))
        answers.append("spin")

    thread = threading.Thread(target=spin)
    thread.start()
    with server.client() as client:
        for _ in range(20):
            assert client.get("/health").status_code == 200
    assert ask(server, "hello").status_code == 200
    answers.append("others")
    thread.join()
    assert answers == ["others", "spin"]
    check_refusal(refusals[0], BOMBS["spin"][1], is_the_requests=True)
    after = ask(server, "after", chat_template="{{ messages[0].content }}")
    assert after.json()["tokens"] == ask(server, "after").json()["tokens"]


def child_ticks(pid: int) -> int:
    """The CPU time of a server's children that live, the engine's among them."""
    ticks = 0
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(FileNotFoundError):
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks


def test_sigterm_ends_a_server_whose_template_spins() -> None:
    answers: list[httpx.Response] = []
    with serving("--chat-template", SPIN, "--shutdown-timeout", "0") as server:
        ticks = child_ticks(server.process.pid)
        thread = threading.Thread(target=lambda: answers.append(ask(server, "x")))
        thread.start()
        wait_until(lambda: child_ticks(server.process.pid) > ticks + 50)
        server.send_signal(signal.SIGTERM)
        assert server.exit_code() == 0
        thread.join()
    assert answers[0].status_code == 503
    assert "shutting down" in answers[0].json()["error"]["message"]
    assert "Traceback" not in server.said


def test_a_template_that_can_not_be_compiled_does_not_start(tmp_path: Path) -> None:
    model = Path(copytree(TINY, tmp_path / "model"))
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "x\n{% for %}"}))
    said = said_at_once(str(model), "--port", "0")
    assert f"{model}: tokenizer_config.json, chat_template, line 2: " in said
    assert "--chat-template" in said
    file = tmp_path / "mine.jinja"
    file.write_text("{{ 1 }}\n\n{{ messages | no_such_filter }}")
    assert f"--chat-template {file}, line 3: " in said_at_once(str(TINY), "--port", "0", "--chat-template", str(file))


def test_the_model_s_own_template_has_a_limit_too_and_the_next_conversation_is_rendered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(template_renderer, "RENDER_SECONDS", 2)
    renderer = TemplateRenderer(ChatTemplate.open(TINY, {}, TEMPLATE))
    renderer.start()

    async def rendered() -> str:
        try:
            with pytest.raises(TemplateLimitError, match=r"longer than 2 s|exceeded 2 s of CPU time"):
                await renderer.render(renderer.request(Job([{"role": "user", "content": "spin"}], 1000)))
            return await renderer.render(renderer.request(Job([{"role": "user", "content": "after"}], 1000)))
        finally:
            renderer.stop("the test ends")
            await asyncio.sleep(0)  # the socket is closed in the next turn of the loop

    assert asyncio.run(rendered()) == "after"


def test_constants_that_take_too_long_to_compute_are_refused_before_anybody_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """jinja2 computes them when it compiles."""
    monkeypatch.setattr(template_renderer, "RENDER_SECONDS", 1)
    renderer = TemplateRenderer(ChatTemplate.open(TINY, {}, "{{ 99999999 ** 99999999 }}"))
    renderer.start()
    try:
        with pytest.raises(TemplateLimitError, match="exceeded 1 s of CPU time"):
            asyncio.run(renderer.check())
    finally:
        renderer.stop("the test ends")
