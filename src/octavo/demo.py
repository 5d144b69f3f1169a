"""All steps in one go: get a real model, quantize it, serve it, and stream an answer.

    python -m octavo.demo

It does what a person would do, with the same commands (`octavo quantize`, `octavo serve`) and the official `openai`
client. It shows W8A8: no options are needed, every linear layer takes half the bytes, and a CPU computes no scheme
faster. The report that it prints says how much quality that costs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from octavo.calibration.report.file_names import REPORT
from octavo.calibration.report.report import ReportError, read_report
from octavo.calibration.report.terminal import print_report
from octavo.demo_models import DEMO_MODELS, DemoError, fetch_model

QUESTION = "Why is the sky blue? Answer in three sentences."
START_SECONDS = 180.0
DRAIN_SECONDS = 45.0


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
            quantized = args.models / f"{model.name}-{args.scheme.lower()}"
            _quantize(model, quantized, args.scheme)
            _serve(quantized)
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


def _quantize(model: Path, quantized: Path, scheme: str) -> None:
    """`octavo quantize`, which prints what it saved and cost; the report of an earlier run is printed again."""
    report = quantized / REPORT
    if report.is_file():
        print(f"2. Quantized to {scheme}: {quantized} is there already", flush=True)
        try:
            print_report(read_report(report), Console())
        except ReportError as error:
            raise DemoError(f"{report}: {error}; remove {quantized} to have it made anew") from error
        return
    command = _octavo("quantize", str(model), "--output", str(quantized), "--scheme", scheme)
    print(f"2. Quantize: octavo {' '.join(command[3:])}", flush=True)
    if subprocess.run(command, check=False).returncode != 0:
        raise DemoError("octavo quantize failed; its message stands above")


def _serve(model: Path) -> None:
    print(f"3. Serve: octavo serve {model}", flush=True)
    begun = time.monotonic()
    with _served(model) as url:
        print(f"   ready after {time.monotonic() - begun:.1f} s; an answer through the openai client:", flush=True)
        _stream_answer(url)
    print("   stopped", flush=True)


def _octavo(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "octavo", *arguments]


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


def _client(url: str) -> Any:
    try:
        from openai import OpenAI
    except ImportError as error:
        raise DemoError(f"{error}: the demo needs more packages: pip install 'octavo[demo]'") from error
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


def _stream_answer(url: str) -> None:
    """Ask through the official client, and print the answer as it comes, and how fast it came."""
    client = _client(url)
    model = client.models.list().data[0].id
    begun = time.monotonic()
    first = 0.0
    usage = None
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
            print(piece.replace("\n", "\n   "), end="", flush=True)
    ended = time.monotonic()
    if usage is None or usage.completion_tokens < 2:
        raise DemoError("the answer is empty")
    speed = (usage.completion_tokens - 1) / (ended - first)
    first_ms = (first - begun) * 1e3
    print(
        f"\n\n   {usage.completion_tokens} tokens, the first after {first_ms:.0f} ms, then {speed:.0f} a second",
        flush=True,
    )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
