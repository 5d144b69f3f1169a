"""The servers that benchmarks compare: how each is started, when it is ready, and how it is stopped."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

NAME = "smollm2"
LLAMA_TOKENS = 32768  # that 128 short streams have together in llama.cpp's cache
IGNORE_EOS = '{"ignore_eos": true}'
START_SECONDS = 300
STOP_SECONDS = 60


@dataclass(frozen=True)
class Server:
    """One row of the table. `command` has a place for the port; `ready` is a path that answers 200 once it serves."""

    name: str
    command: tuple[str, ...]
    ready: str = "/health"
    extra: str = IGNORE_EOS  # fields of each request
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Running:
    url: str
    pid: int
    health_seconds: float
    first_token_seconds: float


def servers(args: argparse.Namespace) -> list[Server]:
    """The rows that the command line asks for, in the order of the table."""
    length = ("--max-model-len", str(args.context))
    int8_head = ("--lm-head-dtype", "int8")
    rows = [octavo_server("octavo bf16", args.model, *length)]
    if args.w8a8:
        rows.append(octavo_server("octavo W8A8", args.w8a8, *length))
        rows.append(octavo_server("octavo W8A8, int8 head", args.w8a8, *length, *int8_head))
        for name, dtype in (("int8", "int8"), ("fp8", "fp8_e4m3")):
            rows.append(octavo_server(f"octavo W8A8, {name} KV", args.w8a8, *length, "--kv-cache-dtype", dtype))
    if args.w4a16:
        rows.append(octavo_server("octavo W4A16 g64", args.w4a16, *length))
        rows.append(octavo_server("octavo W4A16 g64, int8 head", args.w4a16, *length, *int8_head))
    if args.vllm_python:
        rows.append(vllm_server("vLLM-CPU bf16", args.model, args))
        if args.vllm_w8a8:
            rows.append(vllm_server("vLLM-CPU W8A8", args.w8a8, args))
    if args.llama_server:
        rows += [_llama(f"llama.cpp {path.stem.rsplit('.', 1)[-1]}", path, args) for path in args.gguf]
    return [row for row in rows if not args.only or any(re.search(word, row.name) for word in args.only)]


def octavo_server(name: str, model: Path, *flags: str) -> Server:
    """`octavo serve` with this python, and the KV cache that the peers get."""
    command = (sys.executable, "-m", "octavo", "serve", str(model), "--host", "127.0.0.1", "--port", "{port}")
    common = ("--served-model-name", NAME, "--max-model-len", "2048", "--kv-cache-memory-bytes", str(1 << 30))
    return Server(name, (*command, *common, *flags))


def vllm_server(name: str, model: Path, args: argparse.Namespace) -> Server:
    """As vLLM's own guide for CPUs advises: tcmalloc and Intel's OpenMP preloaded. It binds a thread to each core."""
    command = (args.vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model))
    common = ("--host", "127.0.0.1", "--port", "{port}", "--served-model-name", NAME)
    length = ("--max-model-len", str(args.context), "--dtype", "bfloat16")
    return Server(name, (*command, *common, *length), environment=vllm_environment(args.vllm_preload))


def vllm_environment(preload: str) -> dict[str, str]:
    """What vLLM on a CPU is told beside its options: as much KV cache as octavo has, and no network."""
    return {
        "LD_PRELOAD": preload,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def _llama(name: str, gguf: Path, args: argparse.Namespace) -> Server:
    """llama.cpp's own server: as many slots as there are streams, over one cache of keys and values."""
    command = (str(args.llama_server), "--model", str(gguf), "--alias", NAME, "--host", "127.0.0.1", "--port", "{port}")
    threads = str(len(os.sched_getaffinity(0)))
    flags = ("--threads", threads, "--threads-batch", threads, "--parallel", "128", "--kv-unified")
    return Server(name, (*command, *flags, "--ctx-size", str(max(args.context, LLAMA_TOKENS))))


@contextlib.contextmanager
def running(server: Server, log_path: Path) -> Iterator[Running]:
    """Start it, wait until it is healthy and has given a first token, and stop it by SIGTERM when the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [part.format(port=port) for part in server.command]
    url = f"http://127.0.0.1:{port}"
    with log_path.open("w") as log:
        begun = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | server.environment,
            start_new_session=True,
        )
    try:
        _wait(process, f"{url}{server.ready}", begun, log_path)
        health_seconds = time.perf_counter() - begun
        body = {"model": NAME, "prompt": "Once upon a time", "max_tokens": 1, "temperature": 0}
        _post(f"{url}/v1/completions", body)
        yield Running(url, process.pid, health_seconds, time.perf_counter() - begun)
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, begun: float, log_path: Path) -> None:
    while time.perf_counter() - begun < START_SECONDS:
        if process.poll() is not None:
            break
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(url, timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.02)
    tail = "\n".join(log_path.read_text(errors="replace").splitlines()[-15:])
    raise SystemExit(f"{url} did not answer; exit status {process.poll()}; the end of its log:\n{tail}")


def _post(url: str, body: dict[str, object]) -> None:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        answer.read()
