"""Debian's chromium, driven by selenium: the page of a server as a person has it, on a desktop or a phone.

The extra `browser` has selenium; `make test-page` installs that, and axe-core from npm into .page.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from octavo_server import PATIENCE
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

PLACE = Path(os.environ.get("OCTAVO_PAGE", Path(__file__).parents[2] / ".page")).resolve()
AXE = PLACE / "node_modules/axe-core/axe.min.js"
SHOTS = PLACE / "screenshots"
SIZES = {"desktop": (1280, 860), "phone": (390, 844)}
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip


class Page:
    """A browser with the page of a server."""

    def __init__(self, driver: Chrome, size: str) -> None:
        self.driver = driver
        self.size = size

    def open(self, url: str) -> None:
        self.driver.get("about:blank")  # or another #view would be no new page
        self.driver.get(url)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def wait(self, is_so: Callable[[], Any]) -> Any:
        """Until it is so; a list of elements that are being replaced is asked for again."""
        waiting = WebDriverWait(self.driver, PATIENCE, 0.05, ignored_exceptions=[StaleElementReferenceException])
        return waiting.until(lambda _: is_so())

    def script(self, text: str, *arguments: Any) -> Any:
        return self.driver.execute_script(text, *arguments)

    def awaited(self, expression: str, *arguments: Any) -> Any:
        """What a promise brings; `given` are the arguments."""
        text = (
            "const done = arguments[arguments.length - 1]; const given = [...arguments];"
            f"(async () => ({expression}))()"
            ".then((value) => done({value}), (error) => done({error: String(error)}));"
        )
        found = self.driver.execute_async_script(text, *arguments)
        assert "error" not in found, found
        return found.get("value")

    def set(self, name: str, value: str) -> None:
        """Set a field of the settings, as somebody does who types."""
        self.script(
            """const field = document.getElementById("settings").elements[arguments[0]];
            if (field.type === "checkbox") field.checked = Boolean(arguments[1]); else field.value = arguments[1];
            field.dispatchEvent(new Event("input", {bubbles: true}));""",
            name,
            value,
        )

    def say(self, text: str) -> None:
        """Type a message and send it by Enter."""
        box = self.one("#prompt")
        box.send_keys(text)
        box.send_keys("\ue007")

    def answer(self, number: int = 1) -> WebElement:
        """The answer of this number, once it is whole."""

        def whole() -> WebElement | None:
            found = self.all(".message.assistant")
            done = (
                len(found) == number and not found[-1].get_attribute("aria-busy") and self.one("#send").is_displayed()
            )
            return found[-1] if done else None

        found: WebElement = self.wait(whole)
        return found

    def complaints(self) -> list[str]:
        """What the console has of errors since it was asked last."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def dark(self, is_dark: bool) -> None:
        features = [{"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def shoot(self, name: str) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.driver.save_screenshot(str(SHOTS / f"{name}-{self.size}.png"))

    def violations(self) -> list[str]:
        """What axe-core finds in all that is shown, whatever its impact."""
        self.script(AXE.read_text("utf-8"))
        result = self.awaited("await axe.run(document, {resultTypes: ['violations']})")
        return [
            f"{found['impact']} {found['id']}: {node['html'][:160]} {node['failureSummary'][:200]}"
            for found in result["violations"]
            for node in found["nodes"]
        ]


@contextmanager
def browsing(size: str) -> Iterator[Page]:
    """A browser of its own, without anything kept from before."""
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs or not AXE.is_file():
        pytest.fail("chromium, chromedriver (Debian's chromium-driver) and axe-core are needed: make test-page")
    width, height = SIZES[size]
    with tempfile.TemporaryDirectory(prefix="octavo-page-", ignore_cleanup_errors=True) as profile:
        options = ChromeOptions()
        options.binary_location = str(programs[0])
        for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = Chrome(options, ChromeService(programs[1]))
        try:
            driver.set_script_timeout(PATIENCE)
            screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
            yield Page(driver, size)
        finally:
            driver.quit()
