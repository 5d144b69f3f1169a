"""The whole measurement in virtual time, against a queue whose rates and prices are known."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import permutations
from pathlib import Path

import msgspec
import pytest
from queueing import INPUTS, OUTPUTS, QueueServer, highest_rate_of_waits

from octavo.jobs.cost.choice import choose
from octavo.jobs.cost.figures import Figures, Question, figures_of
from octavo.jobs.cost.loads import Answers, Load, Run
from octavo.jobs.cost.method import noise
from octavo.jobs.cost.page import Wanted, make_page, points_csv
from octavo.jobs.cost.plan import PlanError, Settings, measure_server
from octavo.jobs.cost.prices import ApiPrice
from octavo.jobs.cost.quality import CostQuality
from octavo.jobs.cost.state import Conditions, Recorded, ServerState, State, StateError, new_state, read_state
from octavo.jobs.cost.statistics import Interval
from octavo.report.page import Answer

SERVICE = 0.1
DOLLARS = 3.6  # an hour: a tenth of a cent a second


def settings(seconds: float = 30.0, seed: int = 0) -> Settings:
    return Settings({"ttft": 500.0}, 99.0, (1, 8), seconds, 3, seed)


def question(of: Settings) -> Question:
    return Question(of, DOLLARS, 10e6, (ApiPrice("cheap", 0.01, 0.02), ApiPrice("dear", 5.0, 20.0)))


def measured(server: QueueServer, of: Settings) -> list[Run]:
    runs: list[Run] = []

    def measure(load: Load) -> Run:
        runs.append(server.measure(load))
        return runs[-1]

    measure_server(measure, of)
    return runs


def server(service: float = SERVICE, seed: int = 0, drift: float = 0.0, busy: float = 0.01) -> ServerState:
    """A server that was measured; who changes it takes a copy."""
    return _server(service, seed, drift, busy)


@cache
def _server(service: float, seed: int, drift: float, busy: float) -> ServerState:
    """One entry for each server, however its test spells the defaults."""
    of = settings(30, seed)
    runs = measured(QueueServer(service, drift=drift, busy=busy), of)
    return ServerState("", runs=runs, done=True, figures=figures_of(runs, question(of)))


def figures(seed: int = 0, drift: float = 0.0) -> Figures:
    found = server(seed=seed, drift=drift).figures
    assert found is not None
    return found


def test_figures_are_those_of_the_queue() -> None:
    of = msgspec.structs.replace(settings(300), percentile=90.0)
    found = figures_of(measured(QueueServer(SERVICE), of), question(of))
    assert found is not None
    value = {name: interval.value for name, interval in found.values.items()}
    prefill = SERVICE * 0.25
    exact = highest_rate_of_waits(SERVICE, 0.5 - prefill, 90.0)
    assert value["slo_rate"] == pytest.approx(exact, rel=0.05)
    assert value["slo_output_rate"] == pytest.approx(value["slo_rate"] * OUTPUTS)
    assert value["saturation_rate"] == pytest.approx(1 / SERVICE, rel=0.005)
    assert value["prefill_rate"] == pytest.approx(INPUTS / prefill, rel=0.005)
    assert value["prefill_share"] == pytest.approx(0.25, rel=0.01)
    assert value["slo_usd_cached"] / value["slo_usd_input"] == pytest.approx(0.1, rel=0.01)
    assert value["memory"] == 1e9
    assert (found.limited, found.keeps_slo) == (True, True)


@pytest.mark.parametrize("situation", ["slo", "saturation"])
def test_the_prices_of_all_tokens_of_an_hour_are_the_machine_s_hour(situation: str) -> None:
    value = {name: interval.value for name, interval in figures().values.items()}
    hour = 3600 * value[f"{situation}_rate"]
    inputs = hour * INPUTS * value[f"{situation}_usd_input"] / 1e6
    outputs = hour * OUTPUTS * value[f"{situation}_usd_output"] / 1e6
    assert inputs + outputs == pytest.approx(DOLLARS)
    assert hour * OUTPUTS * value[f"{situation}_usd_all_in"] / 1e6 == pytest.approx(DOLLARS)
    served = 24 * hour * (INPUTS + OUTPUTS)
    assert value[f"{situation}_machines"] == pytest.approx(10e6 / served)
    api = 24 * hour * (INPUTS * 5.0 + OUTPUTS * 20.0) / 1e6
    assert value[f"{situation}_capacity_share_dear"] == pytest.approx(24 * DOLLARS / api)


@pytest.mark.parametrize("drift", [0.0, 0.05])
def test_an_interval_contains_what_a_second_run_finds(drift: float) -> None:
    """Of each run in each other, 9 of 10 figures: on a machine that keeps its speed, and on one that doesn't."""
    inside = []
    found = [figures(seed, drift).values for seed in (0, 1000)]
    for a, b in permutations(found, 2):
        inside += [a[name].low <= b[name].value * (1 + 1e-9) and b[name].value <= a[name].high for name in a]
    assert len(inside) > 50
    assert sum(inside) >= 0.9 * len(inside)


