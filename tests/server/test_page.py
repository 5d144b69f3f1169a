"""The page at `/`: who gets it, under which policies, and that each file of it is where it is asked for."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from house import ROOT
from octavo_server import TINY, Server, serving
from setuptools import Distribution

from octavo.calibration.report.file_names import PAGE

HTML = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
REPORT = "<!DOCTYPE html>\n<title>a report</title>\n"  # a real one is in tests/server/test_page_browser.py
KEY = {"Authorization": "Bearer k"}
FILES = ROOT / "server/web/static"
MODULES = sorted(FILES.glob("*.js"))
TYPES = {
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".html": "text/html",
    ".txt": "text/plain",
}
DANGEROUS = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function"


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that asks for a key everywhere, behind a prefix, of a model with a report."""
    directory = tmp_path_factory.mktemp("model")
    for path in TINY.iterdir():
        (directory / path.name).symlink_to(path)
    (directory / PAGE).write_text(REPORT)
    with serving("--api-key", "k", "--protect-all", "--root-path", "/octavo", model=directory) as server:
        yield server


@pytest.fixture
def stranger(locked: Server) -> Iterator[httpx.Client]:
    with locked.client() as client:
        yield client


def policy_of(response: httpx.Response) -> dict[str, list[str]]:
    """The directives of its Content-Security-Policy."""
    directives = [part.split() for part in response.headers["content-security-policy"].split(";")]
    return {name: sources for name, *sources in directives}


def test_the_page_needs_no_key_and_runs_its_own_files_alone(stranger: httpx.Client) -> None:
    page = stranger.get("/", headers=HTML)
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "Accept" in page.headers["vary"]
    policy = policy_of(page)
    assert policy["default-src"] == ["'none'"]
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == ["'self'"]
    assert policy["frame-ancestors"] == policy["form-action"] == ["'none'"]
    assert page.headers["x-content-type-options"] == "nosniff"
    assert '<base href="/octavo/">' in page.text
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|https?://", page.text)


def test_comparing_alone_may_connect_elsewhere(stranger: httpx.Client) -> None:
    policy = policy_of(stranger.get("/?compare", headers=HTML))
    assert policy["connect-src"] == ["'self'", "http:", "https:"]
    assert policy["script-src"] == ["'self'"]


def test_each_file_of_the_page_is_there(stranger: httpx.Client) -> None:
    page = stranger.get("/", headers=HTML).text
    named = set(re.findall(r'(?:src|href)="(ui/[^"]+)"', page))
    named |= {f"ui/{path.relative_to(FILES)}" for path in FILES.rglob("*.*") if path.name != "index.html"}
    assert len(named) > 15
    for name in named:
        for path in (f"/{name}", f"/octavo/{name}"):  # through a proxy that strips the prefix, and past it
            response = stranger.get(path)
            assert response.status_code == 200, path
        assert response.headers["content-type"].partition(";")[0] == TYPES[Path(name).suffix]
        assert response.content == (FILES / name.removeprefix("ui/")).read_bytes()
        again = stranger.get(f"/{name}", headers={"If-None-Match": response.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert stranger.head(f"/{name}").headers["content-length"] == str(len(response.content))


def test_nothing_else_is_open(stranger: httpx.Client) -> None:
    for path in ("/v1/models", "/server_info", "/quantization_report", "/metrics", "/ui", "/octavo/v1/models", "/uix/"):
        assert stranger.get(path, headers=HTML).status_code == 401, path
    assert stranger.post("/ui/app.js").status_code == 401
    assert stranger.get("/").status_code == 401  # Ollama's clients, who want no HTML
    assert stranger.get("/", headers=KEY).text == "Ollama is running"
    for path in ("/ui/../page.py", "/ui/%2e%2e/page.py", "/ui/index.html", "/ui//etc/passwd", "/ui/"):
        assert stranger.get(path).status_code in (401, 404), path


def test_the_report_has_an_origin_of_its_own_and_reaches_nothing(stranger: httpx.Client) -> None:
    response = stranger.get("/quantization_report", headers=KEY)
    assert response.text == REPORT
    alone = policy_of(response)
    framed = policy_of(stranger.get("/ui/report-frame.html"))
    for policy in (alone, framed):
        assert policy["default-src"] == policy["form-action"] == ["'none'"]
        assert not {"connect-src", "frame-src"} & set(policy)
    assert (alone["sandbox"], alone.get("script-src")) == ([], None)
    assert (framed["sandbox"], framed["script-src"]) == (["allow-scripts"], ["'self'"])  # what writes the report there
    assert stranger.get("/server_info", headers=KEY).json()["quantization_report"] is True


def test_a_link_to_another_file_is_no_report(tmp_path: Path) -> None:
    from octavo.server.web.page import report_of

    (tmp_path / "secret").write_text("secret")
    (tmp_path / "quantization_report.html").symlink_to(tmp_path / "secret")
    assert report_of(tmp_path) is None
    assert report_of(tmp_path / "nowhere") is None


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_a_module_builds_no_html_and_imports_what_is_there(path: Path) -> None:
    text = path.read_text("utf-8")
    assert path.name == "report-frame.js" or not re.findall(DANGEROUS, text)
    for name, source in re.findall(r"^import \{([^}]+)\} from \"\./([\w.-]+)\";$", text, re.MULTILINE):
        exported = set(
            re.findall(
                r"^export (?:async )?(?:function\*?|class|const) (\w+)", (FILES / source).read_text("utf-8"), re.M
            )
        )
        assert {each.strip() for each in name.split(",")} <= exported, source
    assert text.count("import ") == len(re.findall(r"^import ", text, re.MULTILINE))
    assert text.count("\n") <= 500


def test_ids_that_modules_ask_for_are_in_the_page() -> None:
    page = (FILES / "index.html").read_text("utf-8")
    ids = re.findall(r'\bid="([\w-]+)"', page)
    assert len(ids) == len(set(ids))
    asked = {name for path in MODULES for name in re.findall(r'byId\("([\w-]+)"\)', path.read_text("utf-8"))}
    assert asked
    assert asked <= set(ids)


def test_the_wheel_has_all_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    distribution = Distribution({"script_name": "setup.py"})
    distribution.parse_config_files()
    distribution.get_command_obj("egg_info").egg_base = str(tmp_path)
    build = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    packed = {
        os.path.realpath(os.path.join(source, name)) for _, source, _, names in build.data_files for name in names
    }
    assert {os.path.realpath(path) for path in FILES.rglob("*") if path.is_file()} <= packed
