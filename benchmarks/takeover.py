"""Kills what serves 40 streams, again and again: how many streams are whole, and how long their clients wait.

    PYTHONPATH=src python -m benchmarks.takeover MODEL --rounds 200 -- --dtype float32
    PYTHONPATH=src python -m benchmarks.takeover MODEL --front sglang-router --rounds 20 -- --dtype float32
    PYTHONPATH=src python -m benchmarks.takeover MODEL --front ray --rounds 20 -- --dtype float32

Each round sends the same requests at once, and kills with SIGKILL at a random time while they are answered: in a cell
(`octavo serve -dp 2`) an engine, behind a gateway a server, under Ray Serve a replica (benchmarks/fronts.py). Between
deaths, when what was killed is up again, there are quiet rounds: in float32 every answer must be the first round's; in
narrower types some differ without a death too. What follows `--` are flags of `octavo serve`.

Each round is a line of FILE (`--rounds-file`), where a later run goes on until there are as many with a death as
`--rounds` says; `--table` prints what is there. A stream is whole, or cut (it had begun), or failed (it had not). A
pause is the longest time between two events of a stream. Intervals: 95 %, over rounds drawn again. Not part of octavo.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import httpx
from benchmarks.fronts import FRONTS, Front
from benchmarks.intervals import interval

PATIENCE = 300.0  # seconds
EARLIEST = 0.05  # of a round's length without a death, when the death comes
LATEST = 0.9


@dataclass
class Answer:
    """One stream: its text, why it ended, the longest time between two of its events, and that before the first."""

    text: str = ""
    finish_reason: str | None = None
    error: str = ""
    is_done: bool = False
    num_events: int = 0
    pause: float = 0.0
    first: float = 0.0

    @property
    def outcome(self) -> str:
        """What the client has of it."""
        if self.is_done and self.finish_reason == "length" and not self.error:
            return "whole"
        return "cut" if self.num_events else "failed"

    def take(self, line: str) -> None:
        """One line of the stream."""
        if line == "data: [DONE]":
            self.is_done = True
        elif line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            self.error = self.error or str((event.get("error") or {}).get("message", ""))
            for choice in event.get("choices", ()):
                self.num_events += 1
                self.text += choice["text"]
                self.finish_reason = choice["finish_reason"] or self.finish_reason


async def answer(client: httpx.AsyncClient, prompt: str, max_tokens: int) -> Answer:
    """A stream to its end, whatever that is."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    found = Answer()
    begun = last = time.monotonic()
    with suppress(httpx.HTTPError):  # a connection that breaks is an outcome too
        async with client.stream("POST", "/v1/completions", json=body | {"model": "m"}) as response:
            if response.status_code != 200:
                found.error = f"HTTP {response.status_code}"
                return found
            async for line in response.aiter_lines():
                if line:
                    now = time.monotonic()
                    found.first = found.first or now - begun
                    found.pause = max(found.pause, now - last) if found.num_events else 0.0
                    last = now
                    found.take(line)
    return found


@dataclass
class Round:
    """What became of each stream of a round. seconds: from its begin to the last stream's end.

    death: seconds after the begin; None in a quiet round. is_late: no stream was open any more.
    pauses: before the first event too, where that came after the death.
    """

    front: str
    flags: str
    death: float | None
    is_late: bool
    outcomes: list[str]
    equal: list[bool]
    pauses: list[float]
    seconds: float

    def share(self, outcome: str) -> float:
        """Of the streams, those that came out like this."""
        return self.outcomes.count(outcome) / len(self.outcomes)

    @property
    def equal_share(self) -> float:
        """Of the whole streams, those that say what they said in the first round."""
        equal = [same for outcome, same in zip(self.outcomes, self.equal, strict=True) if outcome == "whole"]
        return sum(equal) / len(equal) if equal else 1.0


class Rounds:
    """Rounds with the same requests."""

    def __init__(self, front: Front, flags: str, prompts: Sequence[str], max_tokens: int) -> None:
        self._front = front
        self._flags = flags
        self._prompts = prompts
        self._max_tokens = max_tokens
        self._wanted: list[Answer] = []
        self.length = 0.0  # seconds without a death

    async def prepare(self) -> None:
        """What is compiled or cached at first, and then the answers that all later ones are compared with."""
        await self._answers(None, nothing)
        begun = time.monotonic()
        self._wanted, _ = await self._answers(None, nothing)
        self.length = time.monotonic() - begun
        unlike = [one.outcome for one in self._wanted if one.outcome != "whole"]
        if unlike:
            raise SystemExit(f"without a death {len(unlike)} streams are {sorted(set(unlike))}: {self._wanted[0]}")

    async def play(self, death: float | None, kill: Callable[[], None]) -> Round:
        """One round, in which `kill` is called after so many seconds."""
        begun = time.monotonic()
        found, is_late = await self._answers(death, kill)
        seconds = time.monotonic() - begun
        same = [one.text == wanted.text for one, wanted in zip(found, self._wanted, strict=True)]
        pauses = [max(one.pause, one.first - death if death else 0.0) for one in found]
        pauses = [round(pause, 3) for pause in pauses]
        outcomes = [one.outcome for one in found]
        return Round(self._front.name, self._flags, death, is_late, outcomes, same, pauses, round(seconds, 2))

    async def _answers(self, death: float | None, kill: Callable[[], None]) -> tuple[list[Answer], bool]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        is_late = False
        async with httpx.AsyncClient(base_url=self._front.url, timeout=PATIENCE, limits=limits) as client:
            tasks = [asyncio.create_task(answer(client, prompt, self._max_tokens)) for prompt in self._prompts]
            if death is not None:
                await asyncio.sleep(death)
                is_late = all(task.done() for task in tasks)
                kill()
            return await asyncio.gather(*tasks), is_late


