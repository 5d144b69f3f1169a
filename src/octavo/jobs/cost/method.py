"""How a report was measured and priced, in sentences: the rules behind its figures, and the state of the machine."""

from __future__ import annotations

from statistics import median

from octavo.jobs.cost.loads import SEGMENTS, WARM_UP
from octavo.jobs.cost.machine import NOISY
from octavo.jobs.cost.search import AROUND
from octavo.jobs.cost.state import State
from octavo.jobs.cost.wording import dollars, percent


def noise(state: State) -> tuple[str, bool]:
    """How busy others kept the machine, and whether that is too much."""
    found = [run.busy_elsewhere for s in state.servers for run in s.runs if run.busy_elsewhere is not None]
    if not any(server.runs for server in state.servers):
        return "No load was measured.", False
    if not found:
        return "This system doesn't say how busy other programs kept the machine.", False
    cores = state.machine.cores
    noisy = median(found) > NOISY * cores
    text = (
        f"Other programs kept {median(found):.2f} of {cores} cores busy between the loads in the median, "
        f"{max(found):.2f} at most"
    )
    return text + (": a NOISY machine, and its figures spread accordingly." if noisy else ": a quiet machine."), noisy


def price_rules(state: State, cost_per_hour: float, source: str) -> tuple[str, ...]:
    """How a machine's hour becomes the price of a token."""
    lines = (
        f"A machine costs {dollars(cost_per_hour)} an hour: {source}.",
        "All in: the machine's hour over the output tokens that it gives in an hour. Input tokens are free in it.",
        "Divided: a prompt's time is what it takes where nothing but prompts is sent, at the highest concurrency and "
        "with answers of one token; the rest of a saturated machine's time is the answers'. The prices of both kinds "
        "times the tokens of an hour are the machine's hour, exactly. This division is a convention: a batch computes "
        "both kinds together.",
        "Cached: an input token's price times the measured time of a prompt that the server has seen before, over that "
        "of a new one.",
        "At the SLO the machine is not full, and the whole hour is paid by the requests that it serves.",
        "Machines are for a traffic that is spread evenly over the day; a peak takes more in proportion.",
    )
    shares = [
        f"{server.label} {percent(server.values['prefill_share']).text}"
        for server in state.servers
        if "prefill_share" in server.values
    ]
    return (*lines, f"The share of prompts in the time: {', '.join(shares)}.") if shares else lines


def measuring_rules(state: State) -> tuple[str, ...]:
    """What was sent, what was counted, and how the rate at the SLO and the intervals come out of it."""
    settings = state.conditions.settings
    concurrency = ", ".join(map(str, settings.concurrency))
    lines = [
        f"Workload: {state.conditions.workload}.",
        f"Each load lasts {settings.seconds:g} s; requests that begin in its first {WARM_UP:.0%} are sent and not "
        f"counted. Seed {settings.seed}, another for each load.",
        "Latencies count from the time at which a request was meant to be sent, not from when the client got to it.",
        "The rate at the SLO: open loads at random times (a Poisson process, where the workload names no other): a "
        f"bisection, and {settings.repetitions} times {len(AROUND)} loads around the estimate. It is where the share "
        "of requests beyond the SLO, which can but grow with the rate (isotonic regression over all loads), goes "
        "through what the SLO allows. A request that fails, or has no whole answer when twice the load's time is over, "
        "is beyond the SLO.",
        f"Closed loads of {concurrency} requests at a time, {settings.repetitions} times each.",
        f"Intervals: bootstrap over runs and over {SEGMENTS} segments of each run's time, Student's distribution, for "
        "a second measurement as uncertain as the first.",
        noise(state)[0],
        _machine(state),
    ]
    if state.conditions.serve_flags:
        lines.append(f"Flags of octavo serve: {' '.join(state.conditions.serve_flags)}")
    return (*lines, *(f"{server.label}: {server.how}" for server in state.servers if server.how))


def _machine(state: State) -> str:
    machine = state.machine
    parts = [machine.processor, f"{machine.cores} cores"]
    if machine.memory_bytes:
        parts.append(f"{machine.memory_bytes / 1e9:.0f} GB")
    versions = ", ".join(f"{name} {version}" for name, version in state.versions.items())
    return f"Machine: {', '.join([*parts, *machine.gpus])}. {versions}."
