"""Two keys, of which one floods: the other's request is not held up by what waits."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from octavo_server import PATIENCE, serving

pytestmark = pytest.mark.long

PATH = "/v1/completions"
BODY = {"prompt": "The capital of", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
FLOOD = 60


async def flooded(url: str, first: dict[str, Any], second: dict[str, Any]) -> tuple[int, str]:
    """(how many of the first one's requests had been answered when the second's was, that answer's text)."""
    done = 0

    async def ask(client: httpx.AsyncClient, fields: dict[str, Any]) -> str:
        nonlocal done
        answer = await client.post(
            PATH, json=BODY | fields["body"], headers={"Authorization": f"Bearer {fields['key']}"}
        )
        assert answer.status_code == 200, answer.text
        if fields is first:
            done += 1
        return answer.json()["choices"][0]["text"]

    limits = httpx.Limits(max_connections=FLOOD + 2)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits) as client:
        flood = [asyncio.ensure_future(ask(client, first)) for _ in range(FLOOD)]
        while done < 2:  # the queue is there
            await asyncio.sleep(0.001)
        text = await ask(client, second)
        before = done
        await asyncio.gather(*flood)
    return before, text


@pytest.mark.parametrize(
    ("flags", "first", "second", "is_fair"),
    [
        ((), {"key": "a", "body": {}}, {"key": "b", "body": {}}, True),
        (("--fair-by", "user"), {"key": "a", "body": {"user": "x"}}, {"key": "a", "body": {"user": "y"}}, True),
        (("--fair-by", "none"), {"key": "a", "body": {}}, {"key": "b", "body": {}}, False),
    ],
)
def test_a_flood_holds_up_nobody_else(
    flags: tuple[str, ...], first: dict[str, Any], second: dict[str, Any], is_fair: bool
) -> None:
    with serving("--api-key", "a", "b", "--max-num-seqs", "2", *flags) as server:
        before, text = asyncio.run(flooded(server.url, first, second))
        alone = httpx.post(server.url + PATH, json=BODY, headers={"Authorization": "Bearer a"}, timeout=PATIENCE)
    assert text == alone.json()["choices"][0]["text"]
    assert (before < FLOOD / 2) is is_fair
