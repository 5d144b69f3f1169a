"""The routing simulation: its replicas against arithmetic by hand, and every rule against a trace with deaths."""

from __future__ import annotations

import json
import random
import statistics
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is no package of the wheel

from benchmarks import router_sim
from benchmarks.router_replicas import BLOCK_TOKENS, TOKEN_SECONDS, Cache, Replica, Request, Simulation
from benchmarks.router_rules import Cells, Octavo, WaitingTokens

RATE = 1000.0


def request(key: str, arrival: float, num_blocks: int, num_answer_tokens: int = 1, root: str = "") -> Request:
    blocks = [f"{root or key}{number}".encode() for number in range(num_blocks)]
    return Request(key, arrival, num_blocks * BLOCK_TOKENS + 1, num_answer_tokens, blocks)


def simulate(
    requests: list[Request], num_replicas: int, deaths: list[tuple[float, int]] | None = None, cache: int = 100
) -> None:
    tokens = cache * BLOCK_TOKENS
    replicas = [Replica(number, RATE, Cache(tokens)) for number in range(num_replicas)]
    rule = WaitingTokens(num_replicas, random.Random(0))
    Simulation(requests, replicas, rule, deaths or [], restart_seconds=30).run()
    assert rule.num_open == [0] * num_replicas
    assert rule.num_waiting_tokens == [0] * num_replicas


def test_prompts_are_computed_one_after_the_other_and_cached_ones_are_not() -> None:
    requests = [
        request("a", 0.0, 4, root="shared"),
        request("b", 0.5, 2),
        request("c", 0.6, 6, root="shared"),
    ]
    simulate(requests, 1)
    first = 4 * BLOCK_TOKENS + 1
    second = first + 2 * BLOCK_TOKENS + 1
    third = second + 2 * BLOCK_TOKENS + 1
    assert [each.first_token for each in requests] == [pytest.approx(n / RATE) for n in (first, second, third)]
    assert [each.num_cached for each in requests] == [0, 0, 4 * BLOCK_TOKENS]


def test_what_was_not_used_for_the_longest_time_is_evicted() -> None:
    requests = [request("a", 0, 4, root="old"), request("b", 10, 3), request("c", 20, 4, root="old")]
    simulate(requests, 1, cache=5)
    assert requests[2].num_cached == 2 * BLOCK_TOKENS  # its beginning has outlived its end


def test_a_death_moves_requests_with_their_answers_so_far() -> None:
    moved = request("a", 0.0, 1, num_answer_tokens=1000)
    other = request("b", 0.0, 2, num_answer_tokens=4000)
    begun = 513 / RATE
    died = begun + 100.5 * TOKEN_SECONDS
    simulate([moved, other], 2, deaths=[(died, 0)])
    assert (moved.num_moves, other.num_moves) == (1, 0)
    assert moved.first_token == pytest.approx(begun)
    assert moved.num_answered == 101
    assert moved.longest_pause == pytest.approx((513 + 101) / RATE)


def test_requests_wait_for_the_only_replica_to_come_back() -> None:
    waits = request("a", 0.0, 1)
    simulate([waits], 1, deaths=[(0.1, 0)])
    assert waits.num_moves == 1
    assert waits.first_token == pytest.approx(0.1 + 30 + 513 / RATE)


def conversations(path: Path, num_turns: int) -> None:
    """A trace in Mooncake's form: turns of conversations, of lengths that differ by hundreds."""
    draw = random.Random(5)
    fresh = iter(range(1, 1 << 30))
    open_ones: list[list[int]] = []
    with path.open("w", encoding="utf-8") as lines:
        for number in range(num_turns):
            if len(open_ones) < 30 or draw.random() < 0.6:
                open_ones.append([0])
            names = draw.choice(open_ones[-30:])
            names.extend(next(fresh) for _ in range(min(150, int(draw.paretovariate(0.7)))))
            length = len(names) * BLOCK_TOKENS - draw.randrange(BLOCK_TOKENS)
            entry = {"timestamp": number // 8 * 3000, "input_length": length, "output_length": draw.randrange(1, 600)}
            lines.write(json.dumps(entry | {"hash_ids": names}) + "\n")


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> list[Request]:
    path = tmp_path_factory.mktemp("trace") / "trace.jsonl"
    conversations(path, 900)
    requests = router_sim.read(path, 1, 1e9)
    assert len(requests) == 900
    return requests


def waits(requests: list[Request], setting: router_sim.Setting, name: str) -> list[float]:
    fresh = [Request(r.key, r.arrival, r.num_tokens, r.num_answer_tokens, r.blocks) for r in requests]
    replicas = [Replica(number, setting.rate, Cache(setting.cache_tokens)) for number in range(setting.num_replicas)]
    rule = router_sim.rules(setting)[name](setting.num_replicas)
    Simulation(fresh, replicas, rule, list(setting.deaths)).run()
    return [each.first_token - each.arrival for each in fresh if each.first_token is not None]


NAMES = list(router_sim.rules(router_sim.Setting(1, 1, 1)))


@pytest.mark.parametrize("name", NAMES)
def test_no_rule_loses_a_request_when_replicas_die(trace: list[Request], name: str) -> None:
    deaths = router_sim.deaths_of(4, trace[-1].arrival, 12)
    assert len(waits(trace, router_sim.Setting(4, 12_000, 200_000, deaths=deaths), name)) == len(trace)


def test_counting_tokens_beats_counting_requests(trace: list[Request]) -> None:
    setting = router_sim.Setting(8, 5_000, 300_000)
    own = statistics.mean(waits(trace, setting, "**octavo (--routing prefix)**"))
    least = statistics.mean(waits(trace, setting, "least requests (--routing least-loaded)"))
    assert own <= 0.65 * least


def test_a_cell_that_is_full_passes_on_what_is_hashed_to_it() -> None:
    rule = Cells(8, 2, lambda count: Octavo(count, 100_000, "prefix", [1.0] * count))
    for replica in range(8):
        rule.opened(replica)
    same = [request(str(number), 0.0, 4, root="shared") for number in range(100)]
    cells = [0] * 4
    for each in same:
        replica = rule.choose(each)
        assert replica is not None
        cells[replica // 2] += 1
    assert max(cells) == int(1.25 * 100 / 4)  # all have one head, and no cell gets more than 1.25 times the mean
    assert min(cells) > 0


def test_a_dead_cell_gets_nothing() -> None:
    rule = Cells(4, 2, lambda count: Octavo(count, 100_000, "prefix", [1.0] * count))
    assert rule.choose(request("none", 0.0, 4)) is None
    rule.opened(2)
    assert {rule.choose(request(str(number), 0.0, 4)) for number in range(20)} == {2}
