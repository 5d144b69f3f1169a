"""The report as a page: the answer first, then prices, curves, quality, and how all of it was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from octavo.jobs.cost.choice import Choice, choose
from octavo.jobs.cost.curves import charts
from octavo.jobs.cost.figures import NEAR, Question
from octavo.jobs.cost.method import measuring_rules, noise, price_rules
from octavo.jobs.cost.prices import SECONDS_PER_DAY
from octavo.jobs.cost.quality import CostQuality
from octavo.jobs.cost.state import ServerState, State
from octavo.jobs.cost.statistics import Interval
from octavo.jobs.cost.wording import cell, dollars, figure, percent, slo_in_words, whole
from octavo.report.page import Answer, Charts, Items, Page, Section
from octavo.report.table import Cell, Content, Table, to_csv

WIDE = 0.25  # half an interval, as a share of its figure, from which on the answer says that it is unsure


@dataclass(frozen=True)
class Wanted:
    """What the reader asked besides measurements. price_source: where the machine's price is from."""

    question: Question
    max_kl: float
    price_source: str


def make_page(state: State, wanted: Wanted) -> Page:
    """The whole report."""
    settings = state.conditions.settings
    servers = state.servers
    choice = choose(servers, wanted.max_kl)
    measured = [server for server in servers if server.figures is not None]
    prices = price_rules(state, wanted.question.cost_per_hour, wanted.price_source)
    return Page(
        title="What a million tokens costs",
        subtitle=f"{', '.join(server.label for server in servers)}; {state.conditions.workload}; {state.begun}",
        sections=(
            Section("", (answer(state, wanted), _at_slo(state, choice.best, wanted))),
            Section("Curves", (Charts(charts(measured, settings)),)),
            Section("Prices by kind of token", (_prices(measured), Items(prices))),
            Section("At the SLO and at saturation", (_latencies(measured, settings.percentile), _saturation(measured))),
            *_comparison(measured, wanted),
            Section("Quality", (_quality(servers),)),
            Section("Memory and energy", (_machine_table(measured),)),
            *_problems(servers),
            Section("How it was measured", (Items(measuring_rules(state)),)),
        ),
    )


