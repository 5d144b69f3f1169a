"""Ten thousand malformed requests: every one is refused with a 4xx (or is valid after all), and the server lives on.

    python -m benchmarks.fuzz MODEL [--requests 10000] [--seed 0] [--url URL] [--findings FILE]

Starts `octavo serve MODEL` (or takes a running server's --url), runs schemathesis over its OpenAPI document, then the
cases of fuzz_cases.py. A finding is a 5xx, a hang, a connection that ends without an answer to whole HTTP, an error of
the server's in a stream, a 200 for what can't be right, or a good request that fails afterwards. At the end the
server must be idle: nothing running, nothing waiting, no KV block in use. Exit status 1 if there are findings.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import random
import re
import shlex
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.cpu_servers import NAME, Running, octavo_server, running
from benchmarks.fuzz_cases import PROMPT, Case, random_case

CONCURRENT = 8
HANG_SECONDS = 60.0
CHECK_EVERY = 500


@dataclass
class Findings:
    """What was seen: a count for each kind and status, and what was wrong, each kind of wrong a few times only."""

    counts: collections.Counter[tuple[str, str]] = field(default_factory=collections.Counter)
    wrong: dict[str, list[str]] = field(default_factory=dict)

    def add(self, what: str, case: Case, answer: str = "") -> None:
        examples = self.wrong.setdefault(f"{what}: {case.kind} on {case.path[:40]}", [])
        if len(examples) < 3:
            examples.append(f"{curl(case)}\n# {answer[:300]!r}")
        else:
            examples[-1] = examples[-1].split("\n# and ")[0] + "\n# and more"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a checkpoint to serve; a tiny one makes this fast")
    parser.add_argument("--requests", type=int, default=10_000, help="of fuzz_cases.py (default 10000)")
    parser.add_argument("--examples", type=int, default=150, help="of schemathesis, for each operation (default 150)")
    parser.add_argument("--seed", type=int, default=0, help="of the cases (default 0)")
    parser.add_argument("--url", help="a server that runs already; MODEL is not served then")
    parser.add_argument(
        "--findings", type=Path, help="where the findings are written, as curl lines (default: printed)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        server = octavo_server("octavo", args.model, "--max-model-len", "512")
        with contextlib.nullcontext(Running(args.url, 0, 0, 0)) if args.url else running(server, log) as run:
            findings = Findings()
            if args.examples:
                run_schemathesis(run.url, args, findings)
            asyncio.run(run_cases(run.url, args, findings))
            check_idle(run.url, findings)
        tracebacks = log.read_text(errors="replace").count("Traceback") if log.exists() else 0
    report(findings, tracebacks, args)


def run_schemathesis(url: str, args: argparse.Namespace, findings: Findings) -> None:
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json", "--no-color"]
    command += [
        "--checks",
        "not_a_server_error",
        "--mode",
        "all",
        "--max-examples",
        str(args.examples),
        "--workers",
        "2",
    ]
    command += ["--seed", str(args.seed), "--request-timeout", str(int(HANG_SECONDS)), "--continue-on-failure"]
    with tempfile.TemporaryDirectory() as folder:  # it keeps a database of examples where it runs
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    cases = re.search(r"(\d[\d,]*) (?:test cases )?generated", result.stdout)
    findings.counts["schemathesis", "test cases"] += int(cases.group(1).replace(",", "")) if cases else 0
    print("\n".join(result.stdout.splitlines()[-25:]), flush=True)
    if result.returncode != 0:
        findings.wrong["schemathesis"] = [result.stdout[-6000:] + result.stderr[-1000:]]


async def run_cases(url: str, args: argparse.Namespace, findings: Findings) -> None:
    rng = random.Random(args.seed)
    pending: set[asyncio.Task[None]] = set()
    for number in range(args.requests):
        if number % CHECK_EVERY == 0:
            await asyncio.gather(*pending)
            pending.clear()
            await check_good(url, findings)
            print(f"{number} cases, {len(findings.wrong)} kinds of findings", file=sys.stderr, flush=True)
        pending.add(asyncio.create_task(judge(url, random_case(rng), findings)))
        if len(pending) >= CONCURRENT:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.gather(*done)  # an error of our own ends the run
    await asyncio.gather(*pending)
    await check_good(url, findings)


async def judge(url: str, case: Case, findings: Findings) -> None:
    begun = time.monotonic()
    try:
        answer = await asyncio.wait_for(send(url, case), HANG_SECONDS)
    except TimeoutError:
        findings.counts[case.kind, "hang"] += 1
        findings.add("hang", case)
        return
    except ConnectionError as error:
        answer = f"{type(error).__name__}".encode()
    status = answer[9:12].decode() if answer.startswith(b"HTTP/1.") else "none"
    findings.counts[case.kind, status if case.hang_up_after is None else "hung up"] += 1
    text = answer.decode(errors="replace")
    excused = case.hang_up_after is not None or case.send_only is not None or case.raw is not None
    if status.startswith("5"):
        findings.add(f"status {status}", case, text)
    elif status == "none" and not excused:
        findings.add("no answer", case, text)
    elif status == "200" and '"server_error"' in text:
        findings.add("error in a stream", case, text)
    elif status.startswith("2") and case.refused:
        findings.add("accepted", case, text.partition("\r\n\r\n")[2])
    elif time.monotonic() - begun > HANG_SECONDS / 4:
        findings.add("slow", case, f"{time.monotonic() - begun:.0f} s")


async def send(url: str, case: Case) -> bytes:
    """All bytes of the answer, or as many as the case reads before it hangs up."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        writer.write(wire(case))
        with contextlib.suppress(OSError):  # the server may have hung up already, which is its right
            if case.send_only is not None or case.raw is not None:
                writer.write_eof()
            await writer.drain()
        if case.hang_up_after is not None:
            return await reader.read(case.hang_up_after) if case.hang_up_after else b""
        answer = b""
        while piece := await reader.read(1 << 16):
            answer += piece
        return answer
    finally:
        writer.close()


