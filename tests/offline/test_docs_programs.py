"""The programs of docs/offline.md run, on a tiny model with a long context; its answers are nonsense.

What is proved is that each call is there and takes what it is given, that files are written, and that what must be JSON
of a schema is.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import documented
import pytest
from octavo_server import TINY

import octavo
from octavo import LLM, AsyncLLM

PAGE = "docs/offline.md"
PROGRAMS = documented.code_of(PAGE, "python")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with room for a schema's answer."""
    out = tmp_path_factory.mktemp("offline") / "model"
    shutil.copytree(TINY, out)
    config = json.loads((out / "config.json").read_text("utf-8")) | {"max_position_embeddings": 2048}
    (out / "config.json").write_text(json.dumps(config), "utf-8")
    return out


@pytest.mark.parametrize("text", PROGRAMS, ids=lambda text: text.split("\n\n")[0].replace("\n", ";"))
def test_a_program_runs(
    text: str,
    model: Path,
    small: dict[str, Any],
    forked: None,  # noqa: ARG001
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class SmallLLM(LLM):
        def __init__(self, name: str, **options: Any) -> None:
            super().__init__(name, **small | options)

    class SmallAsyncLLM(AsyncLLM):
        def __init__(self, name: str, **options: Any) -> None:
            super().__init__(name, **small | options)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(octavo, "LLM", SmallLLM, raising=False)
    monkeypatch.setattr(octavo, "AsyncLLM", SmallAsyncLLM, raising=False)
    articles = [{"text": "An article about copper."}, {"text": "One " + "that is long. " * 900}]
    Path("articles.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in articles), "utf-8")
    assert text.count('"MODEL"') == 1
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(text.replace('"MODEL"', repr(str(model))), PAGE, "exec"), names)
    if isinstance(names.get("llm"), LLM):
        names["llm"].close()
    if "summaries.jsonl" in text:
        lines = [json.loads(line) for line in Path("summaries.jsonl").read_text("utf-8").splitlines()]
        assert [line["text"] for line in lines] == [article["text"] for article in articles]
    else:
        assert capsys.readouterr().out.count("\n") >= 2


def test_what_the_page_names_is_there() -> None:
    """Modules, and what is imported of them."""
    assert len(PROGRAMS) >= 4
    for names in re.findall(r"^from octavo import (.+)$", "\n".join(PROGRAMS), re.MULTILINE):
        assert set(names.split(", ")) <= set(octavo.__all__)
    methods = re.findall(r"^\| `(\w+)\(", (documented.ROOT / PAGE).read_text("utf-8"), re.MULTILINE)
    assert len(methods) >= 8
    assert all(hasattr(LLM, method) for method in methods)
