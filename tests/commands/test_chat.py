"""`octavo chat`: one answer for a pipe, and a conversation at a real (pseudo-)terminal."""

from __future__ import annotations

import asyncio
import io
import signal
import sys
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import httpx
import pytest
from scripted_server import (
    DONE,
    HANG_UP,
    STREAM_HEAD,
    Asked,
    Script,
    ScriptedServer,
    byte_by_byte,
    chunk,
    delta,
    event,
    serving,
    stream,
    whole,
)
from terminal import CTRL_C, CTRL_D, terminal

from octavo.cli import main
from octavo.own_server import OwnServer


def answered(*pieces: str, finish_reason: str = "stop") -> list[bytes]:
    """A streamed answer as vLLM and octavo frame it."""
    opening = event(delta(role="assistant", content=""))
    return stream([opening, *(event(delta(content=piece)) for piece in pieces), event(delta(finish_reason)), DONE])


def model_and(answer: Script) -> Script:
    def script(asked: Asked) -> AsyncIterator[bytes] | Iterable[bytes]:
        return whole({"data": [{"id": "some/model"}]}) if asked.path == "/v1/models" else answer(asked)

    return script


def chat(server: ScriptedServer, *options: str) -> int:
    return main(["chat", "--url", server.url, *options])


def test_one_answer_is_all_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """Byte by byte, with characters of several bytes, and a line separator that is no end of a line."""
    pieces = ("Grüße, ", "世界\n", "a\u2028b 🙂", "")
    with serving(model_and(lambda _: byte_by_byte(answered(*pieces)))) as server:
        assert chat(server, "Who?") == 0
        asked = server.asked[-1]
    assert capsys.readouterr() == ("Grüße, 世界\na\u2028b 🙂\n", "")
    assert asked.path == "/v1/chat/completions"
    assert asked.json == {"model": "some/model", "messages": [{"role": "user", "content": "Who?"}], "stream": True}
    assert "authorization" not in asked.headers


def test_options_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "from-the-environment")
    options = ["--system", "Be brief.", "--temperature", "0", "--top-p", "0.5", "--max-tokens", "7", "--seed", "0"]
    with serving(model_and(lambda _: answered("yes"))) as server:
        assert chat(server, *options, "--model", "another", "Who?") == 0
        assert main(["chat", "--url", server.url + "/v1/", "--api-key", "given", "Who?"]) == 0
        first, *_, last = server.asked
    assert first.headers["authorization"] == "Bearer from-the-environment"
    assert last.headers["authorization"] == "Bearer given"
    assert first.json == {
        "model": "another",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}],
        "stream": True,
        "temperature": 0,
        "top_p": 0.5,
        "max_tokens": 7,
        "seed": 0,
    }


def test_the_question_may_come_from_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(model_and(lambda _: answered("yes\n"))) as server:
        monkeypatch.setattr(sys, "stdin", io.StringIO("several\nlines\n"))
        assert chat(server) == 0
        assert server.asked[-1].json["messages"] == [{"role": "user", "content": "several\nlines"}]
        assert capsys.readouterr() == ("yes\n", "")
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
        assert chat(server) == 1
        assert "no question: stdin is empty" in capsys.readouterr().err


def test_reasoning_is_no_part_of_the_one_answer(capsys: pytest.CaptureFixture[str]) -> None:
    events = [delta(role="assistant"), delta(reasoning_content="Hm. "), delta(reasoning="So."), delta(content="Yes.")]
    with serving(model_and(lambda _: stream([*map(event, events), event(delta("stop")), DONE]))) as server:
        assert chat(server, "Who?") == 0
    assert capsys.readouterr() == ("Yes.\n", "")


def test_an_answer_that_is_cut_off_says_so_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(model_and(lambda _: answered("Once upon", finish_reason="length"))) as server:
        assert chat(server, "Tell") == 0
    out, err = capsys.readouterr()
    assert out == "Once upon\n"
    assert "cut off at the limit of tokens" in err


@pytest.mark.parametrize(
    ("answer", "out", "err"),
    [
        (whole({"error": {"message": "too\nlong", "type": "x"}}, "400 Bad Request"), "", "HTTP 400: too long"),
        (whole({"detail": "Not Found"}, "404 Not Found"), "", "HTTP 404: Not Found"),
        (
            stream([event(delta(content="Well")), event({"error": {"message": "the engine died"}}), DONE]),
            "Well\n",
            "the engine died",
        ),
        (stream([event(delta(content="Well"))]), "Well\n", "the connection ended before the answer did"),
        (stream([b"data: [1]\n\n"]), "", "the server sent an event that is no JSON object: [1]"),
    ],
)
def test_errors_are_one_line(answer: list[bytes], out: str, err: str, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(model_and(lambda _: answer)) as server:
        assert chat(server, "Who?") == 1
    assert capsys.readouterr() == (out, f"octavo chat: {err}\n")


def test_a_connection_that_breaks_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(model_and(lambda _: [*answered("Well", "no")[:3], HANG_UP])) as server:
        assert chat(server, "Who?") == 1
        url = server.url
    out, err = capsys.readouterr()
    assert out == "Well\n"
    assert err.startswith(f"octavo chat: {url}: ")
    assert err.count("\n") == 1
    assert main(["chat", "--url", url, "Who?"]) == 1  # nobody is there any more
    assert "Connection refused" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--url", "127.0.0.1:8000", "Who?"], "is not a URL"),
        (["--url", "http://127.0.0.1:port", "Who?"], "octavo chat: http://127.0.0.1:port: Invalid port"),
        (["--url", "http://127.0.0.1:1", "model", "Who?"], "one or the other"),
        (["--url", "http://127.0.0.1:1", "--dtype", "int8", "Who?"], "--dtype is for a MODEL that is served here"),
    ],
)
def test_arguments_that_exclude_each_other_are_refused(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", *arguments]) == 1
    assert reason in capsys.readouterr().err


def test_the_flags_of_its_server_are_checked_before_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["chat", str(tmp_path), "--dtype", "int5", "Who?"])
    assert "argument --dtype: invalid choice: 'int5'" in capsys.readouterr().err


