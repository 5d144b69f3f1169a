"""What a routing choice costs: microseconds of one core, by engines in the cell and by length of the prompt.

    PYTHONPATH=src python -m benchmarks.router_choice

Every engine's index is full of other prompts, half of the prompt is cached on some of the engines, and each engine has
work, so that no shortcut is taken. `names` is hashing the prompt's tokens, which happens once whatever the number of
engines; `choice` is all the rest of `Router.route`; `rest` is what follows: the first output, a step, and the end. Each
figure is the 10th percentile, since other processes disturb so short a time more often than not on a shared machine.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

from octavo.server.fleet.policy import Router
from octavo.server.fleet.prefix_index import PIECE_TOKENS, piece_names


def filled(num_engines: int, cache_pieces: int, draw: random.Random) -> Router:
    """A router of engines that are busy, and whose caches are full."""
    router = Router(num_engines)
    for engine in range(num_engines):
        router.opened(engine, cache_pieces * PIECE_TOKENS)
        router.stepped(engine, draw.randrange(6000, 10000), 1.0)
    for number in range(num_engines * (cache_pieces // 100 + 3)):
        names = [draw.randbytes(32) for _ in range(100)]
        router.route(f"old {number}", 100 * PIECE_TOKENS, names)
        if number % 4:
            router.begun(f"old {number}", 0)
            router.ended(f"old {number}")
    return router


def measure(router: Router, num_tokens: int, rounds: int, draw: random.Random) -> list[float]:
    """The 10th percentile of microseconds of naming, choosing and following a prompt to its end."""
    times: list[list[float]] = [[], [], []]
    shared = [draw.randrange(1 << 17) for _ in range(num_tokens // 2)]
    for number in range(rounds):
        tokens = shared + [draw.randrange(1 << 17) for _ in range(num_tokens - len(shared))]
        begin = time.perf_counter()
        names = piece_names(tokens)
        named = time.perf_counter()
        choice = router.route(f"{number}", num_tokens, names)
        chosen = time.perf_counter()
        assert choice is not None
        router.stepped(choice.engine, 500, 0.1)
        router.begun(f"{number}", choice.num_cached)
        router.ended(f"{number}")
        end = time.perf_counter()
        for kind, seconds in zip(times, (named - begin, chosen - named, end - chosen), strict=True):
            kind.append(seconds * 1e6)
    return [statistics.quantiles(kind, n=10)[0] for kind in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300, help="choices for each row")
    parser.add_argument("--cache-tokens", type=int, default=500_000, help="what an engine's prefix cache holds")
    arguments = parser.parse_args()
    print("| engines | prompt tokens | names, us | choice, us | rest, us |\n|---|---|---|---|---|")
    for num_engines in (1, 8, 64):
        draw = random.Random(0)
        router = filled(num_engines, arguments.cache_tokens // PIECE_TOKENS, draw)
        for num_tokens in (500, 4000, 12_000, 32_000):
            times = measure(router, num_tokens, arguments.rounds, draw)
            print(f"| {num_engines} | {num_tokens} | " + " | ".join(f"{each:.0f}" for each in times) + " |", flush=True)


if __name__ == "__main__":
    main()
