"""Kills an engine under streams, again and again: how many streams are whole, and how long their clients wait.

    PYTHONPATH=src python -m benchmarks.takeover MODEL --rounds 200 -- --dtype float32 -dp 2 --num-threads 1

Each round sends the same requests, kills one engine with SIGKILL at a random time while they are answered, and compares
each stream with what it was in a round without a death. What follows `--` are flags of `octavo serve`. A pause is the
longest time between two events of a stream. Not part of octavo.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

PATIENCE = 300.0  # seconds
OWN = ("--port", "0", "--max-engine-restarts", "1000000")


@dataclass
class Answer:
    """One stream: its text, why it ended, and the longest time between two of its events."""

    text: str = ""
    finish_reason: str | None = None
    error: str = ""
    is_done: bool = False
    pause: float = 0.0

    @property
    def is_whole(self) -> bool:
        return self.is_done and self.finish_reason == "length" and not self.error

    def take(self, line: str) -> None:
        """One line of the stream."""
        if line == "data: [DONE]":
            self.is_done = True
        elif line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            self.error = self.error or event.get("error", {}).get("message", "")
            for choice in event.get("choices", ()):
                self.text += choice["text"]
                self.finish_reason = choice["finish_reason"] or self.finish_reason


async def answer(client: httpx.AsyncClient, prompt: str, max_tokens: int) -> Answer:
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    found = Answer()
    async with client.stream("POST", "/v1/completions", json=body) as response:
        last = 0.0
        async for line in response.aiter_lines():
            if line:
                now = time.monotonic()
                found.pause = max(found.pause, now - last) if last else 0.0
                last = now
                found.take(line)
    return found


async def one_round(
    client: httpx.AsyncClient, prompts: Sequence[str], max_tokens: int, death: Death | None
) -> list[Answer]:
    """All answers; where there is a death, it comes meanwhile."""
    tasks = [asyncio.create_task(answer(client, prompt, max_tokens)) for prompt in prompts]
    if death is not None:
        await asyncio.sleep(death.delay)
        death.happens = not all(task.done() for task in tasks)
        os.kill(death.pid, signal.SIGKILL)
    return await asyncio.gather(*tasks)


@dataclass
class Death:
    """Of an engine's process, so many seconds after the round's begin. happens: while there were streams."""

    pid: int
    delay: float
    happens: bool = False


def engine_pids(server: int) -> list[int]:
    """Of a server's engines."""
    children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    programs = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
    return [pid for pid, program in programs.items() if "octavo.runtime.process" in program]


async def all_up(client: httpx.AsyncClient) -> None:
    """Wait until every engine is."""
    while True:
        lines = (await client.get("/metrics")).text.splitlines()
        if all(line.endswith(" 1.0") for line in lines if line.startswith("octavo:engine_up{")):
            return
        await asyncio.sleep(0.1)


@dataclass
class Totals:
    """Over all rounds: streams, and those of them that were whole, and as they are without a death."""

    num_streams: int = 0
    num_whole: int = 0
    num_equal: int = 0
    num_deaths: int = 0  # that came while there were streams
    pauses: list[float] = field(default_factory=list)  # the longest one of each stream

    def add(self, found: Sequence[Answer], wanted: Sequence[Answer]) -> None:
        """What a round brought."""
        self.num_streams += len(found)
        self.num_whole += sum(one.is_whole for one in found)
        self.num_equal += sum(one.text == same.text for one, same in zip(found, wanted, strict=True))
        self.pauses += [one.pause for one in found]

    def __str__(self) -> str:
        pauses = sorted(self.pauses)
        middle = pauses[len(pauses) // 2]
        late = pauses[int(len(pauses) * 0.99)]
        return (
            f"{self.num_deaths} deaths, {self.num_streams} streams: {self.num_whole} whole, {self.num_equal} equal; "
            f"longest pause of a stream: median {middle:.2f}, p99 {late:.2f}, worst {pauses[-1]:.2f} s"
        )


async def measure(url: str, server: int, num_rounds: int, num_streams: int, max_tokens: int, seed: int) -> Totals:
    """Rounds against the server of this URL and process id."""
    rng = random.Random(seed)
    prompts = [f"Story {number}: once upon a time, in a town by the sea," for number in range(num_streams)]
    totals = Totals()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits) as client:
        await one_round(client, prompts, max_tokens, None)
        begin = time.monotonic()
        wanted = await one_round(client, prompts, max_tokens, None)
        seconds = time.monotonic() - begin
        print(f"without a death: {seconds:.2f} s, longest pause {max(one.pause for one in wanted):.2f} s", flush=True)
        for number in range(num_rounds):
            death = Death(rng.choice(engine_pids(server)), rng.uniform(0.05, 0.9) * seconds)
            totals.add(await one_round(client, prompts, max_tokens, death), wanted)
            totals.num_deaths += death.happens
            print(f"round {number + 1}: {totals}", flush=True)
            await all_up(client)
    return totals


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--streams", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    own = sys.argv[1:]
    flags: list[str] = []
    if "--" in own:
        place = own.index("--")
        own, flags = own[:place], own[place + 1 :]
    args = parser.parse_args(own)
    command = [sys.executable, "-P", "-m", "octavo", "serve", args.model, *OWN, *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        try:
            url = next((found[1] for line in process.stdout if (found := re.search(r"serving on (\S+)", line))), "")
            if not url:
                raise SystemExit("the server did not start")
            threading.Thread(target=process.stdout.read, daemon=True).start()  # a full pipe would hold the server up
            print(asyncio.run(measure(url, process.pid, args.rounds, args.streams, args.tokens, args.seed)))
        finally:
            process.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main())
