"""The commands of README and docs/ do what they say: each runs as it stands there, on a tiny model.

Marked slow, some ten minutes: `pytest -m slow tests/commands/test_docs_commands.py`, before a release, and after a
change of commands in a page. That every command line parses is in the default suite (tests/test_docs.py).

A page's blocks run one after the other in one directory, so that OUT is what an earlier command has written. Words in
capitals and Hub ids stand for the tiny model and for files that the test makes. `octavo serve` runs until the end of
its block, on a free port; the docs' address is that of the last server. `needs` tells what isn't run, by what stands in
the command.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import groupby
from pathlib import Path

import documented
import pytest
import torch
import transformers
from documented import ROOT, Command
from octavo_server import PATIENCE, ended
from peft_oracle import PeftOracle
from safetensors.torch import load_file, save_file
from terminal import CTRL_C, terminal

import octavo

pytestmark = pytest.mark.slow

PACKAGE = str(Path(octavo.__file__).parent.parent)
HUB_ID = re.compile(r"[A-Za-z][\w.-]*/[\w.-]+(:[\w./-]+)?")
QUOTED_HUB_ID = re.compile(r'"[A-Z][\w.-]*/[\w.-]+"')
ADDRESS = re.compile(r"http://(?:localhost|127\.0\.0\.1):8000")
ELSEWHERE = {
    "--nnodes": "another machine",
    "--data-parallel-address": "another machine",
    "ray": "a Ray cluster",
    "--revision": "the Hub",
    "--tasks": "the Hub",
    "...": "the rest of the command",
}
SHORT = {  # flags behind those of the docs, with which a measurement is soon over
    "bench": "--num-prompts 4",
    "bench throughput": "--num-prompts 4",
    "bench sweep": "--num-prompts 4",
    "bench latency": "--num-iters 1 --num-iters-warmup 1",
    "bench startup": "--num-iters-cold 1 --num-iters-warm 1",
    "bench compare": "",
    "cost": "--seconds 1 --repetitions 1 --input-len 16 --output-len 8 --concurrency 1 2 --eval-tokens 64",
}
OF_SERVERS = ("bench", "bench throughput", "bench sweep", "bench latency")
NOT_GOOD_ENOUGH = 3  # a tiny model's KL may be anything


def needs(words: tuple[str, ...]) -> str | None:
    """What a command needs that isn't here; None: nothing."""
    found = next((ELSEWHERE[word] for word in words if word in ELSEWHERE), None)
    engines = [int(words[i + 1]) for i, word in enumerate(words[:-1]) if word == "-dp"]
    if engines and engines[0] > len(os.sched_getaffinity(0)):
        found = found or "more cores"
    data = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "--dataset"]
    return found or ("the Hub" if any(map(HUB_ID.fullmatch, data)) else None)


def own(command: Command) -> bool:
    """Whether it is a command of octavo's: Ray Serve's program is called serve too."""
    return command.program in ("octavo", "quantize") or (command.program == "serve" and command.words[1] != "run")


PAGES = [page for page in documented.pages() if any(own(c) and not needs(c.words) for c in documented.commands(page))]


