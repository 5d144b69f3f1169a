"""The page in a real browser when things go wrong: streams that break off, keys that are refused, models without end.

Slow: as tests/server/test_page_browser.py, whose needs and `make test-page` these share. Where a fault has to come at
one moment, the browser's `fetch` answers with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from octavo_server import PATIENCE, Server, serving

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
FORBIDDEN = """
for (const name of ["sessionStorage", "localStorage"])
  Object.defineProperty(window, name, {get() { throw new DOMException("", "SecurityError"); }});
const real = window.fetch;
window.fetch = (url, options = {}) => {
  window.sent = options.headers?.Authorization ?? "";
  return real(url, options);
};
"""
AWAY = """
const real = window.fetch;
window.fails = 1;
window.fetch = async (...given) => {
  if (!window.fails) return real(...given);
  window.fails -= 1;
  throw new TypeError("Failed to fetch");
};
"""
REFUSED = """
const given = [...arguments];
window.asked = 0;
const soon = window.setInterval;
window.setInterval = (deed, _) => soon(deed, 20);
window.fetch = async () => {
  asked += 1;
  return given[0] ? new Response("{}", {status: 401}) : new Promise(() => {});
};
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


@contextmanager
def beforehand(page: Any, script: str) -> Iterator[None]:
    """With this script ahead of those of each page that is opened."""
    known = page.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})
    try:
        yield
    finally:
        page.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", known)


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


def test_a_text_is_copied_where_the_clipboard_is_forbidden(page: Any) -> None:
    page.script(
        """navigator.clipboard.writeText = async () => { throw new DOMException("", "NotAllowedError"); };
        document.addEventListener("copy", () => { window.copied = String(document.activeElement.value); });"""
    )
    page.script("document.getElementById('curl').click()")  # by nobody: not that way either
    page.wait(lambda: "does not let" in page.one("#notice").text)
    assert page.one("#status").get_attribute("textContent") != "Copied"
    page.one("#curl").click()
    page.wait(lambda: page.one("#status").get_attribute("textContent") == "Copied")
    assert page.script("return window.copied").startswith("curl ")


def test_the_page_works_where_the_browser_keeps_nothing(page: Any, server: Server) -> None:
    page.complaints()  # those of other tests
    with beforehand(page, FORBIDDEN):
        fresh(page, f"{server.url}/")
        pressed = page.one("#theme").get_attribute("aria-pressed")
        page.one("#theme").click()
        assert page.one("#theme").get_attribute("aria-pressed") != pressed
        page.one("#key-button").click()
        page.one("#key").send_keys("secret\ue007")
        page.wait(lambda: not page.one("#key-dialog").is_displayed())
        page.set("max_tokens", "4")
        page.say("Hello")
        page.answer()
        assert page.script("return window.sent") == "Bearer secret"
        page.one("#key-button").click()
        page.one("#key-forget").click()
        page.say("And again")
        page.answer(2)
        assert page.script("return window.sent") == ""
    fresh(page, f"{server.url}/")
    assert not page.all(".message")
    assert page.complaints() == []


def test_the_chosen_colors_are_kept(page: Any, server: Server) -> None:
    style = "return getComputedStyle(document.documentElement).colorScheme"
    page.one("#theme").click()
    chosen = page.script(style)
    assert chosen in ("light", "dark")
    fresh(page, f"{server.url}/")
    assert page.script(style) == chosen


def test_a_server_that_does_not_answer_at_first_is_asked_again(page: Any, server: Server) -> None:
    with beforehand(page, AWAY):
        fresh(page, f"{server.url}/")
        page.wait(lambda: not page.one("#notice").is_displayed())
        assert page.script("return window.fails") == 0
        assert "context holds" in page.one("#welcome-about").text


