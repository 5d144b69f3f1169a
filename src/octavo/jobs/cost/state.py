"""report.json: what was asked, measured and found. It is also the state that a second run goes on with.

Every run of a load is there with its requests. Since the plan depends on what was measured alone, a second run asks for
the same loads in the same order, and those that are there are not made again: `Recorded`.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy

from octavo.jobs.cost.figures import Figures
from octavo.jobs.cost.loads import Load, Run
from octavo.jobs.cost.machine import MachineFacts, machine_facts
from octavo.jobs.cost.plan import Settings
from octavo.jobs.cost.quality import Answered, CostQuality
from octavo.jobs.cost.statistics import Interval
from octavo.version import VERSION

SCHEMA_VERSION = 1
REPORT = "report.json"


class StateError(ValueError):
    """A report that can't be gone on with; the message is one line."""


class ServerState(msgspec.Struct, omit_defaults=True):
    """One MODEL of the command line.

    model        what the server calls it; how: what it is, for a reader
    start_seconds  from the start of the process to its first /health
    answered     what its server says of the text, where a server of somebody's is compared
    tasks        of lm-eval, and its results; tasks_problem: why there are none
    done         the plan is at its end
    problem      why nothing, or not everything, was measured
    """

    label: str
    how: str = ""
    model: str = ""
    start_seconds: float | None = None
    runs: list[Run] = []
    quality: CostQuality | None = None
    answered: Answered | None = None
    tasks: dict[str, Interval] = {}
    tasks_problem: str | None = None
    done: bool = False
    problem: str | None = None
    figures: Figures | None = None

    @property
    def values(self) -> dict[str, Interval]:
        """Its figures by their names; none where too little was measured."""
        return self.figures.values if self.figures is not None else {}


class Conditions(msgspec.Struct, frozen=True):
    """What measurements depend on: a second run with others is a different measurement."""

    settings: Settings
    workload: str
    serve_flags: tuple[str, ...]
    eval_tokens: int


class State(msgspec.Struct, omit_defaults=True):
    """The whole report. Prices are not a part of what was measured and may change from run to run."""

    conditions: Conditions
    machine: MachineFacts
    servers: list[ServerState] = []
    windows: list[list[int]] = []  # token ids of the text that servers were asked about
    begun: str = ""
    versions: dict[str, str] = {}
    schema_version: int = SCHEMA_VERSION

    def server(self, label: str) -> ServerState:
        """The server of this name; a new one if there is none."""
        found = next((server for server in self.servers if server.label == label), None)
        if found is None:
            found = ServerState(label)
            self.servers.append(found)
        return found


def new_state(conditions: Conditions) -> State:
    """Of a measurement that begins now, on this machine."""
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    versions = {"octavo": VERSION, "python": platform.python_version(), "numpy": numpy.__version__}
    return State(conditions, machine_facts(), begun=now, versions=versions)


def read_state(path: Path, conditions: Conditions) -> State | None:
    """What an earlier run left; None where there is none. Raises StateError."""
    if not path.exists():
        return None
    try:
        state = msgspec.json.decode(path.read_bytes(), type=State)
    except (OSError, msgspec.MsgspecError) as e:
        raise StateError(f"{path} is no report that can be gone on with: {e}; --overwrite begins anew") from e
    if state.schema_version != SCHEMA_VERSION:
        raise StateError(f"{path} is of schema {state.schema_version}, and this octavo {VERSION} has {SCHEMA_VERSION}")
    if differing := _differences(state.conditions, conditions):
        raise StateError(f"{path} was measured with {differing}: another -o is for another measurement, or --overwrite")
    return state


def _differences(before: Conditions, after: Conditions) -> str:
    """The first thing that is not alike, in words; '' where all is."""
    pairs = {
        field: (getattr(before.settings, field), getattr(after.settings, field)) for field in Settings.__struct_fields__
    }
    pairs |= {field: (getattr(before, field), getattr(after, field)) for field in Conditions.__struct_fields__[1:]}
    found = [f"{name.replace('_', ' ')} {a}, not {b}" for name, (a, b) in pairs.items() if a != b]
    return found[0] if found else ""


class Recorded:
    """`measure` with a memory: runs that are there are given again, in their order, and new ones are kept."""

    def __init__(self, server: ServerState, measure: Callable[[Load], Run], kept: Callable[[Run], None]) -> None:
        self._server = server
        self._measure = measure
        self._kept = kept
        self._next = 0

    def __call__(self, load: Load) -> Run:
        """The run of this load."""
        runs = self._server.runs
        if self._next < len(runs) and runs[self._next].load != load:
            del runs[self._next :]  # left by a plan that went another way
        if self._next == len(runs):
            runs.append(self._measure(load))
            self._kept(runs[-1])
        self._next += 1
        return runs[self._next - 1]
