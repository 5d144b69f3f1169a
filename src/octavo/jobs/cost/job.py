"""`octavo cost`: measures each model in turn, keeps what is measured, and writes the report.

Servers and other commands run in processes of their own, which `Surroundings` starts: nothing of a model is in this
process, whose load must not slow the server.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from octavo.bench.http import HttpError
from octavo.jobs.cost.client import Asking, Measured, ServerError
from octavo.jobs.cost.figures import figures_of
from octavo.jobs.cost.loads import Run
from octavo.jobs.cost.page import Wanted, answer, make_page, points_csv
from octavo.jobs.cost.plan import PlanError, Settings, measure_server
from octavo.jobs.cost.quality import CostQuality, of_answers, of_comparison, of_reference
from octavo.jobs.cost.state import REPORT, Conditions, Recorded, ServerState, State, new_state, read_state
from octavo.jobs.cost.targets import Target
from octavo.jobs.cost.tasks import NO_TASKS, Tasks, read_results
from octavo.jobs.cost.wording import duration
from octavo.jobs.written import why_unwritten
from octavo.quant.hub import resolve_model
from octavo.report.files import write_whole

EVAL_FLAGS = ("--dtype", "--kv-cache-dtype", "--lm-head-dtype")  # of `octavo serve` that change what is computed
DRAIN_SECONDS = 2.0  # for the estimate of the time: what a load takes beside its seconds


class StartedServer(Protocol):
    """A server that was started for this job."""

    url: str
    api_key: str

    @property
    def pid(self) -> int: ...
    def wait_until_ready(self) -> None: ...


@dataclass(frozen=True)
class Surroundings:
    """What the command lends the job.

    serve     `octavo serve WORDS` until the block ends; waiting for it raises ServerError with the end of its log
    octavo    `octavo WORDS` to its end, in a process of its own; returns its exit code and its last line of errors
    program   the same of a command line of another program, with an API key for the server that it asks
    progress  called with (done, total, what)
    say       a line for the user
    """

    serve: Callable[..., AbstractContextManager[StartedServer]]
    octavo: Callable[[Sequence[str]], tuple[int, str]]
    program: Callable[[Sequence[str], str | None], tuple[int, str]]
    progress: Callable[[float, float, str], None]
    say: Callable[[str], None]


@dataclass(frozen=True)
class CostJob:
    """Everything that was asked. output: the report's directory; api_key: of the servers given by URL."""

    targets: tuple[Target, ...]
    output: Path
    asking: Asking
    settings: Settings
    wanted: Wanted
    serve_flags: tuple[str, ...] = ()
    eval_tokens: int = 2048
    quality: bool = True
    tasks: Tasks = NO_TASKS
    api_key: str | None = None
    served_name: str | None = None
    overwrite: bool = False

    @property
    def conditions(self) -> Conditions:
        """What the measurements depend on."""
        return Conditions(self.settings, self.asking.describe(), self.serve_flags, self.eval_tokens)

    @property
    def seconds(self) -> float:
        """About how long the loads of one model take."""
        return self.settings.num_loads * (self.settings.seconds + DRAIN_SECONDS)


def run(job: CostJob, around: Surroundings) -> State:
    """Measure what isn't measured yet, and write the report, also when the user or an error ends this early.

    A model that can't be measured has its reason in the report; the others are measured all the same. Models of earlier
    runs stay in it, behind those of this one.
    Raises StateError for a report of another measurement, and OSError.
    """
    job.output.mkdir(parents=True, exist_ok=True)
    state = None if job.overwrite else read_state(job.output / REPORT, job.conditions)
    state = state or new_state(job.conditions)
    asked = [state.server(target.label) for target in job.targets]
    state.servers = [*asked, *(server for server in state.servers if server not in asked)]
    try:
        for number, target in enumerate(job.targets):
            _measure(job, around, state, number, target)
        if job.quality:
            _compare_checkpoints(job, around, state)
    finally:
        write_report(job, state)
    return state


