"""Routing rules on a recorded trace: time to first token, prefix hits, and what deaths of replicas cost.

    PYTHONPATH=src python -m benchmarks.router_sim TRACE.jsonl.gz
    PYTHONPATH=src python -m benchmarks.router_sim TRACE.jsonl.gz --copies 128 --replicas 1024 --seconds 900 \
        --cells 16 64 128

TRACE is Mooncake's (https://github.com/kvcache-ai/Mooncake, FAST25-release/traces, Apache-2.0): a line is a JSON object
with `timestamp` in ms, `input_length`, `output_length` and `hash_ids`, a name for each 512 tokens of the prompt and all
before them. octavo's rule runs as it is in the server (server/fleet/policy.py). Replicas are router_replicas.py's.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.router_replicas import BLOCK_TOKENS, Cache, Replica, Request, Rule, Simulation
from benchmarks.router_rules import CacheAware, Cells, Octavo, RayPrefix, TwoChoices, WaitingTokens


@dataclass(frozen=True)
class Setting:
    """What all rules of a table have in common. misjudged: how far measured rates may be off (0.5: by half)."""

    num_replicas: int
    rate: float
    cache_tokens: int
    misjudged: float = 0.0
    deaths: tuple[tuple[float, int], ...] = ()


def read(trace: Path, num_copies: int, seconds: float) -> list[Request]:
    """The requests of the trace's first seconds, by arrival; further copies have other prompts and other moments.

    The trace's clock ticks every 3 s; requests are spread over the tick.
    """
    opened = gzip.open if trace.suffix == ".gz" else open
    with opened(trace, "rt", encoding="utf-8") as lines:
        entries = [entry for entry in map(json.loads, lines) if entry["timestamp"] < seconds * 1000]
    draw = random.Random(0)
    requests = [
        Request(
            key=f"{copy}-{number}",
            arrival=entry["timestamp"] / 1000 + draw.uniform(0, 3),
            num_tokens=entry["input_length"],
            num_answer_tokens=max(1, entry["output_length"]),
            blocks=[b"%d-%d" % (copy, name) for name in entry["hash_ids"][: entry["input_length"] // BLOCK_TOKENS]],
        )
        for copy in range(num_copies)
        for number, entry in enumerate(entries)
    ]
    return sorted(requests, key=lambda request: request.arrival)


def rules(setting: Setting) -> dict[str, Callable[[int], Rule]]:
    """By name, what makes a rule for so many replicas."""
    believed = random.Random(1)

    def octavo(routing: str) -> Callable[[int], Rule]:
        return lambda count: Octavo(
            count,
            setting.cache_tokens,
            routing,
            [believed.uniform(1 - setting.misjudged, 1 + setting.misjudged) for _ in range(count)],
        )

    return {
        "round robin (--routing round-robin)": octavo("round-robin"),
        "least requests (--routing least-loaded)": octavo("least-loaded"),
        "two choices": lambda count: TwoChoices(count, random.Random(2)),
        "SGLang's cache_aware": lambda count: CacheAware(count, random.Random(2)),
        "Ray's prefix rule": lambda count: RayPrefix(count, random.Random(2)),
        "least waiting tokens": lambda count: WaitingTokens(count, random.Random(2)),
        "**octavo (--routing prefix)**": octavo("prefix"),
    }


def row(name: str, requests: list[Request], setting: Setting, rule: Rule) -> str:
    """Run one rule over fresh replicas, and say how it went."""
    begin = time.process_time()
    fresh = [Request(each.key, each.arrival, each.num_tokens, each.num_answer_tokens, each.blocks) for each in requests]
    replicas = [Replica(number, setting.rate, Cache(setting.cache_tokens)) for number in range(setting.num_replicas)]
    Simulation(fresh, replicas, rule, list(setting.deaths)).run()
    waits = [each.first_token - each.arrival for each in fresh if each.first_token is not None]
    assert len(waits) == len(fresh), "a request got no token"
    percentiles = statistics.quantiles(waits, n=100)
    hits = sum(each.num_cached for each in fresh) / sum(each.num_tokens for each in fresh)
    cells = [
        f"{statistics.mean(waits):.2f}",
        f"{percentiles[49]:.2f}",
        f"{percentiles[98]:.1f}",
        f"{hits:.1%}",
        str(sum(each.num_moves > 0 for each in fresh)),
        f"{max(each.longest_pause for each in fresh):.1f}",
        f"{(time.process_time() - begin) / len(fresh) * 1e6:.0f}",
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


HEADER = (
    "| rule | mean TTFT, s | median | p99 | prefix hits | moved | longest pause, s | simulated in, us a request |"
    "\n|---|---|---|---|---|---|---|---|"
)


def deaths_of(num_replicas: int, seconds: float, count: int) -> tuple[tuple[float, int], ...]:
    draw = random.Random(3)
    return tuple((draw.uniform(0, seconds), draw.randrange(num_replicas)) for _ in range(count))


def small(requests: list[Request], arguments: argparse.Namespace) -> None:
    """The tables of one cell: all rules; rates misjudged; a larger cache; deaths."""
    base = Setting(arguments.replicas, arguments.rate, arguments.cache_tokens)
    deaths = deaths_of(arguments.replicas, arguments.seconds, arguments.deaths)
    tables = {"as it is": base}
    variants = {
        "each replica's rate known to within 50%": Setting(base.num_replicas, base.rate, base.cache_tokens, 0.5),
        "four times the cache": Setting(base.num_replicas, base.rate, 4 * base.cache_tokens),
        f"{arguments.deaths} deaths, each for 30 s": Setting(
            base.num_replicas, base.rate, base.cache_tokens, deaths=deaths
        ),
    }
    if not arguments.plain:
        tables |= variants
    for title, setting in tables.items():
        print(f"\n{title}:\n\n{HEADER}")
        for name, rule in rules(setting).items():
            if setting.misjudged == 0 or "octavo" in name:
                print(row(name, requests, setting, rule(setting.num_replicas)), flush=True)


def region(requests: list[Request], arguments: argparse.Namespace) -> None:
    """The table of a region: cells of several sizes behind a hash, beside one rule over all."""
    setting = Setting(arguments.replicas, arguments.rate, arguments.cache_tokens)
    available = rules(setting)
    own = available["**octavo (--routing prefix)**"]
    print(f"\n{arguments.replicas} replicas:\n\n{HEADER}")
    print(row("two choices over all", requests, setting, available["two choices"](setting.num_replicas)), flush=True)
    for size in arguments.cells:
        rule = Cells(setting.num_replicas, size, own)
        print(row(f"**cells of {size}, octavo in each**", requests, setting, rule), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, help="a trace in Mooncake's form, .jsonl or .jsonl.gz")
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--rate", type=float, default=8000, help="prompt tokens that a replica computes in a second")
    parser.add_argument("--cache-tokens", type=int, default=500_000, help="what a replica's prefix cache holds")
    parser.add_argument("--copies", type=int, default=1, help="so many times the trace, each with prompts of its own")
    parser.add_argument("--seconds", type=float, default=3600, help="of the trace")
    parser.add_argument("--deaths", type=int, default=20, help="of replicas, at random moments")
    parser.add_argument("--plain", action="store_true", help="the first table alone")
    parser.add_argument("--cells", type=int, nargs="+", help="compare cells of these sizes, and no rules")
    arguments = parser.parse_args()
    requests = read(arguments.trace, arguments.copies, arguments.seconds)
    tokens = sum(each.num_tokens for each in requests)
    busy = tokens / arguments.seconds / arguments.rate / arguments.replicas
    print(
        f"{len(requests):,} requests of {tokens / len(requests):,.0f} prompt tokens in {arguments.seconds:.0f} s; "
        f"{arguments.replicas} replicas of {arguments.rate:,.0f} prompt tokens/s, with prefix caches of "
        f"{arguments.cache_tokens:,} tokens; without hits {busy:.0%} of their time is needed"
    )
    (region if arguments.cells else small)(requests, arguments)


if __name__ == "__main__":
    main()
