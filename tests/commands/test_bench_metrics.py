"""The arithmetic of `octavo bench`: numbers of hand-made records, worked out by hand or by another way of counting."""

from __future__ import annotations

import random
import statistics
from typing import Any

import numpy as np
import pytest

from octavo.bench.arrivals import arrival_times
from octavo.bench.load import LoadResult, Record, Usage
from octavo.bench.metrics import (
    cost,
    dollars_per_million,
    latencies,
    measure,
    peak_concurrency,
    peak_output_per_s,
)
from octavo.bench.sse import EventSplitter, error_message, http_error


def record(start: float, times: list[float], completion: int | None = None, **more: Any) -> Record:
    """Sent at `start`, tokens at `times`; the server counted `completion`, by default one for each."""
    usage = Usage(prompt_tokens=10, completion_tokens=len(times) if completion is None else completion)
    return Record(10, start, times, usage=usage, finish_reason="stop", **more)


RECORDS = [
    record(0.0, [0.5, 0.75, 1.0, 1.25]),
    record(0.25, [0.5, 1.5], completion=5),  # four tokens in its last event
    record(1.5, [2.5]),  # sent just as the second is done
    record(1.75, [], error="HTTP 500"),
]
RESULT = LoadResult(RECORDS, duration=4.0)


def test_latencies_are_vllms() -> None:
    found = measure(RESULT, [0, 50, 99], {}).latencies
    # TTFT: 500, 250, 1000 ms. TPOT: 0.75 s / 3 and 1 s / 4, both 250 ms; the answer of one token has none.
    assert found["ttft"].mean == pytest.approx(1750 / 3)
    assert (found["ttft"].median, found["ttft"].percentiles[0]) == (500, 250)
    assert found["ttft"].percentiles[99] == pytest.approx(500 + 0.98 * 500)
    assert (found["tpot"].mean, found["tpot"].std) == (250, 0)
    # ITL: three gaps of 250 ms and one of 1000 ms. E2EL: 1250, 1250, 1000 ms.
    assert found["itl"].mean == (3 * 250 + 1000) / 4
    assert found["itl"].percentiles[50] == 250
    assert found["e2el"].mean == pytest.approx(3500 / 3)


def test_throughputs_count_what_succeeded_over_all_the_time() -> None:
    found = measure(RESULT, [], {})
    assert (found.completed, found.failed) == (3, 1)
    assert (found.total_input, found.total_output) == (30, 10)
    assert found.request_throughput == 3 / 4
    assert found.output_throughput == 10 / 4
    assert found.total_throughput == 40 / 4
    assert found.request_goodput is None
    assert found.max_concurrent == 2
    # Second 0 has the first's 2 and the second's 2.5, second 1 the first's 2 and the second's 2.5; second 2 has one.
    assert found.max_output_per_s == 4.5


@pytest.mark.parametrize(
    ("limits", "good_tokens"),
    [
        ({"ttft": 500.0}, [4, 5]),  # a limit that is met to the millisecond is met
        ({"ttft": 499.9}, [5]),
        ({"e2el": 1000.0}, [1]),
        ({"tpot": 249.0}, [1]),  # an answer of one token has no time per further token to exceed
        ({"ttft": 500.0, "tpot": 250.0, "e2el": 1250.0}, [4, 5]),
        ({"ttft": 1000.0, "tpot": 249.0, "e2el": 999.0}, []),
    ],
)
def test_goodput_counts_requests_within_all_limits(limits: dict[str, float], good_tokens: list[int]) -> None:
    found = measure(RESULT, [], limits)
    assert found.request_goodput == len(good_tokens) / 4
    assert found.output_goodput == sum(good_tokens) / 4
    price = cost(found, 9.0, 2).per_1m_output_at_slo
    assert price == (pytest.approx(18 / (sum(good_tokens) / 4 * 3600) * 1e6) if good_tokens else None)


def test_dollars_per_million() -> None:
    """An H100 at $2.50 an hour that makes 1,000 tokens a second makes 3.6 million an hour."""
    assert dollars_per_million(2.5, 1, 1000) == pytest.approx(2.5 / 3.6)
    assert dollars_per_million(2.5, 4, 1000) == pytest.approx(10 / 3.6)
    assert dollars_per_million(2.5, 1, 0) is None
    found = cost(measure(RESULT, [], {}), 3.6, 1)
    assert (found.per_1m_output, found.per_1m_total) == (pytest.approx(400), pytest.approx(100))
    assert found.per_1m_output_at_slo is None


