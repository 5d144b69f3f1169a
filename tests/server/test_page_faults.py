"""The page in a real browser when things go wrong: streams that break off, keys that are refused, models without end.

Slow: as tests/server/test_page_browser.py, whose needs and `make test-page` these share. Where a fault has to come at
one moment, the browser's `fetch` answers with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from octavo_server import Server, serving

pytestmark = pytest.mark.slow

CHUNK = 'data: {"choices": [{"delta": {"content": "Grüße"}}]}\n\n'
ODD = len(CHUNK[: CHUNK.index("ü")].encode()) + 1  # within a letter of two bytes
STREAM = """
const given = [...arguments];
const bytes = new TextEncoder().encode(given[0]);
window.fetch = async (url, options = {}) => new Response(new ReadableStream({
  start(controller) {
    controller.enqueue(bytes.slice(0, given[1]));
    controller.enqueue(bytes.slice(given[1]));
    if (given[2] === "closed") controller.close();
    if (given[2] === "torn") setTimeout(() => controller.error(new TypeError("network error")), 50);
    options.signal?.addEventListener("abort", () => controller.error(new DOMException("", "AbortError")));
  },
}));
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--served-model-name", "tiny") as server:
        yield server


@pytest.fixture(scope="module")
def window() -> Iterator[Any]:
    from browsing import browsing  # selenium is in the extra `browser`

    with browsing("desktop") as page:
        yield page


@pytest.fixture
def page(window: Any, server: Server) -> Any:
    window.open(f"{server.url}/")
    window.script("sessionStorage.clear(); localStorage.clear();")
    fresh(window, f"{server.url}/")
    return window


def fresh(page: Any, url: str) -> None:
    page.open(url)
    page.wait(lambda: page.one("#model").get_attribute("value") == "tiny")


def conversation(page: Any) -> list[dict[str, Any]]:
    kept: list[dict[str, Any]] = json.loads(page.script("return sessionStorage.getItem('octavo.conversation') ?? '[]'"))
    return kept


def test_a_new_chat_knows_nothing_of_the_answer_before(page: Any) -> None:
    page.set("max_tokens", "5")
    page.script(
        """const say = (text) => {
          document.getElementById("prompt").value = text;
          document.getElementById("composer").requestSubmit();
        };
        say("first");
        document.getElementById("new-chat").click();
        say("second");"""
    )
    page.wait(lambda: len(conversation(page)) > 1 and page.one("#send").is_displayed())
    assert [message["role"] for message in conversation(page)] == ["user", "assistant"]
    assert conversation(page)[0]["content"] == "second"
    assert len(page.all(".message.assistant")) == 1


@pytest.mark.parametrize("end", ["closed", "torn"])
def test_an_answer_that_breaks_off_is_kept_and_said_to(page: Any, end: str) -> None:
    page.script(STREAM, CHUNK, ODD, end)
    page.say("Hello")
    answer = page.answer()
    assert answer.find_element("css selector", ".prose").text == "Grüße"
    assert "broke off" in answer.find_element("css selector", ".stats").text
    assert "broke off" in page.one("#notice").text
    assert [message["content"] for message in conversation(page)] == ["Hello", "Grüße"]


def test_a_refused_message_comes_back_beside_what_was_typed_since(page: Any) -> None:
    page.script(
        """window.fetch = () => new Promise((done) => {
          window.refuse = () => done(new Response("Too busy", {status: 429}));
        });"""
    )
    page.say("first")
    page.one("#prompt").send_keys("second")
    page.script("refuse()")
    page.wait(lambda: "Too busy" in page.one("#notice").text)
    assert page.one("#prompt").get_attribute("value") == "first\nsecond"
    assert conversation(page) == []