def test_a_noisy_machine_widens_the_intervals_and_the_report_says_so() -> None:
    widths = []
    for drift, busy in ((0.0, 0.01), (0.1, 0.6)):
        state = reported({"m": server(drift=drift, busy=busy)})
        values = state.servers[0].figures
        assert values is not None
        price = values.values["saturation_usd_all_in"]
        widths.append(price.high / price.low - 1)
        text = make_page(state, wanted(state)).to_html()
        assert ("NOISY machine" in text, "a quiet machine" in text) == (busy > 0.5, busy < 0.5)
        assert noise(state)[1] == (busy > 0.5)
    assert widths[1] > 5 * widths[0]


def test_where_nothing_was_measured_nobody_is_said_to_keep_the_machine_busy() -> None:
    assert noise(reported({"m": ServerState("", problem="HTTP 400")})) == ("No load was measured.", False)


def test_an_interrupted_run_goes_on_and_ends_as_one_that_was_not() -> None:
    of = settings(seconds=5)
    whole = measured(QueueServer(SERVICE), of)
    state = new_state(Conditions(of, "w", (), 100))
    first = QueueServer(SERVICE)

    def measure(load: Load) -> Run:
        if len(first.loads) == 9:
            raise KeyboardInterrupt
        return first.measure(load)

    with pytest.raises(KeyboardInterrupt):
        measure_server(Recorded(state.server("m"), measure, lambda _: None), of)
    again = msgspec.json.decode(msgspec.json.encode(state), type=State)
    assert len(again.server("m").runs) == 9
    second = QueueServer(SERVICE)
    measure_server(Recorded(again.server("m"), second.measure, lambda _: None), of)
    assert again.server("m").runs == whole
    assert len(second.loads) == len(whole) - 9
    few = figures_of(whole[:6], question(of))
    assert few is not None
    assert figures_of(again.server("m").runs[:6], question(of)) == few


def test_a_report_of_another_measurement_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    before = Conditions(settings(seconds=20), "w", (), 100)
    path.write_bytes(msgspec.json.encode(new_state(before)))
    assert read_state(path, before) is not None
    assert read_state(tmp_path / "none.json", before) is None
    with pytest.raises(StateError, match=r"was measured with seconds 20\.0, not 30: another -o"):
        read_state(path, Conditions(settings(seconds=30), "w", (), 100))
    with pytest.raises(StateError, match="workload w, not chat"):
        read_state(path, Conditions(settings(seconds=20), "chat", (), 100))
    path.write_text("{}")
    with pytest.raises(StateError, match="--overwrite begins anew"):
        read_state(path, before)


def reported(servers: dict[str, ServerState], kl: tuple[float | None, ...] = (0.0,)) -> State:
    state = new_state(Conditions(settings(), "prompts of 256 tokens", (), 100))
    for (label, found), loss in zip(servers.items(), kl, strict=True):
        missing = "KL: why not" if loss is None else ""
        exact = None if loss is None else Interval(loss, loss, loss)
        quality = CostQuality(kl=exact, top1=Interval(0.97, 0.96, 0.98), num_tokens=2040, missing=missing)
        state.servers.append(msgspec.structs.replace(found, label=label, quality=quality))
    return state


def wanted(state: State) -> Wanted:
    return Wanted(question(state.conditions.settings), 0.1, "a table")


NAME = "</script><b>int8</b>"