def test_a_conversation() -> None:
    """History, commands, an answer that Ctrl-C stops, an error that leaves no trace, and Ctrl-C twice to end."""

    async def answer(asked: Asked) -> AsyncIterator[bytes]:
        question = asked.json["messages"][-1]["content"]
        if question == "Go on for ever":
            yield STREAM_HEAD + chunk(event(delta(content="For ever and")))
            await asyncio.Event().wait()
        refused = whole({"error": {"message": "not that"}}, "400 Bad Request")
        for piece in refused if question == "Bad" else answered(f"You said: {question}\x1b[31m."):
            yield piece

    def messages() -> list[str]:
        return [message["content"] for message in server.asked[-1].json["messages"]]

    with serving(model_and(answer)) as server, terminal("chat", "--url", server.url, "--system", "Be kind.") as at:
        at.wait_for("some/model. /help tells the commands")
        at.press("Hello\n")
        assert "\x1b" not in at.wait_for("You said: Hello[31m.\n")  # a model doesn't steer the terminal
        at.wait_for("> ")
        at.press("Go on for ever\n")
        at.wait_for("For ever and")
        at.press(CTRL_C)
        at.wait_for("(stopped)\n")
        assert server.asked[-1].hung_up.wait(10)
        at.wait_for("> ")
        at.press("Bad\n")
        at.wait_for("octavo chat: HTTP 400: not that; the question is not part of the conversation\n")
        at.wait_for("> ")
        at.press("/system Be brief.\n")
        at.wait_for("system: Be brief.\n")
        at.press("/nonsense\n")
        at.wait_for("there is no /nonsense")
        at.press("Next\n")
        at.wait_for("You said: Next[31m.\n")
        said = ["Hello", "You said: Hello\x1b[31m.", "Go on for ever", "For ever and"]
        assert messages() == ["Be brief.", *said, "Next"]
        at.press("/clear\n/system -\n")
        at.wait_for("there is no system text")
        at.press("/etc/hosts?\n")  # no command
        at.wait_for("You said: /etc/hosts?")
        assert messages() == ["/etc/hosts?"]
        at.wait_for("> ")
        at.press(CTRL_C)
        at.wait_for("Ctrl-C again ends")
        at.wait_for("> ")
        at.press("/help\n")
        at.wait_for("/exit ")
        at.wait_for("> ")
        at.press(CTRL_C)
        at.wait_for("Ctrl-C again ends")  # the /help between them made it the first again
        at.wait_for("> ")
        at.press(CTRL_C)
        assert at.end() == 0


def test_a_model_is_served_for_the_conversation_only(fixtures: Path) -> None:
    """From start to Ctrl-D; the address is found in the server's own command line."""
    with terminal("chat", str(fixtures / "tiny"), "--dtype", "float32", "--max-tokens", "5") as at:
        at.wait_for("/help tells the commands")
        (child,) = _children(at.process.pid)
        words = Path(f"/proc/{child}/cmdline").read_text().split("\0")
        assert words[words.index("--dtype") + 1] == "float32"
        port = words[words.index("--port") + 1]
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
        assert httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 401  # it is no one else's
        at.wait_for("> ")
        at.press("the file\n")
        at.wait_for("(cut off at the limit of tokens)")
        at.wait_for("> ")
        at.press(CTRL_D)
        assert at.end() == 0
        assert not Path(f"/proc/{child}").exists()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://127.0.0.1:{port}/health")


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_model_that_cannot_be_served_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(tmp_path / "nowhere"), "--dtype", "float32", "Who?"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "the server ended with code 1; the end of its log:\n" in err
    assert "no such directory" in err


def test_the_server_goes_when_chat_is_told_to_end(fixtures: Path) -> None:
    """SIGTERM while it is still starting."""
    with terminal("chat", str(fixtures / "tiny"), TERM="xterm") as at:
        at.wait_for("octavo serve")  # the line of what is under way: the child is there
        (child,) = _children(at.process.pid)
        at.process.send_signal(signal.SIGTERM)
        assert at.end() == 128 + signal.SIGTERM
        assert not Path(f"/proc/{child}").exists()


def test_octavo_serves_octavo_chat(octavo_server: OwnServer, capsys: pytest.CaptureFixture[str]) -> None:
    """The streamed answer is the one that the server gives whole."""
    question = {"role": "user", "content": "the value of the argument is"}
    body = {"messages": [question], "temperature": 0, "max_tokens": 24}
    headers = {"Authorization": f"Bearer {octavo_server.api_key}"}
    whole_answer = httpx.post(f"{octavo_server.url}/v1/chat/completions", json=body, headers=headers, timeout=60).json()
    options = ("--temperature", "0", "--max-tokens", "24", "--api-key", octavo_server.api_key)
    assert main(["chat", "--url", octavo_server.url, *options, question["content"]]) == 0
    printed = capsys.readouterr().out
    assert printed.rstrip("\n") == whole_answer["choices"][0]["message"]["content"].rstrip("\n")
    assert len(printed) > 20
    assert main(["chat", "--url", octavo_server.url, "--api-key", "wrong", "Who?"]) == 1
    assert capsys.readouterr().err.startswith("octavo chat: HTTP 401: ")