@pytest.fixture(scope="session")
def model(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with an MLP of whole groups of 128 columns, and a long context."""
    out = tmp_path_factory.mktemp("docs") / "model"
    shutil.copytree(fixtures / "tiny", out, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(fixtures / "tiny/model.safetensors")
    for name, tensor in tensors.items():
        missing = 384 - 352
        if "gate_proj" in name or "up_proj" in name:
            tensors[name] = torch.cat([tensor, tensor[:missing]])
        if "down_proj" in name:
            tensors[name] = torch.cat([tensor, tensor[:, :missing] * 0], dim=1)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
    config = json.loads((out / "config.json").read_text("utf-8"))
    config |= {"intermediate_size": 384, "max_position_embeddings": 32768}
    (out / "config.json").write_text(json.dumps(config), "utf-8")
    return out


@pytest.fixture(scope="session")
def quantized(model: Path) -> Path:
    """What IN stands for."""
    out = model.with_name("quantized")
    assert octavo.quantize(model, out, scheme="W4A16").layers
    return out


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page: str, model: Path, quantized: Path, tmp_path: Path) -> None:
    run = Run(tmp_path, {"MODEL": model, "ORIGINAL": model, "OWNER/MODEL": model, "IN": quantized})
    for _, block in groupby(documented.commands(page), key=lambda command: command.block):
        with ExitStack() as servers:
            run.url = ""
            for command in block:
                if own(command) and needs(command.words) is None:
                    run(command, servers)
    for text in documented.code_of(page, "python"):
        if text.startswith("import octavo\n"):
            run.program(text)


class Run:
    """A page's commands, in a directory of their own. named: what words stand for."""

    def __init__(self, directory: Path, named: dict[str, Path]) -> None:
        self._directory = directory
        self._named = named
        self.url = ""
        self._environment = os.environ | {"PYTHONPATH": PACKAGE}

    def __call__(self, command: Command, servers: ExitStack) -> None:
        """Run one; a server until `servers` end it."""
        words = [self._word(word) for word in command.words]
        words = words[1:] if words[0] == "octavo" else words
        if words[0] == "serve":
            self.url = servers.enter_context(self._served(words, command))
            return
        name = " ".join(words[:2]) if " ".join(words[:2]) in SHORT else words[0]
        if name in OF_SERVERS and "--base-url" not in words:
            words += ["--base-url", "http://127.0.0.1:8000"]  # their default
        if ADDRESS.search(" ".join(words)) and not self.url:
            self.url = servers.enter_context(self._served(["serve", str(self._named["MODEL"])], command))
        words = [ADDRESS.sub(self.url, word) for word in words]
        if words[0] == "top" and not {"--once", "--json"} & set(words):
            with terminal(*words, PYTHONPATH=PACKAGE, TERM="xterm") as at:
                at.wait_for("Ctrl-C ends")
                at.press(CTRL_C)
                assert at.end() == 0, command
            return
        if words[0] == "quantize":  # several ways to make one OUT stand in a block
            shutil.rmtree(self._directory / words[words.index("-o") + 1], ignore_errors=True)
        good = (0, NOT_GOOD_ENOUGH) if words[0] in ("quantize", "eval") else (0,)
        self._run([sys.executable, "-m", "octavo", *words, *SHORT.get(name, "").split()], str(command), good)

    def program(self, text: str) -> None:
        """Run a Python program."""
        for name in re.findall(r'"([\w-]+\.jsonl)"', text):
            write_lines(self._directory / name)
        text = QUOTED_HUB_ID.sub(lambda _: repr(str(self._named["MODEL"])), text)
        self._run([sys.executable, "-c", text], text, (0,))

    def _run(self, command: list[str], shown: str, good: tuple[int, ...]) -> None:
        done = subprocess.run(
            command,
            cwd=self._directory,
            env=self._environment,
            input="Hello\n",
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode in good, f"{shown}\n{done.stdout}\n{done.stderr}"

    @contextmanager
    def _served(self, words: list[str], command: Command) -> Iterator[str]:
        """A server that is ready; gives its address. It must end well on SIGTERM."""
        if "--port" in words:
            words[words.index("--port") + 1] = "0"
        else:
            words = [*words, "--port", "0"]
        with ended(self._start(words)) as server:
            server.wait_until_ready()
            yield server.url
            server.send_signal(signal.SIGTERM)
            assert server.exit_code() == 0, f"{command}\n{server.said}"

    def _start(self, words: list[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "octavo", *words],
            cwd=self._directory,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _word(self, word: str) -> str:
        """What a word of a command stands for; a file of text or requests is made where it is first named."""
        if word in self._named or (HUB_ID.fullmatch(word) and not (self._directory / word).exists()):
            return str(self._named.get(word, self._named["MODEL"]))
        path = self._directory / word
        _, is_adapter, directory = word.partition("=")
        if is_adapter and directory.startswith("adapters/"):
            write_adapter(self._named["MODEL"], self._directory / directory)
        if word.endswith(".jsonl") and not word.startswith("out") and not path.exists():
            write_lines(path)
        if word.partition("@")[0] == "smollm2" and not path.exists():
            checkpoint = self._directory / "smollm2"
            checkpoint.unlink(missing_ok=True)
            checkpoint.symlink_to(self._named["MODEL"])
        return word


def write_adapter(model: Path, directory: Path) -> None:
    """A random one, by PEFT."""
    PeftOracle(transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), directory)


def write_lines(path: Path) -> None:
    """Text to calibrate on, that of the docs; in a file named `in`, requests; in one of a trace, Mooncake's lines."""
    if "trace" in path.stem:
        lines = [{"timestamp": 100 * i, "input_length": 20, "output_length": 4, "hash_ids": [i]} for i in range(9)]
    elif path.stem == "in":
        body = {"model": "any", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        lines = [{"custom_id": str(i), "method": "POST", "url": "/v1/chat/completions", "body": body} for i in range(3)]
    else:
        texts = [(ROOT / page).read_text("utf-8") for page in documented.pages()]
        lines = [{"text": part} for text in texts for part in text.split("\n## ")]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), "utf-8")


def test_what_is_not_run_is_told_by_the_command() -> None:
    assert needs(("octavo", "serve", "MODEL", "-tp", "2", "--nnodes", "2")) == "another machine"
    assert needs(("octavo", "serve", "M", "--data-parallel-backend", "ray")) == "a Ray cluster"
    assert needs(("quantize", "MODEL", "-o", "OUT", "--dataset", "HuggingFaceH4/ultrachat_200k:train_sft")) == "the Hub"
    assert needs(("quantize", "Qwen/Qwen3-0.6B", "-o", "OUT", "--dataset", "text.jsonl")) is None
    left = [c for page in documented.pages() for c in documented.commands(page) if own(c) and needs(c.words)]
    assert {needs(c.words) for c in left} >= set(ELSEWHERE.values())