def nothing() -> None:
    """What dies in a quiet round."""


@dataclass(frozen=True)
class Plan:
    """rounds: with a death. quiet_every: so many of them have a quiet one between them. seed: of the times."""

    rounds: int = 200
    quiet_every: int = 4
    streams: int = 40
    tokens: int = 32
    seed: int = 0


async def measure(front: Front, flags: str, plan: Plan, tell: Callable[[Round], object]) -> None:
    """All rounds of a plan."""
    prompts = [f"Story {number}: once upon a time, in a town by the sea," for number in range(plan.streams)]
    rounds = Rounds(front, flags, prompts, plan.tokens)
    await rounds.prepare()
    rng = random.Random(plan.seed)
    for number in range(plan.rounds):
        death = rng.uniform(EARLIEST, LATEST) * rounds.length
        victim = rng.randrange(2)
        tell(await rounds.play(death, partial(front.kill, victim)))
        await front.all_up()
        if number % plan.quiet_every == 0:
            tell(await rounds.play(None, nothing))


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def table(rounds: Sequence[Round]) -> str:
    """One row for each front and its flags."""
    lines = [
        "| who serves | deaths | streams | whole, % | cut, % | failed, % | of the whole ones equal, % "
        "| equal without a death, % | longest pause of a stream: median, p99, worst, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for front, flags in dict.fromkeys((one.front, one.flags) for one in rounds):
        mine = [one for one in rounds if (one.front, one.flags) == (front, flags)]
        deadly = [one for one in mine if one.death is not None and not one.is_late]
        quiet = [one for one in mine if one.death is None]
        if not deadly:
            continue
        cells = [f"{front}, `{flags}`", str(len(deadly)), str(sum(len(one.outcomes) for one in deadly))]
        cells += [percent([one.share(outcome) for one in deadly]) for outcome in ("whole", "cut", "failed")]
        cells += [percent([one.equal_share for one in some]) if some else "" for some in (deadly, quiet)]
        whole = [
            pause
            for one in deadly
            for pause, outcome in zip(one.pauses, one.outcomes, strict=True)
            if outcome == "whole"
        ]
        cells.append(", ".join(f"{quantile(whole, share):.2f}" for share in (0.5, 0.99, 1.0)) if whole else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def percent(shares: Sequence[float]) -> str:
    """The mean of rounds, and its interval where they differ."""
    mean = 100 * statistics.fmean(shares)
    if min(shares) == max(shares):
        return f"{mean:g}"
    low, high = interval(shares)
    return f"{mean:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def read_rounds(path: Path) -> list[Round]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [Round(**json.loads(line)) for line in lines]


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Our own, and those of `octavo serve`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--front", choices=sorted(FRONTS), default="cell", help="who serves (default cell)")
    parser.add_argument("--rounds", type=int, default=Plan.rounds, help="with a death (default %(default)s)")
    parser.add_argument("--quiet-every", type=int, default=Plan.quiet_every, help="deaths to one (default %(default)s)")
    parser.add_argument("--streams", type=int, default=Plan.streams, help="(default %(default)s)")
    parser.add_argument("--tokens", type=int, default=Plan.tokens, help="of each answer (default %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of the times; default: how many rounds there are")
    parser.add_argument("--rounds-file", type=Path, default=Path("takeover.jsonl"), metavar="FILE")
    parser.add_argument("--table", action="store_true", help="print what the file has, and measure nothing")
    parser.add_argument("--gateways", type=Path, default=Path(".gateways"), help="an environment with sglang-router")
    parser.add_argument("--ray-python", type=Path, default=Path(".ray/bin/python"), help="a Python with ray[serve]")
    own = sys.argv[1:]
    flags: list[str] = []
    if "--" in own:
        place = own.index("--")
        own, flags = own[:place], own[place + 1 :]
    args = parser.parse_args(own)
    if args.model is None and not args.table:
        parser.error("name a model")
    return args, flags


def main() -> int:
    args, flags = parse_arguments()
    if not args.table:
        with suppress(KeyboardInterrupt):  # what is in the file by then is kept
            add_rounds(args, flags)
    print(table(read_rounds(args.rounds_file)))
    print(f"\n{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    return 0


def add_rounds(args: argparse.Namespace, flags: Sequence[str]) -> None:
    """Write those to the file that it lacks."""
    said = " ".join(flags)
    done = [one for one in read_rounds(args.rounds_file) if (one.front, one.flags) == (args.front, said)]
    missing = args.rounds - sum(one.death is not None for one in done)
    seed = len(done) if args.seed is None else args.seed
    plan = Plan(missing, args.quiet_every, args.streams, args.tokens, seed)

    def tell(one: Round) -> None:
        with args.rounds_file.open("a") as file:
            file.write(json.dumps(asdict(one)) + "\n")
        counts = {outcome: one.outcomes.count(outcome) for outcome in sorted(set(one.outcomes))}
        print(one.death, counts, sum(one.equal), f"equal, pause {max(one.pauses)} of {one.seconds} s", flush=True)

    if missing > 0:
        options = {"gateways": args.gateways, "ray_python": args.ray_python}
        with FRONTS[args.front](args.model, flags, options) as front:
            asyncio.run(measure(front, said, plan, tell))


if __name__ == "__main__":
    sys.exit(main())
