"""The texts of `peers.py`: `python texts.py DEBS OUT`, where DEBS has what `apt-get download` gives of PACKAGES.

OUT/calibration.txt: docstrings of the running CPython's standard library, what every tool calibrates on.
OUT/developing: what octavo's choices may be made on: a section of An Anarchist FAQ; manual pages of section 7 as `man`
shows them; the commands of npm in JavaScript, as Debian or Node.js installs them.
OUT/deciding: what no choice was made on, and none may be: A Brief History of Debian; git's user manual; the sources of
cobra, in Go. Other authors, another subject and another language than all texts before, and none near to docstrings.
"""

from __future__ import annotations

import ast
import html
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("anarchism", "debian-history", "git-doc", "golang-github-spf13-cobra-dev")
PAGES = ("signal", "epoll", "pipe", "namespaces", "capabilities")
NPM = Path("/usr/lib/node_modules/npm/lib/commands")
NO_LIBRARY = {"test", "tests", "site-packages", "idlelib"}


def main() -> None:
    """Write all texts."""
    debs, out = Path(sys.argv[1]), Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as unpacked:
        for package in PACKAGES:
            subprocess.run(["dpkg", "-x", str(next(debs.glob(f"{package}_*.deb"))), unpacked], check=True)
        share = Path(unpacked) / "usr/share"
        texts = {
            "calibration": "\n\n".join(_docstrings()),
            "developing/prose": _paragraphs(_read(share / "doc/anarchism/html/secC1.html")),
            "developing/technical": "\n".join(_manual(page) for page in PAGES),
            "developing/code": "\n".join(_read(file) for file in sorted(NPM.glob("*.js"))),
            "deciding/prose": "\n\n".join(_chapters(share / "doc/debian-history/docs/project-history.en.epub")),
            "deciding/technical": _read(share / "doc/git-doc/user-manual.txt"),
            "deciding/code": "\n".join(
                _read(file)
                for file in sorted((share / "gocode/src/github.com/spf13/cobra").glob("*.go"))
                if not file.stem.endswith("_test")
            ),
        }
    for name, text in texts.items():
        file = out / f"{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        print(f"{file}: {len(text)} characters")


def _read(file: Path) -> str:
    return file.read_text("utf-8", "replace")


def _docstrings() -> Iterator[str]:
    """Those of 200 characters and more."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(library.rglob("*.py")):
        if NO_LIBRARY & set(file.relative_to(library).parts):
            continue
        for node in ast.walk(ast.parse(_read(file))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text is not None and len(text) >= 200:
                    yield text


def _chapters(book: Path) -> Iterator[str]:
    with zipfile.ZipFile(book) as files:
        for name in sorted(files.namelist()):
            if re.search(r"ch\d+\.html$", name):
                yield _paragraphs(files.read(name).decode())


def _paragraphs(page: str) -> str:
    """A page's text without its markup, headings and menus."""
    page = re.sub(r"(?s)<(script|style|head).*?</\1>", "", page)
    page = re.sub(r"</(p|li|dd|h\d)>", "\n\n", page)
    page = html.unescape(re.sub(r"(?s)<[^>]+>", " ", page))
    parts = [" ".join(part.split()) for part in re.split(r"\n\s*\n", page)]
    return "\n\n".join(part for part in parts if len(part.split()) > 12)


def _manual(page: str) -> str:
    environment = {"MANWIDTH": "100", "PATH": "/usr/bin:/bin", "LC_ALL": "C"}
    shown = subprocess.run(
        ["man", "-E", "ascii", "7", page], capture_output=True, text=True, check=True, env=environment
    )
    lines = [line.strip() for line in re.sub(".\x08", "", shown.stdout).splitlines()]
    return re.sub(" {2,}", " ", "\n".join(lines))


if __name__ == "__main__":
    main()
