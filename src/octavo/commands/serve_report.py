"""What `octavo serve` prints when it is ready."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from octavo.quant.printable import printable
from octavo.runtime.messages import Ready


def print_report(readies: Sequence[Ready], seconds: float, notes: Sequence[str]) -> None:
    """Print what runs, by which kernels, in how much memory, and how long each phase of the start took.

    readies: what each engine said when it could serve. They run the same; what is shown of one is the first one's.
    """
    ready = readies[0]
    report = ready.report
    console = Console(soft_wrap=True, markup=False)
    table = Table(title=f"{report.architecture}, {report.dtype} on {report.device}", title_justify="left")
    for heading in ("layers", "scheme", "body"):
        table.add_column(heading)
    for row in report.layers:
        table.add_row(*map(printable, row))
    console.print(table)
    if report.deterministic:
        console.print("deterministic: every body above, attention, norms and sampling are batch-invariant")
    for note in notes:
        console.print(printable(note))
    if len(readies) > 1:
        devices = "; ".join(f"engine {index} on {one.report.device}" for index, one in enumerate(readies))
        console.print(f"{len(readies)} engines: {devices}; below, figures are the first one's", highlight=False)
    for rank in report.ranks:
        console.print(printable(rank), highlight=False)
    tokens = ready.num_blocks * ready.block_size
    console.print(
        f"weights {report.weight_bytes / 1e6:,.1f} MB; KV cache {report.kv_cache_bytes / 1e6:,.1f} MB in "
        f"{report.kv_cache_dtype}: {ready.num_blocks:,} blocks of {ready.block_size}, {tokens:,} tokens; "
        f"max_model_len {ready.max_model_len:,}",
        highlight=False,
    )
    phases = ", ".join(f"{phase} {duration:.2f}" for phase, duration in report.seconds.items())
    console.print(f"ready after {seconds:.2f} s (the engine: {phases})", highlight=False)
    for note in report.notes:
        console.print(f"note: {printable(note)}", style="yellow", highlight=False)
