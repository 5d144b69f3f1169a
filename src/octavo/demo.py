"""The whole way in one go: get a real model, quantize it, serve both, and stream an answer.

    python -m octavo.demo

It does what a person would do, by the same commands (`octavo quantize`, `octavo serve`) and the official `openai`
client. W8A8 is what it shows, since at eight bits the quality stays (the perplexity that it prints) while both the
bytes and the time of a step shrink; W4A16 is smaller still, but this model is small enough to feel it.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from octavo.demo_models import DEMO_MODELS, DemoError, fetch_model

QUESTION = "Why is the sky blue? Answer in three sentences."
START_SECONDS = 180.0
DRAIN_SECONDS = 45.0
# What the perplexity is measured on: prose about programs that every Python carries, some 2,200 tokens.
TEXT_MODULES = ("argparse", "difflib", "string", "heapq", "statistics")


@dataclass(frozen=True)
class Measured:
    """What one served checkpoint showed."""

    start_seconds: float
    perplexity: float
    tokens_per_second: float
    weight_bytes: int


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m octavo.demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=DEMO_MODELS, default="smollm2", help="which model (default smollm2)")
    parser.add_argument("--scheme", default="W8A8", help="what to quantize to (default W8A8)")
    parser.add_argument("--models", type=Path, default=Path("models"), help="where models are kept (default ./models)")
    parser.add_argument("--only-download", action="store_true", help="make the checkpoint, and stop")
    args = parser.parse_args(argv)
    try:
        model = _fetch(args.model, args.models)
        if not args.only_download:
            _show(model, args.models / f"{model.name}-{args.scheme.lower()}", args.scheme)
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    return 0


def _fetch(name: str, root: Path) -> Path:
    print(f"1. The model: {DEMO_MODELS[name].directory}, out of {', '.join(DEMO_MODELS[name].packages)}", flush=True)
    begun = time.monotonic()
    directory = fetch_model(name, root)
    print(f"   {directory}, {time.monotonic() - begun:.1f} s", flush=True)
    return directory


def _show(model: Path, quantized: Path, scheme: str) -> None:
    if (quantized / "config.json").is_file():
        print(f"2. Quantized to {scheme}: {quantized} is there already", flush=True)
    else:
        command = _octavo("quantize", str(model), "-o", str(quantized), "--scheme", scheme)
        print(f"2. Quantize: octavo {' '.join(command[3:])}", flush=True)
        if subprocess.run(command, check=False).returncode != 0:
            raise DemoError("octavo quantize failed; its message stands above")
    print("3. The model as it was, served", flush=True)
    before = _measure(model, ask=False)
    print(f"4. Quantized to {scheme}, served", flush=True)
    after = _measure(quantized, ask=True)
    _print_costs(before, after, scheme)


def _octavo(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "octavo", *arguments]


def _measure(model: Path, *, ask: bool) -> Measured:
    """Serve the checkpoint, read a text with it, have it write, and stop it."""
    begun = time.monotonic()
    with _served(model) as url:
        start_seconds = time.monotonic() - begun
        print(f"   ready after {start_seconds:.1f} s", flush=True)
        perplexity = _perplexity(url)
        print(f"   perplexity {perplexity:.3f}", flush=True)
        tokens_per_second = _stream_answer(url, show=ask)
    weight_bytes = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    return Measured(start_seconds, perplexity, tokens_per_second, weight_bytes)


def _print_costs(before: Measured, after: Measured, scheme: str) -> None:
    def row(what: str, old: str, new: str, change: str) -> None:
        print(f"   {what:<28}{old:>12}{new:>12}{change:>12}")

    print("5. What it cost, and what it saved", flush=True)
    row("", "bf16", scheme, "")
    megabytes = (before.weight_bytes / 1e6, after.weight_bytes / 1e6)
    row("checkpoint, MB", f"{megabytes[0]:.1f}", f"{megabytes[1]:.1f}", f"{megabytes[1] / megabytes[0] - 1:+.0%}")
    change = after.perplexity / before.perplexity - 1
    row("perplexity of a text", f"{before.perplexity:.3f}", f"{after.perplexity:.3f}", f"{change:+.2%}")
    speeds = (before.tokens_per_second, after.tokens_per_second)
    row("tokens/s, one stream", f"{speeds[0]:.0f}", f"{speeds[1]:.0f}", f"{speeds[1] / speeds[0]:.2f}x")
    row("seconds to start", f"{before.start_seconds:.1f}", f"{after.start_seconds:.1f}", "")


@contextlib.contextmanager
def _served(model: Path) -> Iterator[str]:
    """`octavo serve` on a free port, until the block ends; on any failure the end of its log is printed."""
    log_path = model.parent / f"{model.name}-serve.log"
    port = _free_port()
    command = _octavo("serve", str(model), "--host", "127.0.0.1", "--port", str(port))
    with log_path.open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_healthy(server, url)
        yield url
        _stop(server)
    except BaseException as error:
        server.terminate()
        if not isinstance(error, KeyboardInterrupt):
            print(f"   the end of {log_path}:", file=sys.stderr)
            for line in log_path.read_text(errors="replace").splitlines()[-20:]:
                print(f"   | {line}", file=sys.stderr)
        raise
    finally:
        try:
            server.wait(DRAIN_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _wait_until_healthy(server: subprocess.Popen[bytes], url: str) -> None:
    import httpx

    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise DemoError(f"the server ended with {server.returncode} before it was ready")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        time.sleep(0.05)
    raise DemoError(f"the server was not ready after {START_SECONDS:.0f} s")


def _stop(server: subprocess.Popen[bytes]) -> None:
    """SIGTERM, on which the server drains and ends by itself."""
    server.terminate()
    try:
        code = server.wait(DRAIN_SECONDS)
    except subprocess.TimeoutExpired:
        raise DemoError(f"the server did not end within {DRAIN_SECONDS:.0f} s of SIGTERM") from None
    if code not in (0, -15):
        raise DemoError(f"the server ended with {code} after SIGTERM")
    print("   stopped", flush=True)


def _client(url: str) -> Any:
    try:
        from openai import OpenAI
    except ImportError as error:
        raise DemoError(f"{error}: the demo needs more packages: pip install 'octavo[demo]'") from error
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


def _perplexity(url: str) -> float:
    """exp of the mean negative log-likelihood of a text, from the prompt's log-probabilities (echo)."""
    client = _client(url)
    text = "\n\n".join(import_module(name).__doc__ or "" for name in TEXT_MODULES)
    model = client.models.list().data[0].id
    completion = client.completions.create(model=model, prompt=text, max_tokens=0, echo=True, logprobs=0)
    logprobs = completion.choices[0].logprobs.token_logprobs[1:]  # nothing predicts the first token
    return math.exp(-sum(logprobs) / len(logprobs))


def _stream_answer(url: str, *, show: bool) -> float:
    """Ask through the official client, print the answer as it comes; returns tokens per second after the first."""
    client = _client(url)
    model = client.models.list().data[0].id
    begun = time.monotonic()
    first, usage = 0.0, None
    if show:
        print(f"\n   > {QUESTION}\n   ", end="", flush=True)
    for chunk in client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=200,
        stream=True,
        stream_options={"include_usage": True},
    ):
        usage = chunk.usage or usage
        piece = chunk.choices[0].delta.content if chunk.choices else None
        if piece:
            first = first or time.monotonic()
            if show:
                print(piece.replace("\n", "\n   "), end="", flush=True)
    ended = time.monotonic()
    if usage is None or usage.completion_tokens < 2:
        raise DemoError("the answer is empty")
    speed = (usage.completion_tokens - 1) / (ended - first)
    print("\n   " if show else "   ", end="")
    first_ms = (first - begun) * 1e3
    print(f"{usage.completion_tokens} tokens, the first after {first_ms:.0f} ms, then {speed:.0f} a second", flush=True)
    return float(speed)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
