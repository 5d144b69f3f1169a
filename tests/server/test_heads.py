"""A server with a head that knows nothing: its answers are another one's, on new weights too."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from made_heads import for_checkpoint
from octavo_server import TINY, Server, serving, tokens_of
from tiny_oracle import Oracle

WORDS = "one two three one two three one two three one two"
BODY = {"prompt": WORDS, "max_tokens": 60, "ignore_eos": True, "return_token_ids": True}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": WORDS}], "max_tokens": 30}
REGEX = {"structured_outputs": {"regex": "(one|two|three)( (one|two|three)){9}"}}
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", BODY | {"temperature": 0}),
    ("/v1/completions", BODY | {"temperature": 0.5, "seed": 4, "n": 3}),
    ("/v1/completions", BODY | {"temperature": 0, "stop": ["e", "o"], "min_tokens": 4}),
    ("/v1/chat/completions", CHAT | {"temperature": 0, "frequency_penalty": 0.1}),
    ("/v1/chat/completions", CHAT | {"temperature": 1, "seed": 1} | REGEX),
]


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    root = tmp_path_factory.mktemp("weights")
    shutil.copytree(TINY, root / "again")
    head = for_checkpoint(TINY).write(root / "head")
    flags = ("--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", str(head))
    flags += ("--speculative-num-steps", "3", "--per-request-spec-decode-metrics", "summary")
    with serving(*flags, "--served-model-name", "tiny", "--enable-weight-updates", "--weights-root", str(root)) as it:
        assert "speculation: eagle3, up to 3 drafts" in it.said
        assert "reads what layers 0, 1 of the model say" in it.said
        yield it, root


def test_answers_are_those_of_a_server_without(client: httpx.Client, drafting: tuple[Server, Path]) -> None:
    with drafting[0].client() as another:
        told = []
        for path, body in BODIES:
            found, expected = (it.post(path, json=body).json() for it in (another, client))
            assert found["choices"] == expected["choices"]
            told.append(found["metrics"])
    assert told[1] is None
    drafts = [it["speculative_decoding"]["num_draft_tokens"] for it in told if it is not None]
    assert max(drafts) > 0


def test_new_weights_come_with_the_head(oracle: Oracle, drafting: tuple[Server, Path]) -> None:
    ids = oracle.ids(WORDS)
    server, root = drafting
    with server.client() as client:
        told = client.post("/update_weights_from_disk", json={"model_path": str(root / "again")}).json()
        assert told["success"], told
        assert tokens_of(client, ids, 20) == oracle.greedy(ids, 20)