def test_nothing_that_succeeded_is_all_zeros() -> None:
    found = measure(LoadResult([record(0.0, [], error="x")], 2.0), [99], {"ttft": 1.0})
    assert (found.completed, found.failed, found.output_throughput, found.request_goodput) == (0, 1, 0, 0)
    assert found.latencies["ttft"].percentiles == {99: 0}
    assert (found.max_output_per_s, found.max_concurrent) == (0, 0)


def test_percentiles_interpolate_between_ranks() -> None:
    rng = random.Random(1)
    seconds = [rng.expovariate(3) for _ in range(257)]
    found = latencies(seconds, [25, 99, 99.9])
    ranked = sorted(1e3 * second for second in seconds)
    for p, value in found.percentiles.items():
        below = int(p / 100 * 256)
        share = p / 100 * 256 - below
        assert value == pytest.approx(ranked[below] * (1 - share) + ranked[min(below + 1, 256)] * share)
    assert found.mean == pytest.approx(statistics.fmean(ranked))
    assert found.median == pytest.approx(statistics.median(ranked))
    assert found.std == pytest.approx(statistics.pstdev(ranked))


def test_peak_concurrency_ends_before_it_begins() -> None:
    """A request that is sent at the instant when another has its last token is not beside it."""
    assert peak_concurrency([record(0.0, [1.0]), record(1.0, [2.0]), record(2.0, [3.0])]) == 1
    assert peak_concurrency([record(0.0, [1.0]), record(0.5, [2.0]), record(0.75, [0.875]), record(1.0, [3.0])]) == 3


def test_peak_throughput_counts_seconds_from_the_first_sending() -> None:
    rng = random.Random(2)
    records = [record(s, sorted(s + rng.random() * 5 for _ in range(20))) for s in (100.3, 100.9, 102.2)]
    counts = np.zeros(10)
    for one in records:
        for time in one.token_times:
            counts[int(time - 100.3)] += 1
    assert peak_output_per_s(records) == counts.max()


def test_records_of_a_server_that_counts_nothing() -> None:
    silent = Record(7, 0.0, [1.0, 2.0])
    assert (silent.output_len, silent.input_len, silent.cached_len) == (2, 7, None)
    assert not silent.counted_by_server
    assert Record(None, 0.0, [1.0]).input_len == 0


def test_arrivals_are_poisson_and_end_on_time() -> None:
    """The gaps of a Poisson process vary as much as they are long; burstiness divides the variance."""
    assert arrival_times(3, float("inf"), 1.0, random.Random(0)) == [0.0, 0.0, 0.0]
    for burstiness in (0.25, 1.0, 4.0):
        times = arrival_times(20_000, 50.0, burstiness, random.Random(7))
        gaps = np.diff([0.0, *times])
        assert times[-1] == pytest.approx(20_000 / 50)
        assert (gaps >= 0).all()  # of the shortest, some vanish beside the sum
        # 20,000 gaps: the estimate of the variation is within some 2 percent, 5 where the tail is long
        assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)


EVENTS = (
    b"data: one\n\n: a comment\n\ndata:two\r\n\r\nevent: x\nid: 7\ndata: three\r\ndata: lines\r\n\r\n\n"
    b'data: {"text": "a\xe2\x80\xa8b"}\r\rdata: [DONE]\n\n'
)


@pytest.mark.parametrize("cut", range(1, len(EVENTS)))
def test_events_are_the_same_wherever_the_reads_end(cut: int) -> None:
    """U+2028 is no end of a line here; CR, LF and CRLF are, also when a read ends within one."""
    whole = [b"one", b"two", b"three\nlines", '{"text": "a\u2028b"}'.encode(), b"[DONE]"]
    splitter = EventSplitter()
    assert splitter.feed(EVENTS[:cut]) + splitter.feed(EVENTS[cut:]) == whole
    splitter = EventSplitter()
    assert [event for byte in EVENTS for event in splitter.feed(bytes([byte]))] == whole


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": {"message": "too long", "type": "x"}}, "too long"),
        ({"object": "error", "message": "old vLLM"}, "old vLLM"),
        ({"detail": "Not Found"}, "Not Found"),
        ({"error": "plain"}, "plain"),
        ({"detail": [{"loc": ["body"]}]}, '[{"loc": ["body"]}]'),
        ({"choices": []}, None),
        ([], None),
    ],
)
def test_messages_are_found_in_every_shape_of_error(body: Any, message: str | None) -> None:
    assert error_message(body) == message


def test_an_error_that_is_no_json_is_shown_in_one_line() -> None:
    assert http_error(502, b"<html>\n  Bad Gateway\n</html>") == "HTTP 502: <html> Bad Gateway </html>"
    assert http_error(503, b"") == "HTTP 503"
    assert len(http_error(500, b"x" * 5000)) < 400
