"""The tables of options in docs/, made from the structs that the flags are made from.

`python tests/support/option_tables.py` writes all of them anew. A command's own documentation may take any of them.
"""

from __future__ import annotations

import msgspec
from doc_tables import DocTables

from octavo.bench.options import BenchOptions
from octavo.commands import chat, quantize_flags, run_batch
from octavo.commands.bench_latency import LatencyOptions
from octavo.commands.bench_startup import StartupOptions
from octavo.commands.bench_sweep import SweepOptions
from octavo.commands.convert import ConvertOptions
from octavo.commands.cost import CostOptions
from octavo.commands.eval_flags import EvalOptions
from octavo.commands.inspect import InspectOptions
from octavo.commands.top import TopOptions
from octavo.flags import Flag, flags_of, markdown
from octavo.jobs.calibration_data import DataOptions
from octavo.server.start import flags as serve_flags


def bench_only(options: type[msgspec.Struct]) -> list[Flag]:
    """The flags of a command of `octavo bench` that `octavo bench serve` doesn't have."""
    common = {flag.field for flag in flags_of(BenchOptions)}
    return [flag for flag in flags_of(options) if flag.field not in common]


MAKERS = {
    "quantize": lambda: markdown(flag for flag in quantize_flags.FLAGS if flag.group != "calibration data"),
    "calibration data": lambda: markdown(flags_of(DataOptions)),
    "convert": lambda: markdown(flags_of(ConvertOptions)),
    "eval": lambda: markdown(flags_of(EvalOptions)),
    "serve": lambda: markdown(serve_flags.FLAGS),
    "run-batch": lambda: markdown(run_batch.FLAGS),
    "bench": lambda: markdown(flags_of(BenchOptions)),
    "top": lambda: markdown(flags_of(TopOptions)),
    "bench latency": lambda: markdown(bench_only(LatencyOptions)),
    "bench startup": lambda: markdown(flags_of(StartupOptions)),
    "bench sweep": lambda: markdown(bench_only(SweepOptions)),
    "cost": lambda: markdown(flags_of(CostOptions)),
    "inspect": lambda: markdown(flags_of(InspectOptions)),
    "chat": lambda: markdown(chat.FLAGS),
}
TABLES = DocTables("options", MAKERS)


if __name__ == "__main__":
    TABLES.write()
