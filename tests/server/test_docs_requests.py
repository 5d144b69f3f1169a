"""The requests that the README and docs/ show, curl's and those of Python programs, are sent to a served tiny model.

Its answers are nonsense, and may be cut at the end of its context before a schema is fulfilled; what is proved is that
the server takes the request, and that an answer which is whole obeys its schema.
"""

from __future__ import annotations

import argparse
import io
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import documented
import httpx
import jsonschema
import numpy as np
import openai
import pytest
import soundfile
import tiny_whisper
from documented import Command
from octavo_server import Server, serving
from tiny_encoders import SentenceModel

import octavo.lang

ADDRESS = re.compile(r"(?:http://)?(?:localhost|127\.0\.0\.1):8000")
CURLS = [c for page in documented.pages() for c in documented.commands(page) if c.program == "curl"]
PROGRAMS = [
    (page, text) for page in documented.pages() for text in documented.code_of(page, "python") if ADDRESS.search(text)
]


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """The server of docs/pooling.md."""
    model = SentenceModel(tmp_path_factory.mktemp("sentence")).directory
    with serving("--served-model-name", "tiny", model=model) as server, server.client() as client:
        yield client


@pytest.fixture(scope="module")
def hearing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """The server of docs/speech.md."""
    model = tmp_path_factory.mktemp("whisper")
    tiny_whisper.make_whisper(model)
    with serving("--served-model-name", "tiny", model=model) as server, server.client() as client:
        yield client


def recording() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.sin(np.arange(8000) / 8), 16000, format="WAV")
    return file.getvalue()


SERVERS = {"docs/pooling.md": "pooled", "docs/speech.md": "hearing"}


@pytest.mark.parametrize("command", CURLS, ids=lambda c: f"{c.page}:{c.line}")
def test_a_curl_is_answered(request: pytest.FixtureRequest, command: Command) -> None:
    client: httpx.Client = request.getfixturevalue(SERVERS.get(command.page, "client"))
    curl = argparse.ArgumentParser(exit_on_error=False)
    curl.add_argument("url")
    curl.add_argument("-H", "--header", action="append", default=[])
    curl.add_argument("-d", "--data")
    curl.add_argument("-F", "--form", action="append", default=[])
    curl.add_argument("-N", "--no-buffer", action="store_true")
    args = curl.parse_args(command.words[1:])
    found = ADDRESS.match(args.url)
    assert found, f"{args.url} is not that of the docs' server"
    headers = dict(header.split(": ", 1) for header in args.header)
    path = args.url[found.end() :]
    if args.form:
        fields = dict(field.split("=", 1) for field in args.form)
        assert fields.pop("file").startswith("@")
        assert client.post(path, data=fields, files={"file": recording()}).status_code == 200
        return
    if args.data is None:
        assert client.get(path, headers=headers).status_code == 200
        return
    response = client.post(path, headers=headers, content=args.data.replace('"MODEL"', '"tiny"'))
    assert response.status_code == 200, response.text
    asked = json.loads(args.data)
    if asked.get("response_format", {}).get("type") == "json_schema":
        choice = response.json()["choices"][0]
        if choice["finish_reason"] == "stop":
            jsonschema.validate(
                json.loads(choice["message"]["content"]), asked["response_format"]["json_schema"]["schema"]
            )


@pytest.mark.parametrize(("page", "text"), PROGRAMS, ids=[page for page, _ in PROGRAMS])
def test_a_program_runs(server: Server, page: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a directory of its own, where the file of texts is that it may read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"Text {i}."}) + "\n" for i in range(3)), "utf-8")
    program = re.sub('"(MODEL|OUT)"', '"tiny"', ADDRESS.sub(server.url, text))
    names: dict[str, object] = {"__name__": "__main__"}
    try:
        with suppress(openai.LengthFinishReasonError):  # the client's word for an answer that ended with the context
            exec(compile(program, page, "exec"), names)
    finally:
        octavo.lang.set_default_backend(None)  # which is the whole process's
        for each in names.values():  # a program's end closes its clients
            if isinstance(each, openai.OpenAI | httpx.Client):
                each.close()


def test_there_are_requests() -> None:
    assert CURLS
    assert PROGRAMS