def test_the_answer_names_the_cheapest_good_model_its_price_and_the_machines() -> None:
    servers = {"bf16": server(0.2), NAME: server(), "int4": server(0.05)}
    state = reported(servers, (0.0, 0.03, 0.4))
    page = make_page(state, wanted(state))
    answer = page.sections[0].blocks[0]
    assert isinstance(answer, Answer)
    best = state.servers[1].figures
    assert best is not None
    price = best.values["slo_usd_all_in"]
    assert answer.lines[0].startswith(f"Serve {NAME}: ${price.value:.3g}")
    assert "99 % of the requests within TTFT 500 ms" in answer.lines[0]
    assert answer.lines[1].startswith(
        "10 M tokens a day, input and output together and spread evenly, take 1 machine ("
    )
    unasked = msgspec.structs.replace(wanted(state).question, tokens_per_day=None)
    other = make_page(state, replace(wanted(state), question=unasked)).sections[0].blocks[0]
    assert isinstance(other, Answer)
    served = 86400 * (best.values["slo_input_rate"].value + best.values["slo_output_rate"].value)
    assert other.lines[1].startswith(f"One machine serves {served / 1e6:.3g} M tokens a day")
    assert "Not int4: mean KL 0.400 is above --max-kl 0.1." in answer.lines[2]
    assert f"${price.low:.3g} to ${price.high:.3g}" in answer.lines[3]
    html = page.to_html()
    assert NAME not in html
    assert html.count("<canvas") == 6
    assert "src=" not in html.replace("data-src=", "")
    assert "<link" not in html
    assert len(html) < 400_000
    markdown = page.to_markdown()
    assert f"> **{answer.lines[0]}**" in markdown
    assert "| dear |" not in markdown
    assert "bf16 against dear" in markdown
    rows = points_csv(state).splitlines()
    assert len(rows) == 1 + sum(len(s.figures.points) for s in state.servers if s.figures)


def test_a_choice_says_what_it_can_t_tell_apart_and_why_others_are_out() -> None:
    state = reported({"a": server(), "b": server(seed=1000), "c": server(0.05)}, (0.0, 0.01, None))
    choice = choose(state.servers, 0.1)
    assert choice.best is state.servers[2]  # by its agreement, where KL isn't known
    bad = msgspec.structs.replace(state.servers[2].quality, top1=Interval(0.5, 0.5, 0.5))
    state.servers[2].quality = bad
    state.servers.append(ServerState("d", problem="no connection"))
    choice = choose(state.servers, 0.1)
    assert choice.best in state.servers[:2]
    assert [alike.label in "ab" for alike in choice.alike] == [True]
    assert choice.rejected == (
        ("c", "it finds the same token most likely in 50.0% only, under 95%"),
        ("d", "no connection"),
    )


def test_a_load_in_which_nothing_is_answered_is_passed_over_and_a_plan_of_such_loads_is_refused() -> None:
    """A request takes half a minute: eight of them at a time have no answer that begins within the counted time."""

    def measure(load: Load) -> Run:
        run = QueueServer(SERVICE).measure(load)
        slow = load.concurrency == 8 or load.seconds < 10
        return msgspec.structs.replace(run, answers=Answers(), output_tokens=[0.0] * 10) if slow else run

    runs: list[Run] = []

    def kept(load: Load) -> Run:
        runs.append(measure(load))
        return runs[-1]

    of = settings(seconds=20)
    measure_server(kept, of)
    found = figures_of(runs, question(of))
    assert found is not None
    assert found.saturating == 1
    with pytest.raises(PlanError, match="no request was answered in loads of 5 s: --seconds must be more"):
        measure_server(measure, settings(seconds=5))


def test_a_rate_that_can_t_last_is_said() -> None:
    """Limits of 20 s in loads of 30 s: the queue may grow all the time."""
    of = msgspec.structs.replace(settings(), slo={"ttft": 20_000.0})
    state = new_state(Conditions(of, "w", (), 100))
    runs = measured(QueueServer(SERVICE), of)
    state.servers.append(ServerState("m", runs=runs, done=True, figures=figures_of(runs, question(of))))
    text = make_page(state, wanted(state)).to_markdown()
    assert "m: the rate at the SLO is above the one at saturation, and can't last: --seconds is too short" in text


def test_a_server_that_never_keeps_the_slo_has_its_saturation_and_no_price_there() -> None:
    of = msgspec.structs.replace(settings(), slo={"ttft": 1.0})
    found = figures_of(measured(QueueServer(SERVICE), of), question(of))
    assert found is not None
    assert not found.keeps_slo
    assert "slo_usd_all_in" not in found.values
    assert found.values["saturation_rate"].value == pytest.approx(10, rel=0.02)