def points_csv(state: State) -> str:
    """Every load of every server, with its figures and their intervals."""
    names = ("output_rate", *(f"{metric}_{p}" for metric in ("ttft", "tpot") for p in (50, 90, 99)))
    heads = ["model", "kind", "load", "requests", "missed"]
    heads += [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
    rows = []
    for server in state.servers:
        for point in server.figures.points if server.figures else ():
            row: list[str | float | int] = [server.label, point.kind, point.load, point.num_requests, point.num_missed]
            for name in names:
                found = point.figures.get(name)
                row += ["", "", ""] if found is None else [found.value, found.low, found.high]
            rows.append(row)
    return to_csv(heads, rows)


def answer(state: State, wanted: Wanted) -> Answer:
    """Which model to serve, what it costs, why, and how sure that is."""
    settings = state.conditions.settings
    choice = choose(state.servers, wanted.max_kl)
    slo = slo_in_words(settings.slo, settings.percentile)
    quiet, noisy = noise(state)
    if choice.best is None or choice.best.figures is None:
        reasons = "; ".join(f"{label}: {why}" for label, why in choice.rejected)
        return Answer((f"No model was found that keeps {slo}.", reasons, quiet), unsure=True)
    values = choice.best.figures.values
    price = values["slo_usd_all_in"]
    lines = [f"Serve {choice.best.label}: {dollars(price.value)} per million output tokens, with {slo}."]
    lines.append(_machines(values, wanted.question.tokens_per_day))
    lines.append(_why(choice, len(state.servers)))
    width = max(price.high / price.value - 1, 1 - price.low / price.value)
    runs = f"{choice.best.figures.num_requests:,} requests to this model"
    lines.append(
        f"How sure: {dollars(price.low)} to {dollars(price.high)}, where a second measurement is expected 19 times of "
        f"20; {runs}. {quiet}"
    )
    return Answer(tuple(lines), unsure=noisy or width > WIDE)


def _machines(values: Mapping[str, Interval], tokens_per_day: float | None) -> str:
    """How many machines the traffic takes, or, where none was given, what one machine serves."""
    if tokens_per_day is None:
        served = SECONDS_PER_DAY * (values["slo_input_rate"].value + values["slo_output_rate"].value)
        return f"One machine serves {figure(served)} tokens a day, input and output together (--tokens-per-day)."
    machines = whole(values["slo_machines"])
    plural = "machine" if machines.text == "1" else "machines"
    taken = f"take {machines.text} {plural} ({machines.small})"
    return f"{figure(tokens_per_day)} tokens a day, input and output together and spread evenly, {taken}."


def _why(choice: Choice, count: int) -> str:
    assert choice.best is not None
    sentences = []
    if count > 1:
        fitting = count - len(choice.rejected)
        sentences.append(f"It is the cheapest of the {fitting} whose quality is good enough." if fitting > 1 else "")
    if choice.alike:
        names = ", ".join(server.label for server in choice.alike)
        sentences.append(f"No difference in price is seen to {names}: the intervals overlap.")
    sentences += [f"Not {label}: {why}." for label, why in choice.rejected]
    quality = choice.best.quality
    if quality is not None and quality.kl is not None and quality.top1 is not None and quality.kl.value > 0:
        sentences.append(
            f"Its mean KL to the first model is {quality.kl.value:.4f} nats ({quality.top1.value:.1%} the same most "
            "likely token)."
        )
    return " ".join(sentence for sentence in sentences if sentence) or "It is the only model that was measured."


def _at_slo(state: State, best: ServerState | None, wanted: Wanted) -> Table:
    per_day = wanted.question.tokens_per_day
    heads = ["model", "$ per 1M output, all in", "requests/s", "output tok/s", "TTFT p99, ms", "TPOT p99, ms"]
    heads += [f"machines for {figure(per_day)} tokens/day"] if per_day else []
    heads += ["KL, nats", "same top token"]
    rows: list[tuple[Content, ...]] = []
    for server in state.servers:
        values = server.values
        row: list[Content] = [
            server.label,
            cell(values.get("slo_usd_all_in"), money=True, marked=server is best),
            *(cell(values.get(f"slo_{name}")) for name in ("rate", "output_rate", "ttft_99", "tpot_99")),
        ]
        row += [whole(values.get("slo_machines"))] if per_day else []
        quality = server.quality
        row += [cell(quality.kl if quality else None), percent(quality.top1 if quality else None)]
        rows.append(tuple(row))
    settings = state.conditions.settings
    return Table(
        f"At the highest rate that keeps {slo_in_words(settings.slo, settings.percentile)}; a machine costs "
        f"{dollars(wanted.question.cost_per_hour)} an hour ({wanted.price_source})",
        tuple(heads),
        tuple(rows),
        note="Below each figure: where a second measurement is expected, 19 times of 20. All in: the whole bill over "
        "the output tokens.",
    )


def _prices(servers: Sequence[ServerState]) -> Table:
    kinds = ("input", "output", "cached")
    heads = ("model", *(f"$ {kind}{where}" for where in (", SLO", ", saturated") for kind in kinds))
    keys = [f"{at}_usd_{kind}" for at in ("slo", "saturation") for kind in kinds]
    rows: list[tuple[Content, ...]] = [
        (server.label, *(cell(server.values.get(key), money=True) for key in keys)) for server in servers
    ]
    return Table("The same bill divided between the kinds of tokens, $ per million", heads, tuple(rows))


def _latencies(servers: Sequence[ServerState], percentile: float) -> Table:
    heads = ("model", *(f"{name} p{p}, ms" for name in ("TTFT", "TPOT") for p in (50, 90, 99)))
    rows: tuple[tuple[Content, ...], ...] = tuple(
        (
            server.label,
            *(cell(server.values.get(f"slo_{name}_{p}")) for name in ("ttft", "tpot") for p in (50, 90, 99)),
        )
        for server in servers
        if any(name.startswith("slo_ttft") for name in server.values)
    )
    note = (
        f"Of the runs whose rate is within {100 * NEAR:g} % of the one at which {percentile:g} % of the requests keep "
        "the SLO."
    )
    return Table("Latencies at the SLO, from the time at which a request was meant to be sent", heads, rows, note)


def _saturation(servers: Sequence[ServerState]) -> Table:
    heads = ("model", "at a time", "output tok/s", "$ per 1M output, all in", "tok/s per $/h", "tok/s per $/h, SLO")
    rows: list[tuple[Content, ...]] = []
    for server in servers:
        values = server.values
        rows.append(
            (
                server.label,
                str(server.figures.saturating if server.figures is not None else ""),
                cell(values.get("saturation_output_rate")),
                cell(values.get("saturation_usd_all_in"), money=True),
                cell(values.get("saturation_output_rate_per_dollar")),
                cell(values.get("slo_output_rate_per_dollar")),
            )
        )
    title = "At saturation: as many requests at a time as give the most tokens, whatever they wait"
    return Table(title, heads, tuple(rows))


def _comparison(servers: Sequence[ServerState], wanted: Wanted) -> tuple[Section, ...]:
    rows: list[tuple[Content, ...]] = []
    for server in servers:
        values = server.values
        for price in wanted.question.api_prices:
            even = values.get(f"slo_break_even_{price.name}")
            share = values.get(f"slo_capacity_share_{price.name}")
            if even is None or share is None:
                continue
            verdict = (
                f"from {share.value:.0%} of what it can serve on"
                if share.high < 1
                else "never: it can't serve so many"
                if share.low > 1
                else "unclear: about at its capacity"
            )
            rows.append((f"{server.label} against {price.name}", cell(even), Cell(verdict)))
    if not rows:
        return ()
    prices = "; ".join(f"{p.name}: {dollars(p.input)} in, {dollars(p.output)} out" for p in wanted.question.api_prices)
    table = Table(
        f"Tokens a day, input and output together, from which on a machine that is always on costs less ({prices})",
        ("", "tokens/day", "the machine pays"),
        tuple(rows),
    )
    return (Section("Against a price per token", (table,)),)


def _quality(servers: Sequence[ServerState]) -> Table:
    rows: list[tuple[Content, ...]] = []
    tasks = sorted({task for server in servers for task in server.tasks})
    for server in servers:
        quality = server.quality or CostQuality()
        if server.quality is None and not server.tasks:
            continue
        rows.append(
            (
                server.label,
                cell(quality.perplexity),
                cell(quality.kl),
                percent(quality.top1),
                *(percent(server.tasks.get(task)) for task in tasks),
                Cell(f"{quality.num_tokens:,}" if quality.num_tokens else "–", quality.how),
                quality.missing,
            )
        )
    heads = ("model", "perplexity", "KL, nats", "same top token", *tasks, "tokens", "not measured")
    note = (
        "Intervals are over the windows of the text: another text of its kind is expected there. KL and agreement are "
        "to the first model."
    )
    return Table("", heads, tuple(rows), note)


def _machine_table(servers: Sequence[ServerState]) -> Table:
    rows: list[tuple[Content, ...]] = []
    for server in servers:
        values = server.values
        memory = values.get("memory")
        gigabytes = None if memory is None else memory.scaled(1 / 1e9)
        joules = values.get("joules_per_output_token")
        energy = None if joules is None else joules.scaled(1 / 3.6)
        start = "–" if server.start_seconds is None else f"{server.start_seconds:.1f}"
        rows.append((server.label, cell(gigabytes), start, cell(values.get("watts")), cell(energy)))
    heads = ("model", "memory, GB", "start, s", "power, W", "kWh per 1M output tokens")
    note = "Memory: of the processes of a server that octavo started (Pss). Energy: by NVML or RAPL"
    told = any("watts" in server.values for server in servers)
    return Table("", heads, tuple(rows), note + ("." if told else "; this machine tells neither."))


def _problems(servers: Sequence[ServerState]) -> tuple[Section, ...]:
    lines = [f"{server.label}: {server.problem}" for server in servers if server.problem]
    for server in servers:
        errors = list(dict.fromkeys(error for run in server.runs for error in run.errors))
        failed = sum(len(run.failed_in) for run in server.runs)
        if failed:
            lines.append(
                f"{server.label}: {failed} requests failed, which count as beyond the SLO: {'; '.join(errors[:3])}"
            )
        if server.figures is not None and not server.figures.limited:
            lines.append(f"{server.label}: every rate that was tried keeps the SLO; the limit is above them.")
        if server.figures is not None and not server.figures.keeps_slo:
            lines.append(f"{server.label}: no rate that was tried keeps the SLO; a loaded server is not the reason.")
        slo, saturation = (server.values.get(f"{where}_rate") for where in ("slo", "saturation"))
        if slo is not None and saturation is not None and slo.low > saturation.high:
            lines.append(
                f"{server.label}: the rate at the SLO is above the one at saturation, and can't last: --seconds is too "
                "short for limits that long, or the highest --concurrency doesn't saturate the server."
            )
        if server.tasks_problem:
            lines.append(f"{server.label}: {server.tasks_problem}")
        if not server.done and not server.problem:
            lines.append(f"{server.label}: not measured to the end; the same command goes on with it.")
    return (Section("What went wrong", (Items(tuple(lines)),)),) if lines else ()
