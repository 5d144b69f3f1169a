"""What `octavo inspect` found as one HTML page."""

from __future__ import annotations

from typing import Any

from octavo.quant.printable import printable
from octavo.report.page import Answer, Block, Facts, Page, Section, Tiles
from octavo.report.table import Table


def inspect_page(facts: dict[str, Any], model: str) -> str:
    """The whole page. facts: what `--json` prints; model: its name, which is no path of this machine."""
    below = f"{facts['architecture']} ({facts['model_type']}), {facts['format']}"
    sections = (
        Section("", (_answer(facts["to_serve"]), _tiles(facts))),
        Section("Layers by kind", (_layers(facts),)),
        *_kernels(facts),
        Section("What is in it", (_details(facts),)),
    )
    return Page(printable(model), printable(below), sections).to_html()


def _answer(needs: dict[str, Any]) -> Block:
    if "problem" in needs:
        return Answer((f"Not served by octavo's decoder: {printable(needs['problem'])}",), unsure=True)
    if "note" in needs:
        return Answer((printable(needs["note"]),))
    return Answer((f"Served by octavo's decoder on {needs['device']}.",))


def _tiles(facts: dict[str, Any]) -> Tiles:
    needs = facts["to_serve"]
    parameters = sum(row["parameters"] for row in facts["layers"])
    tiles = [
        (f"{needs['weight_bytes'] / 1e6:,.1f} MB", "of weights, as stored"),
        (f"{parameters / 1e6:,.1f}M", "parameters, scales not counted"),
    ]
    if parameters:
        tiles.append((f"{needs['weight_bytes'] * 8 / parameters:.2f} bits", "a parameter, scales included"))
    if "kv_bytes_per_1k_tokens" in needs:
        cache = needs["kv_bytes_per_1k_tokens"]
        tiles += [
            (
                f"{cache['bfloat16'] / 1e6:,.1f} MB",
                f"of KV cache for 1,000 tokens; {cache['int8'] / 1e6:,.1f} MB in fp8 or int8",
            ),
            (f"{needs['max_position']:,}", "tokens of context"),
        ]
    if (state := needs.get("state_bytes_per_sequence")) is not None:
        tiles.append((f"{state / 1e6:,.1f} MB", "of states for a sequence, however long it is"))
    return Tiles(tuple(tiles))


def _layers(facts: dict[str, Any]) -> Table:
    rows = (
        (
            printable(row["kind"].removeprefix("model.")),
            printable(row["scheme"]),
            f"{row['count']:,}",
            f"{row['parameters']:,}",
            f"{row['bytes'] / 1e6:,.2f}",
            row["kernel"] or "",
        )
        for row in facts["layers"]
    )
    return Table("", ("layers", "scheme", "count", "parameters", "MB", "kernel"), tuple(rows))


def _kernels(facts: dict[str, Any]) -> tuple[Section, ...]:
    """Which kernels serve the layers there, and why."""
    reasons: dict[str, list[str]] = {}
    for row in facts["layers"]:
        if row["kernel"] and row["reason"] not in reasons.setdefault(row["kernel"], []):
            reasons[row["kernel"]].append(row["reason"])
    joined = tuple((kernel, printable("; ".join(found))) for kernel, found in reasons.items())
    return (Section("Why these kernels", (Facts(joined),)),) if joined else ()


def _details(facts: dict[str, Any]) -> Facts:
    cache = facts["kv_cache"]
    found = [("files", f"{facts['files']:,}"), ("tensors", f"{facts['tensors']:,}")]
    if cache["scales"]:
        found.append(("scales of the KV cache", f"{cache['scales']} for {cache['dtype'] or 'a quantized cache'}"))
    return Facts(tuple(found))
