"""Three texts for `peers.py` that nobody tuned octavo on: `python texts.py ANARCHISM_DEB OUT`.

prose: section C.1 of An Anarchist FAQ (Debian's package `anarchism`, `apt-get download anarchism`). technical: manual
pages of section 7 as `man` shows them. code: the commands of npm, in JavaScript, as Debian or Node.js installs them.
"""

from __future__ import annotations

import html
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PAGES = ("signal", "epoll", "pipe", "namespaces", "capabilities")
NPM = Path("/usr/lib/node_modules/npm/lib/commands")


def main() -> None:
    """Write OUT/prose.txt, technical.txt and code.txt."""
    deb, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as unpacked:
        subprocess.run(["dpkg", "-x", str(deb), unpacked], check=True)
        page = Path(unpacked) / "usr/share/doc/anarchism/html/secC1.html"
        (out / "prose.txt").write_text(_paragraphs(page.read_text("utf-8", "replace")))
    (out / "technical.txt").write_text("\n".join(_manual(page) for page in PAGES))
    (out / "code.txt").write_text("\n".join(file.read_text() for file in sorted(NPM.glob("*.js"))))


def _paragraphs(page: str) -> str:
    """The page's text without its markup, headings and menus."""
    page = re.sub(r"(?s)<(script|style|head).*?</\1>", "", page)
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
