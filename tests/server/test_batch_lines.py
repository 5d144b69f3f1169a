"""Lines of a batch: which are requests, what is written for them, and what a killed writer leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from octavo.server.batch_lines import Line, LineError, answer_line, done_ids, error_line, lines_of

URLS = {"/v1/chat/completions", "/v1/responses"}
LINE: dict[str, Any] = {"custom_id": "a", "method": "POST", "url": "/v1/responses", "body": {"input": "Hi"}}


def written(file: Path, *lines: Any) -> Path:
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def test_lines_are_requests(tmp_path: Path) -> None:
    other = LINE | {"custom_id": "b", "url": "/v1/chat/completions"}
    found = list(lines_of(written(tmp_path / "in", LINE, "", other), URLS))
    assert found == [
        Line(1, "a", "/v1/responses", {"input": "Hi"}),
        Line(3, "b", "/v1/chat/completions", {"input": "Hi"}),
    ]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("{", "invalid_json_line"),
        ("[]", "invalid_json_line"),
        (LINE | {"custom_id": 5}, "missing_required_parameter"),
        (LINE | {"custom_id": ""}, "missing_required_parameter"),
        (LINE | {"custom_id": "first"}, "duplicate_custom_id"),
        (LINE | {"method": "GET"}, "invalid_method"),
        (LINE | {"url": "/metrics"}, "invalid_url"),
        (LINE | {"url": []}, "invalid_url"),
        (LINE | {"body": "x"}, "missing_required_parameter"),
        (LINE | {"body": {"stream": True}}, "invalid_request"),
        (LINE | {"body": {"background": True}}, "invalid_request"),
        (LINE | {"priority": 1}, "invalid_request"),
    ],
)
def test_what_is_no_request_is_named_with_its_line(tmp_path: Path, line: Any, code: str) -> None:
    lines = lines_of(written(tmp_path / "in", LINE | {"custom_id": "first"}, line), URLS)
    assert next(lines).custom_id == "first"
    with pytest.raises(LineError, match=r"^line 2: ") as caught:
        next(lines)
    assert (caught.value.code, caught.value.as_json()["line"]) == (code, 2)


def test_an_output_tells_what_is_done(tmp_path: Path) -> None:
    file = tmp_path / "out"
    assert done_ids(file) == set()
    whole = answer_line(Line(1, "a", "/", {}), 200, "r", {"x": 1}) + error_line("b", "batch_expired", "late")
    file.write_bytes(whole + b'{"custom_id": "c", "resp')
    assert done_ids(file) == {"a", "b"}
    assert file.read_bytes() == whole
    first, second = map(json.loads, whole.splitlines())
    assert (first["response"], first["error"]) == ({"status_code": 200, "request_id": "r", "body": {"x": 1}}, None)
    assert (second["response"], second["error"]["code"]) == (None, "batch_expired")
    written(file, "something else")
    with pytest.raises(ValueError, match="line 1 is no answer"):
        done_ids(file)