def check_targets(job: CostJob) -> None:
    """Look for every model before the first is measured. Raises CheckpointError, or ServerError."""
    for target in job.targets:
        if target.kind == "server":
            Measured(target.model, job.api_key, job.asking, model=job.served_name).close()
            continue
        directory = resolve_model(target.model)
        why = why_unwritten(directory, job.serve_flags)
        if why is not None:
            raise ServerError(f"{target.label}: {why}")


def answer_lines(job: CostJob, state: State) -> tuple[str, ...]:
    """The report's answer, for the terminal."""
    return answer(state, job.wanted).lines


def write_report(job: CostJob, state: State) -> None:
    """report.json, report.html, report.md and points.csv out of what was measured so far."""
    for server in state.servers:
        server.figures = figures_of(server.runs, job.wanted.question)
    page = make_page(state, job.wanted)
    _save(job, state)
    write_whole(job.output / "report.html", page.to_html())
    write_whole(job.output / "report.md", page.to_markdown())
    write_whole(job.output / "points.csv", points_csv(state))


def _save(job: CostJob, state: State) -> None:
    write_whole(job.output / REPORT, msgspec.json.encode(state).decode() + "\n")


def _measure(job: CostJob, around: Surroundings, state: State, number: int, target: Target) -> None:
    """All loads of one model, and what its server says of the text, where that is how quality is compared."""
    server = state.server(target.label)
    asks = job.quality and any(other.kind == "server" for other in job.targets)
    unasked = asks and server.answered is None
    tasks_left = set(job.tasks.names) - set(server.tasks)
    if server.done and not unasked and not tasks_left:
        return
    server.problem = None
    left = max(0.0, job.seconds - len(server.runs) * (job.settings.seconds + DRAIN_SECONDS))
    around.say(f"{target.label} ({number + 1} of {len(job.targets)}): about {duration(left)} of loads")

    def kept(run: Run) -> None:
        _save(job, state)
        total = max(job.settings.num_loads, len(server.runs)) * len(job.targets)
        done = number * job.settings.num_loads + len(server.runs)
        around.progress(done, total, f"{target.label}: {run.load}")

    try:
        with _opened(job, around, server, target) as measured:
            measured.warm_up(job.settings.concurrency[-1], job.settings.seed)
            measure_server(Recorded(server, measured.measure, kept), job.settings)
            server.done = True
            if unasked:
                _ask(job, state, server, measured, first=number == 0)
            if tasks_left:
                _run_tasks(job, around, server, measured, target)
    except (ServerError, PlanError) as e:
        server.problem = in_one_line(e)
        around.say(f"{target.label}: {e}")
    _save(job, state)


def in_one_line(error: Exception) -> str:
    """An error for the report. Of a server that ended: that it did, and the last line of its log."""
    first, *log = str(error).splitlines() or [""]
    return f"{first.partition(';')[0]}: {log[-1].lstrip(' |')}" if log else first


@contextmanager
def _opened(job: CostJob, around: Surroundings, server: ServerState, target: Target) -> Iterator[Measured]:
    """The server of a target, ready to be measured. Raises ServerError."""
    if target.kind == "server":
        with Measured(target.model, job.api_key, job.asking, model=job.served_name) as measured:
            server.model = measured.model
            server.how = f"a server that was running{f', {measured.program}' if measured.program else ''}"
            yield measured
        return
    directory = directory_of(job, around, target)
    made = f", quantized to {target.scheme} by {target.algorithm}" if target.kind == "quantized" else ""
    server.how = f"octavo serve{made}"
    begun = time.perf_counter()
    with around.serve(str(directory), "--served-model-name", target.label, *job.serve_flags) as own:
        own.wait_until_ready()
        server.start_seconds = round(time.perf_counter() - begun, 2)
        with Measured(own.url, own.api_key, job.asking, pid=own.pid) as measured:
            server.model = measured.model
            yield measured


