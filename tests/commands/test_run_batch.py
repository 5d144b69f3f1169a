"""`octavo run-batch`: a file of requests answered, and gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from octavo_server import SMALL, TINY

from octavo.cli import main

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "max_tokens": 8}


def written(file: Path, **lines: Any) -> Path:
    made = [{"custom_id": name, "method": "POST", "url": url, "body": body} for name, (url, body) in lines.items()]
    file.write_text("".join(json.dumps(line) + "\n" for line in made))
    return file


def run_batch(file: Path, output: Path, *flags: str) -> int:
    return main(["run-batch", "-i", str(file), str(TINY), *SMALL, "--output-file", str(output), *flags])


def test_a_file_is_answered_and_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines: dict[str, Any] = {
        "chat": ("/v1/chat/completions", CHAT),
        "text": ("/v1/completions", {"prompt": "The", "max_tokens": 3}),
        "items": ("/v1/responses", {"input": "Hi", "max_output_tokens": 3}),
        "wrong": ("/v1/completions", {"prompt": 5}),
        "named": ("/v1/completions", {"model": "mine", "prompt": "The", "max_tokens": 3}),
    }
    file = written(tmp_path / "in.jsonl", **lines)
    output = tmp_path / "out.jsonl"
    kept = b'{"custom_id": "chat", "response": null}\n'
    output.write_bytes(kept + b'{"custom_id": "text", "resp')  # its writer was killed
    assert run_batch(file, output, "--served-model-name", "mine", "--concurrency", "2") == 1
    assert "5 requests, of which 1 are answered already" in capsys.readouterr().err
    assert output.read_bytes().startswith(kept)
    found = {line["custom_id"]: line for line in map(json.loads, output.read_text().splitlines())}
    assert set(found) == set(lines)
    statuses = {name: line["response"]["status_code"] for name, line in found.items() if name != "chat"}
    assert statuses == {"text": 200, "items": 200, "wrong": 400, "named": 200}
    assert found["named"]["response"]["body"]["model"] == "mine"
    before = output.read_bytes()
    assert run_batch(file, output, "--no-such-flag") == 0  # nothing is left to do, so no server is started
    assert output.read_bytes() == before


def test_what_can_t_be_answered_is_told_before_a_server_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    url = "/v1/chat/completions"
    file = written(tmp_path / "in.jsonl", a=(url, CHAT), b=(url, {"stream": True}))
    wrong = {file.read_text(): "line 2: body.stream", "": "no request in it", "{": "line 1: it is not"}
    for content, says in wrong.items():
        file.write_text(content)
        assert run_batch(file, output) == 1
        assert f"{file}: " in (told := capsys.readouterr().err)
        assert says in told
    assert run_batch(tmp_path / "none", output) == 1
    assert capsys.readouterr().err == f"octavo run-batch: {tmp_path / 'none'}: No such file or directory\n"
    written(file, a=(url, CHAT))
    assert run_batch(file, output, "--port", "80") == 1
    assert "--port" in capsys.readouterr().err
    output.write_text('{"custom_id": "z"}\n')
    assert run_batch(file, output) == 1
    assert "it answers 'z'" in capsys.readouterr().err


def test_a_server_that_can_t_start_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path / "in.jsonl", a=("/v1/chat/completions", CHAT))
    assert run_batch(file, tmp_path / "out.jsonl", "--dtype", "float7") == 1
    assert "float7" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["run-batch", "--help"])
    assert "octavo serve" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["run-batch", str(TINY)])
    assert "-i/--input-file" in capsys.readouterr().err