def wire(case: Case) -> bytes:
    if case.raw is not None:
        return case.raw
    head = f"{case.method} {case.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
    head += (
        "".join(f"{name}: {value}\r\n" for name, value in case.headers) + f"Content-Length: {len(case.body)}\r\n\r\n"
    )
    return head.encode() + case.body[: case.send_only]


async def check_good(url: str, findings: Findings) -> None:
    """The server still answers what is right, with what it always answers."""
    body = {"model": NAME, "prompt": PROMPT, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    case = Case("good request", "/v1/completions", json.dumps(body).encode())
    answer = await asyncio.wait_for(send(url, case), HANG_SECONDS)
    if not answer.startswith(b"HTTP/1.1 200"):
        findings.add("good request fails", case, answer.decode(errors="replace"))
    findings.counts[case.kind, answer[9:12].decode()] += 1


def check_idle(url: str, findings: Findings) -> None:
    """Within seconds of the last request nothing runs, nothing waits, and no block is held."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    deadline = time.monotonic() + 15
    while True:
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        values = {line.split("{")[0].split()[0]: float(line.split()[-1]) for line in lines if line.startswith(names)}
        if len(values) == len(names) and not any(values.values()):
            return
        if time.monotonic() > deadline:
            findings.wrong["not idle at the end"] = [json.dumps(values)]
            return
        time.sleep(0.2)


def curl(case: Case) -> str:
    """A line that does it again; long bodies are cut, since their length is what they are about."""
    if case.raw is not None:
        return f"printf %b {shlex.quote(_escaped(case.raw))} | nc 127.0.0.1 8000"
    flags = "".join(f" -H {shlex.quote(f'{name}: {value}')}" for name, value in case.headers)
    return f"curl -sS -X {case.method}{flags} http://127.0.0.1:8000{case.path[:200]} -d $'{_escaped(case.body)}'"


def _escaped(data: bytes) -> str:
    shown = data[:1500].decode("latin-1").encode("unicode_escape").decode().replace("'", "\\'")
    return shown if len(data) <= 1500 else f"{shown}...({len(data)} bytes)"


def report(findings: Findings, tracebacks: int, args: argparse.Namespace) -> None:
    kinds = sorted({kind for kind, _ in findings.counts})
    for kind in kinds:
        statuses = {status: count for (k, status), count in sorted(findings.counts.items()) if k == kind}
        print(f"{kind:<20} " + "  ".join(f"{status}: {count}" for status, count in statuses.items()))
    print(f"tracebacks in the server's log: {tracebacks}")
    text = "\n".join(f"## {what}\n" + "\n".join(examples) + "\n" for what, examples in findings.wrong.items())
    if args.findings:
        args.findings.write_text(text)
    elif text:
        print(text)
    print(f"{len(findings.wrong)} kinds of findings")
    sys.exit(1 if findings.wrong else 0)


if __name__ == "__main__":
    main()
