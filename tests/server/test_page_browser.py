"""The page in a real browser: a conversation, a stop, settings, tokens, tools, the comparison, dashboard and report.

Slow: it needs Debian's chromium, selenium, and axe-core from npm. `make test-page` installs these and runs it; what it
looked like is in .page/screenshots. SmolLM2 answers, and the tiny checkpoint where it only matters that something does.
"""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import report_example
from octavo_server import TINY, Server, samples, serving, started, value, wait_until

from octavo.calibration.report.files import write_reports
from octavo.demo_models import fetch_model

pytestmark = pytest.mark.slow

ESCAPE = "\ue00c"
RIGHT = "\ue014"
TAB = "\ue004"
HOSTILE = "<img src=x onerror=document.title='broken'>"
TOOLS = Path(__file__).parents[1] / "fixtures" / "templates" / "Qwen-Qwen3-0.6B.jinja"  # the same turns, and tools
EVIL = "window.reached = true;"
SCHEMA = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "green"]}},
    "required": ["color"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """SmolLM2 with a report beside it, in which there is a script too."""
    directory = tmp_path_factory.mktemp("model")
    original = fetch_model("smollm2", Path("models")).resolve()
    for path in original.iterdir():
        (directory / path.name).symlink_to(path)
    (directory / "README.md").unlink(missing_ok=True)
    write_reports(directory, report_example.report(), source=original)
    page = directory / "quantization_report.html"
    evil = f"<script>{EVIL}</script></body>"
    page.write_text(page.read_text().replace("</body>", evil))
    flags = ("--dtype", "float32", "--served-model-name", "smollm2", "smollm2-again", "--chat-template", str(TOOLS))
    with started(*flags, model=directory) as server:
        server.wait_until_ready()
        yield server


@pytest.fixture(scope="module")
def other() -> Iterator[Server]:
    """A second server, which asks for a key, stands behind a prefix, and lets any page ask it."""
    flags = ("--api-key", "secret", "--protect-all", "--root-path", "/prefix", "--allowed-origins", '["*"]')
    with serving(*flags, "--served-model-name", HOSTILE) as server:
        yield server


@pytest.fixture(scope="module", params=["desktop", "phone"])
def window(request: pytest.FixtureRequest) -> Iterator[Any]:
    from browsing import browsing  # selenium is in the extra `browser`

    with browsing(request.param) as page:
        yield page


@pytest.fixture
def page(window: Any, server: Server) -> Iterator[Any]:
    """The page, new, of a browser that remembers nothing; whatever a test does, the console must stay silent."""
    window.open(f"{server.url}/")
    window.script("sessionStorage.clear(); localStorage.clear();")
    window.dark(False)
    window.open(f"{server.url}/")
    window.wait(lambda: window.one("#model").get_attribute("value") == "smollm2")
    yield window
    assert window.complaints() == []


def ask(server: Server, **fields: Any) -> dict[str, Any]:
    """What the server says without a browser."""
    with server.client() as client:
        answer = client.post("/v1/chat/completions", json={"model": "smollm2"} | fields)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def words(text: str) -> list[str]:
    """A text without its markup and its line breaks, which the page draws."""
    return text.replace("*", "").replace("`", "").split()


def test_a_conversation(page: Any, server: Server) -> None:
    page.shoot("welcome")
    page.set("temperature", "0")
    page.set("max_tokens", "24")
    page.set("system", "You are terse.")
    messages = [{"role": "system", "content": "You are terse."}, user("What is the capital of France?")]
    page.say(messages[-1]["content"])
    first = ask(server, messages=messages, temperature=0, max_tokens=24)["message"]
    assert words(page.answer().find_element("css selector", ".prose").text) == words(first["content"])
    messages += [{"role": "assistant", "content": first["content"]}, user("And of Italy?")]
    page.say(messages[-1]["content"])
    second = ask(server, messages=messages, temperature=0, max_tokens=24)["message"]
    answer = page.answer(2)
    assert words(answer.find_element("css selector", ".prose").text) == words(second["content"])
    assert "tokens" in answer.find_element("css selector", ".stats").text
    assert page.one("#status").get_attribute("textContent").startswith("Answer finished")
    page.shoot("conversation")
    page.driver.refresh()  # what was said is kept for the tab
    assert len(page.wait(lambda: page.all(".message.assistant"))) == 2
    page.script("document.getElementById('new-chat').click()")
    assert page.all(".message") == []


@pytest.mark.parametrize("by_key", [False, True], ids=["button", "key"])
def test_a_stopped_answer_stops_the_engine(page: Any, server: Server, by_key: bool) -> None:
    with server.client() as client:
        before = value(client, "vllm:request_success_total", finished_reason="abort")
        page.say("Count from one to a thousand, in words.")
        page.wait(lambda: len(page.one(".message.assistant .prose").text) > 20)
        if by_key:
            page.one("#prompt").send_keys(ESCAPE)
        else:
            page.one("#stop").click()
        assert "stopped" in page.answer().find_element("css selector", ".stats").text
        wait_until(lambda: samples(client)["vllm:num_requests_running", ()] == 0)
        wait_until(lambda: value(client, "vllm:request_success_total", finished_reason="abort") == before + 1)
    page.set("max_tokens", "4")
    page.say("Go on")  # the conversation does, with what there is of the answer
    page.answer(2)


def test_settings_are_what_is_asked(page: Any, server: Server) -> None:
    page.set("max_tokens", "5")
    page.set("seed", "7")
    page.say("Tell me a story")
    stats = page.answer().find_element("css selector", ".stats").text
    assert "5 tokens" in stats
    assert "cut at the limit" in stats
    said = ask(server, messages=[user("Tell me a story")], max_tokens=5, seed=7)["message"]["content"]
    assert words(page.one(".message.assistant .prose").text) == words(said)
    page.set("stop", said.strip().split()[1])
    page.script("document.querySelectorAll('.actions button')[1].click()")  # try again
    page.wait(lambda: "cut" not in page.answer().find_element("css selector", ".stats").text)
    assert words(page.one(".message.assistant .prose").text) == words(said)[:1]
    page.set("temperature", "3")
    page.say("More")
    page.wait(lambda: "Temperature" in page.one("#settings-error").text)
    assert page.one("#prompt").get_attribute("value") == "More"


def test_the_next_request_as_a_command(page: Any, server: Server) -> None:
    text = "It's \"three\" o'clock"
    page.set("max_tokens", "3")
    page.set("temperature", "0")
    page.one("#prompt").send_keys(text)
    page.script("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.script("document.getElementById('curl').click()")
    command = page.wait(lambda: page.script("return window.copied"))
    done = subprocess.run(["sh", "-c", command], capture_output=True, check=True)
    said = ask(server, messages=[user(text)], max_tokens=3, temperature=0)
    assert json.loads(done.stdout)["choices"][0]["message"] == said["message"]


def test_what_the_server_refuses_is_said(page: Any) -> None:
    page.set("top_k", "9999999999")
    page.say("Hello")
    page.wait(lambda: "top_k" in page.one("#notice").text)
    assert page.one("#prompt").get_attribute("value") == "Hello"
    assert "400" in page.complaints()[0]  # the browser's own line about the status


def test_tokens_and_their_alternatives(page: Any, server: Server) -> None:
    page.set("logprobs", "on")
    page.set("temperature", "0")
    page.set("max_tokens", "12")
    page.say("Name a fruit.")
    page.answer()
    truth = ask(server, messages=[user("Name a fruit.")], temperature=0, max_tokens=12, logprobs=True, top_logprobs=5)
    entries = truth["logprobs"]["content"]
    tokens = page.all(".token")
    assert [token.get_attribute("textContent") for token in tokens] == [entry["token"] for entry in entries]
    for token, entry in zip(tokens, entries, strict=True):
        level = sum(math.exp(entry["logprob"]) < least for least in (0.9, 0.7, 0.4, 0.15))
        assert f"sure-{level}" in token.get_attribute("class").split()
    tokens[0].click()
    page.driver.switch_to.active_element.send_keys(RIGHT)
    focused = page.driver.switch_to.active_element
    assert focused.get_attribute("data-index") == "1"
    panel = page.one(".alternatives")
    assert panel.is_displayed()
    assert panel.get_attribute("id") == focused.get_attribute("aria-describedby")
    shown = [row.text for row in panel.find_elements("css selector", "th")]
    likely = [top["token"] for top in entries[1]["top_logprobs"]]
    assert len(shown) == len(likely) == 5
    assert likely[0].strip() in shown[0]
    page.shoot("tokens")
    assert page.violations() == []


def test_structured_output(page: Any) -> None:
    page.set("reasoning_effort", "none")  # or the model thinks first, without end
    page.set("format", "json_schema")
    page.script("document.getElementById('settings-fold').open = true")
    assert page.one("#schema-field").is_displayed()
    assert json.loads(page.one("[name=schema]").get_attribute("value"))["type"] == "object"  # an example
    page.set("schema", json.dumps(SCHEMA))
    page.set("max_tokens", "40")
    page.say("Pick a color.")
    jsonschema.validate(json.loads(page.answer().find_element("css selector", ".prose").text), SCHEMA)
    page.set("schema", "{")
    page.say("Again")
    page.wait(lambda: "JSON schema" in page.one("#settings-error").text)


def test_a_model_calls_a_tool_and_gets_its_result(page: Any) -> None:
    page.script("document.getElementById('sample-tool').click()")
    page.set("reasoning_effort", "none")
    page.set("tool_choice", "required")
    page.set("temperature", "0")
    page.set("max_tokens", "60")
    page.say("What is the weather in Paris?")
    call = page.answer().find_element("css selector", ".call")
    assert "get_weather" in call.text
    assert "city" in json.loads(call.find_element("css selector", "pre").text)  # its schema allows more
    page.set("tool_choice", "none")
    page.one(".results textarea").send_keys("sunny")
    page.one(".results button").click()
    page.answer(2)
    assert page.one(".message.tool").text.endswith("sunny")
    page.shoot("tools")


def test_what_is_said_is_never_html(page: Any) -> None:
    links = "[x](javascript:alert(1)) [y](https://example.com/?a=1)"
    text = f"{HOSTILE} **bold** `{HOSTILE}` {links}\n\n1. a\n   - b\n\n```py\n<b>\n```"
    message = {"role": "assistant", "content": text, "reasoning": HOSTILE, "facts": HOSTILE}
    page.script("sessionStorage.setItem('octavo.conversation', arguments[0])", json.dumps([user(HOSTILE), message]))
    page.driver.refresh()
    answer = page.answer()
    assert page.all("main img[src=x], .prose b, script:not([src])") == []
    assert answer.find_element("css selector", "strong").text == "bold"
    assert [link.get_attribute("href") for link in page.all(".prose a")] == ["https://example.com/?a=1"]
    assert page.one(".prose ol > li > ul > li").text == "b"
    assert page.one(".code-block pre").text == "<b>"
    assert HOSTILE in page.one(".bubble").text
    assert page.one(".reasoning-text").get_attribute("textContent") == HOSTILE
    assert "broken" not in page.driver.title


def test_markdown_loses_no_word(page: Any) -> None:
    pieces = [
        "# a\r",
        "- b",
        "  - c",
        "1) d",
        "```",
        "| e |",
        "|---|",
        "> f",
        "**g",
        "_h_",
        "`i",
        "[j](http://0)",
        "***",
        "\u2028- l",
    ]
    draw = random.Random(0)
    texts = ["\n".join(draw.choices(pieces, k=draw.randrange(1, 9))) for _ in range(300)]
    found = page.awaited(
        """await import(new URL('ui/markdown.js', document.baseURI)).then((m) => given[0].map((text) => {
        const place = document.createElement('div');
        place.append(...m.markdown(text));
        return place.textContent; }))""",
        texts,
    )
    for text, shown in zip(texts, found, strict=True):
        letters = re.sub(r"http://0|[^a-l]", "", text)
        assert re.sub(r"http://0|[^a-l]", "", shown.replace("Copy", "")) == letters, text


def quantile(bounds: list[float], counts: list[float], wanted: float) -> float | None:
    """Prometheus' histogram_quantile, from its documentation; counts are cumulative."""
    rank = wanted * counts[-1]
    if counts[-1] == 0:
        return None
    at = next(i for i, count in enumerate(counts) if count >= rank)
    low = bounds[at - 1] if at else 0.0
    if bounds[at] == math.inf:
        return low
    under = counts[at - 1] if at else 0.0
    return low + (bounds[at] - low) * (rank - under) / (counts[at] - under)


def test_the_dashboard_tells_what_the_metrics_do(page: Any, server: Server) -> None:
    name = "vllm:time_to_first_token_seconds"
    page.open(f"{server.url}/#dashboard")
    page.wait(lambda: len(page.all("#tiles .tile")) == 6)
    before = httpx.get(f"{server.url}/metrics").text
    for number in range(6):
        ask(server, messages=[user(f"Count to {number}.")], max_tokens=20, min_tokens=20)
    after = httpx.get(f"{server.url}/metrics").text
    found = page.awaited(
        """await import(new URL('ui/prometheus.js', document.baseURI)).then((m) => {
        const [a, b] = [new m.Snapshot(given[0], 100), new m.Snapshot(given[1], 110)];
        return [m.rate(a, b, 'vllm:generation_tokens_total'), m.quantiles(a, b, given[2], [0.5, 0.99])]; })""",
        before,
        after,
        name,
    )
    with server.client() as client:
        bounds = sorted(float(dict(labels)["le"]) for kind, labels in samples(client) if kind == f"{name}_bucket")
    counts = [bucket(after, name, bound) - bucket(before, name, bound) for bound in bounds]
    assert found[0] == pytest.approx(12.0)  # 6 answers of 20 tokens in 10 s
    assert found[1] == pytest.approx([quantile(bounds, counts, 0.5), quantile(bounds, counts, 0.99)])
    page.one("#cost").send_keys("3.6")
    page.wait(lambda: "$" in page.one("#cost-facts").text and float(tile(page, "Output tokens/s").replace(",", "")) > 0)
    assert page.one("#cost-facts dd:nth-of-type(3)").text == "$86.4"
    assert page.all("#charts canvas")
    with server.client() as client:
        engine = client.get("/server_info").json()["engine"]
    rows = [row.text for row in page.all("#kernels tbody th")]
    assert rows == [row["layers"] for row in engine["layers"]]
    assert f"{engine['weight_bytes'] / 1e6:.1f} MB" in page.one("#memory").text
    page.shoot("dashboard")
    assert page.violations() == []
    page.dark(True)
    page.shoot("dashboard-dark")
    assert page.violations() == []


def bucket(text: str, name: str, bound: float) -> float:
    """A bucket's count in a page of Prometheus text."""
    written = "+Inf" if bound == math.inf else str(bound)
    (line,) = (line for line in text.splitlines() if line.startswith(f"{name}_bucket") and f'le="{written}"' in line)
    return float(line.rpartition(" ")[2])


def tile(page: Any, name: str) -> str:
    found = [tile for tile in page.all("#tiles .tile") if tile.find_element("css selector", "span").text == name]
    text: str = found[0].find_element("css selector", "b").text
    return text


def test_the_report_is_shown_and_runs_no_script(page: Any, server: Server) -> None:
    page.open(f"{server.url}/#report")
    frame = page.wait(lambda: page.one("iframe.report"))
    page.shoot("report")
    page.driver.switch_to.frame(frame)
    page.wait(lambda: page.all("h1"))
    report = report_example.report()
    assert page.one("h1").text == f"{report.model}: {report.scheme}"
    assert page.all("svg")
    assert page.script("return typeof reached") == "undefined"  # the stranger's script has not run
    assert page.script("return window.origin") == "null"
    page.driver.switch_to.default_content()
    assert page.driver.title == "Quantization report · octavo"
    assert page.driver.current_url == f"{server.url}/#report"
    page.complaints()  # what was forbidden to the report


def test_two_servers_side_by_side(page: Any, other: Server) -> None:
    request = "fetch(given[0] + '/v1/models', {headers: {Authorization: 'Bearer secret'}})"
    asked = f"{request}.then((response) => response.status, () => 0)"
    assert (
        page.awaited(f"await {asked}", other.url) == 0
    )  # the policy of a conversation's page allows this server alone
    assert any("Content Security Policy" in line for line in page.complaints())
    page.script("document.querySelector('nav a[data-view=compare]').click()")
    page.wait(lambda: "smollm2" in [option.text for option in page.all(".side select option")])
    assert page.awaited(f"await {asked}", other.url) == 200
    url, key = page.all(".side")[1].find_elements("css selector", "input")
    url.send_keys(other.url.removeprefix("http://") + "/v1", TAB)
    page.wait(lambda: "key" in page.all(".side .error")[1].text)
    assert all("401" in line for line in page.complaints())
    key.send_keys("secret", TAB)
    page.wait(lambda: page.all(".side")[1].find_element("css selector", "select").get_attribute("value") == HOSTILE)
    page.set("max_tokens", "16")
    page.set("temperature", "0")
    page.one("#compare-prompt").send_keys("Hello there")
    page.script("document.getElementById('compare-run').click()")
    page.wait(lambda: page.one("#compare-verdict").is_displayed())
    assert len(page.all(".side .stats")) == 2
    assert "part" in page.one("#compare-verdict").text
    page.shoot("compare")
    assert page.violations() == []
    for side in page.all(".side")[1:]:
        page.script(
            "arguments[0].value = ''; arguments[0].dispatchEvent(new Event('change'))",
            side.find_element("css selector", "input"),
        )
    page.wait(lambda: page.all(".side")[1].find_element("css selector", "select").get_attribute("value") == "smollm2")
    page.script("document.getElementById('compare-run').click()")
    page.wait(lambda: page.one("#compare-verdict").is_displayed() and "the same" in page.one("#compare-verdict").text)


def test_a_key_is_asked_for_and_kept_in_the_tab(window: Any, other: Server) -> None:
    window.open(f"{other.url}/")
    window.wait(lambda: window.one("#key-dialog").is_displayed())
    assert window.violations() == []
    window.shoot("key")
    window.one("#key").send_keys("wrong\ue007")
    window.wait(lambda: "does not take" in window.one("#key-error").text)
    window.one("#key").clear()
    window.one("#key").send_keys("secret\ue007")
    window.wait(lambda: window.one("#model").get_attribute("value") == HOSTILE)
    assert not window.one("#key-dialog").is_displayed()
    assert "secret" in window.script("return JSON.stringify({...sessionStorage})")
    assert "secret" not in window.script("return JSON.stringify({...localStorage}) + document.cookie + location.href")
    window.wait(lambda: window.one("#welcome-model").text == HOSTILE)
    window.set("max_tokens", "4")
    window.say("Hello")
    assert window.answer().find_element("css selector", ".who").text == HOSTILE
    window.open(f"{other.url}/#dashboard")  # /metrics asks for a key too
    window.wait(lambda: window.all("#tiles .tile"))
    window.open(f"{other.url}/#report")
    window.wait(lambda: "none" in window.one("#report-none").text)
    assert "broken" not in window.driver.title
    assert all("401" in line for line in window.complaints())


def test_a_model_without_a_chat_template_goes_on_writing(window: Any, tmp_path: Path) -> None:
    for path in TINY.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((TINY / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with serving("--served-model-name", "base", model=tmp_path) as server:
        window.open(f"{server.url}/")
        window.wait(lambda: "no chat template" in window.one("#welcome-about").text)
        assert not window.one("#system-field").is_displayed()
        for name, setting in {"max_tokens": "9", "temperature": "0", "logprobs": "on"}.items():
            window.set(name, setting)
        window.say("The capital of France is")
        window.answer()
        body = {"prompt": "The capital of France is", "max_tokens": 9, "temperature": 0, "logprobs": 5}
        with server.client() as client:
            truth = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
        assert [token.get_attribute("textContent") for token in window.all(".token")] == truth["tokens"]
        window.all(".token")[0].click()
        assert len(window.all(".alternatives tr")) == 5
    assert window.complaints() == []


@pytest.mark.parametrize("view", ["chat", "compare", "dashboard", "report"])
@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
def test_axe_finds_nothing(page: Any, server: Server, view: str, is_dark: bool) -> None:
    page.dark(is_dark)
    page.open(f"{server.url}/{'?compare' if view == 'compare' else ''}#{view}")
    page.wait(lambda: page.one("#model").get_attribute("value") == "smollm2")
    if view == "chat":
        page.set("max_tokens", "12")
        page.say("Write a short list")
        page.answer()
        page.script("for (const fold of document.querySelectorAll('details')) fold.open = true")
    assert page.violations() == []
    page.shoot(f"{view}-{'dark' if is_dark else 'light'}")
    assert page.script("return document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
    page.complaints()  # the report's own are another test's


def test_the_keyboard_is_enough(page: Any) -> None:
    page.one("body").send_keys(TAB)
    assert page.driver.switch_to.active_element.get_attribute("id") == "skip"
    seen: list[str] = []
    for _ in range(60):
        page.driver.switch_to.active_element.send_keys(TAB)
        seen.append(page.driver.switch_to.active_element.get_attribute("id"))
    assert {"model", "key-button", "theme", "thread", "prompt", "send", "new-chat"} <= set(seen)
    before = page.script("return getComputedStyle(document.documentElement).colorScheme")
    page.one("#theme").send_keys(" ")
    assert page.one("#theme").get_attribute("aria-pressed") == "true"
    assert page.script("return getComputedStyle(document.documentElement).colorScheme") != before
    page.one("#key-button").send_keys("\ue007")
    page.wait(lambda: page.driver.switch_to.active_element.get_attribute("id") == "key")
    page.driver.switch_to.active_element.send_keys(ESCAPE)
    page.wait(lambda: page.driver.switch_to.active_element.get_attribute("id") == "key-button")


def test_who_wants_less_motion_gets_none(page: Any) -> None:
    page.driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-reduced-motion", "value": "reduce"}]}
    )
    page.say("Count from one to a thousand, in words.")
    page.wait(lambda: page.all(".running .prose p"))
    style = "return getComputedStyle(document.querySelector('.running .prose'), '::after').animationName"
    assert page.script(style) == "none"
    page.one("#stop").click()
    page.answer()