def directory_of(job: CostJob, around: Surroundings, target: Target) -> Path:
    """A target's checkpoint on this machine; it is quantized first where it is to be. Raises ServerError."""
    if target.kind == "checkpoint":
        return resolve_model(target.model)
    directory = job.output / "models" / target.directory_name
    if (directory / "config.json").is_file():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    scheme, at, group = target.scheme.partition("@")
    words = [
        "quantize",
        str(resolve_model(target.model)),
        "-o",
        str(directory),
        "--scheme",
        scheme,
        "--no-eval",
        "--resume",
    ]
    words += ["--algorithm", target.algorithm] + (["--group-size", group] if at else [])
    around.say(f"{target.label}: quantizing")
    code, error = around.octavo(words)
    if code:
        raise ServerError(f"octavo quantize ended with {code}: {error}")
    return directory


def _ask(job: CostJob, state: State, server: ServerState, measured: Measured, *, first: bool) -> None:
    """What this server says of the text, in the first server's tokens."""
    from octavo.calibration.verify import held_out_text  # imports torch

    try:
        if first or not state.windows:
            state.windows = measured.windows(held_out_text(), job.eval_tokens)
        server.answered = measured.answers(state.windows)
    except HttpError as e:
        server.quality = CostQuality(missing=f"{e}")
        return
    if first or server.quality is None:
        reference = state.servers[0].answered
        server.quality = of_answers(server.answered, reference)


def _run_tasks(job: CostJob, around: Surroundings, server: ServerState, measured: Measured, target: Target) -> None:
    """lm-eval's tasks, with the tokenizer of this checkpoint, or of the first one where the server is somebody's."""
    checkpoint = next((each for each in (target, *job.targets) if each.kind != "server"), None)
    tokenizer = measured.model if checkpoint is None else resolve_model(checkpoint.model)
    around.say(f"{target.label}: {', '.join(job.tasks.names)} by lm-eval")
    with tempfile.TemporaryDirectory() as folder:
        words = job.tasks.command(measured.url, measured.model, tokenizer, Path(folder))
        code, error = around.program(words, measured.api_key)
        try:
            server.tasks = read_results(Path(folder))
            server.tasks_problem = None
        except ValueError as e:
            server.tasks_problem = f"{e}; it ended with {code}: {error}"


def _compare_checkpoints(job: CostJob, around: Surroundings, state: State) -> None:
    """By `octavo eval`, over whole distributions: every checkpoint against the first model, if that is one too."""
    original = job.targets[0]
    if original.kind == "server":
        return
    others = [target for target in job.targets[1:] if target.kind != "server"] or [original]
    for target in others:
        server = state.server(target.label)
        if server.quality is not None and server.quality.kl is not None:
            continue
        around.say(f"{target.label}: measuring quality")
        try:
            report = _evaluated(job, around, target, original)
        except ServerError as e:
            server.quality = CostQuality(missing=str(e))
            continue
        server.quality = of_comparison(report)
        if report.get("quality"):
            state.servers[0].quality = of_reference(report)
        _save(job, state)


def _evaluated(job: CostJob, around: Surroundings, target: Target, original: Target) -> dict[str, object]:
    """The JSON of `octavo eval`. Raises ServerError."""
    directories = [str(directory_of(job, around, each)) for each in (target, original)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "eval.json"
        words = ["eval", directories[0], "--against", directories[1], "--max-tokens", str(job.eval_tokens)]
        code, error = around.octavo([*words, "--json", str(path), *eval_flags(job.serve_flags)])
        if not path.exists():
            raise ServerError(f"octavo eval ended with {code}: {error}")
        report: dict[str, object] = json.loads(path.read_text("utf-8"))
    return report


def eval_flags(flags: Sequence[str]) -> list[str]:
    """Those of the server's flags that `octavo eval` knows too, with their values."""
    found: list[str] = []
    for at, flag in enumerate(flags):
        name, equals, _ = flag.partition("=")
        if name in EVAL_FLAGS:
            found += [flag] if equals else flags[at : at + 2]
    return found