def test_a_seed_is_sent_as_it_was_typed_or_not_at_all(page: Any) -> None:
    """JavaScript's numbers are exact up to 2**53."""
    page.script("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    for seed in (2**53 - 1, 1 - 2**53, -7):
        page.set("seed", str(seed))
        page.script("window.copied = ''; document.getElementById('curl').click()")
        assert f'"seed":{seed},' in page.wait(lambda: page.script("return window.copied"))
    for seed in ("9007199254740993", "-9007199254740993", "0.5"):
        page.set("seed", seed)
        page.say("Hello")
        page.wait(lambda: "Seed" in page.one("#settings-error").text)
        assert page.one("#prompt").get_attribute("value") == "Hello"
        page.one("#prompt").clear()


def test_the_button_that_pauses_says_what_it_will_do(page: Any) -> None:
    page.script("location.hash = '#dashboard'")
    for name in ("Go on", "Pause"):
        page.one("#pause").click()
        assert page.one("#pause").accessible_name == name
        assert page.one("#pause").get_attribute("aria-pressed") is None  # which would say it a second time


def test_a_view_is_one_of_the_page_and_comparing_has_a_page_of_its_own(page: Any, server: Server) -> None:
    for path, view in {"?compare#chat": "compare", "#compare": "chat", "#constructor": "chat"}.items():
        fresh(page, f"{server.url}/{path}")
        shown = [each for each in page.all("section[data-view]") if each.is_displayed()]
        assert [each.get_attribute("data-view") for each in shown] == [view], path


def test_the_key_of_a_compared_server_goes_to_no_other(page: Any, server: Server) -> None:
    fresh(page, f"{server.url}/?compare")
    page.script(
        """window.sent = [];
        window.fetch = async (url, options) => {
          sent.push([new URL(url).host, options.headers.Authorization ?? ""]);
          return new Response('{"data": []}');
        };
        const [url, key] = document.querySelectorAll(".side")[1].querySelectorAll("input");
        for (const [field, value] of [[url, "one.test"], [key, "secret"], [url, "two.test"]]) {
          field.value = value;
          field.dispatchEvent(new Event("change"));
        }"""
    )
    assert page.wait(lambda: page.script("return sent.length > 2 && sent")) == [
        ["one.test", ""],
        ["one.test", "Bearer secret"],
        ["two.test", ""],
    ]


def test_models_are_those_of_the_server_that_was_named_last(page: Any, server: Server) -> None:
    fresh(page, f"{server.url}/?compare")
    page.script(
        """const replies = {};
        window.fetch = (url) => new Promise((done) => { replies[new URL(url).host] = done; });
        window.side = document.querySelectorAll(".side")[1];
        const url = side.querySelector("input");
        for (const value of ["slow.test", "quick.test"]) {
          url.value = value;
          url.dispatchEvent(new Event("change"));
        }
        for (const [host, after] of [["quick.test", 0], ["slow.test", 100]]) {
          const reply = new Response(JSON.stringify({data: [{id: host}]}));
          setTimeout(() => replies[host](reply), after);
        }
        setTimeout(() => { window.allCame = true; }, 200);"""
    )
    page.wait(lambda: page.script("return window.allCame"))
    assert page.script("return side.querySelector('select').value") == "quick.test"


def test_stopped_answers_are_not_judged(page: Any, server: Server) -> None:
    fresh(page, f"{server.url}/?compare")
    page.wait(lambda: "tiny" in [option.text for option in page.all(".side select option")])
    page.script(STREAM, CHUNK, ODD, "open")
    page.script("document.getElementById('compare-order').value = 'together'")
    page.one("#compare-prompt").send_keys("Hello")
    page.one("#compare-run").click()
    page.wait(lambda: [prose.text for prose in page.all(".side .prose")] == ["Grüße", "Grüße"])
    page.one("#compare-stop").click()
    page.wait(lambda: page.one("#compare-run").is_displayed())
    assert not page.one("#compare-verdict").is_displayed()


def test_charts_outlive_a_change_of_colors_elsewhere(page: Any) -> None:
    page.script("location.hash = '#dashboard'")
    page.wait(lambda: len(page.all("#charts canvas")) == 5)
    page.script("location.hash = '#chat'")
    page.wait(lambda: page.one("#prompt").is_displayed())
    page.one("#theme").click()
    page.script("location.hash = '#dashboard'")
    page.wait(lambda: page.one("#charts").is_displayed())
    page.wait(lambda: len(page.all("#charts canvas")) == 5)


@pytest.mark.parametrize("is_refused", [True, False], ids=["401", "slow"])
def test_a_dashboard_asks_once_where_it_is_refused_or_not_answered(page: Any, is_refused: bool) -> None:
    page.script(REFUSED, is_refused)
    page.script("location.hash = '#dashboard'")
    if is_refused:
        page.wait(lambda: page.one("#key-dialog").is_displayed())
        page.one("#key-cancel").click()
    page.script("let ticks = 0; setInterval(() => { window.ticks = ticks += 1; }, 0)")
    page.wait(lambda: page.script("return window.ticks > 20"))
    assert page.script("return asked") == 2  # /metrics and /server_info
    assert not page.one("#key-dialog").is_displayed()


def test_rates_begin_anew_with_a_server(page: Any) -> None:
    page.script(
        """const name = "vllm:generation_tokens_total";
        const values = [1e6, 0];
        let last = 0;
        window.fetch = async (url) => String(url).endsWith("metrics")
          ? new Response(`${name}{engine="0"} ${values.shift() ?? (last += 100)}\\n`)
          : new Response("{}");
        location.hash = "#dashboard";"""
    )
    tile = "#tiles .tile:first-child b"
    page.wait(lambda: page.all(tile) and page.one("#tiles .tile b").text not in ("", "0"))
    assert 0 < float(page.one(tile).text) < 300  # 100 tokens each two seconds


@pytest.mark.parametrize("text", [">" * 30_000, "**a " * 200_000], ids=["quotes", "bold"])
def test_a_model_that_repeats_itself_is_shown(page: Any, text: str) -> None:
    page.driver.set_script_timeout(
        30
    )  # a text of this length takes a second, or minutes where time grows as its square
    try:
        height = page.awaited(
            """await import(new URL('ui/markdown.js', document.baseURI)).then((m) => {
            const place = document.createElement('div');
            place.append(...m.markdown(given[0]));
            document.getElementById('thread').append(place);
            return place.textContent.length && place.offsetHeight; })""",
            text,
        )
    finally:
        page.driver.set_script_timeout(PATIENCE)
    assert height > 0
