"""What `octavo inspect` found as one HTML page."""

from __future__ import annotations

from typing import Any

from octavo.calibration.report.page import heading, listing, page, tiles, verdict
from octavo.calibration.report.tables import Table
from octavo.quant.printable import printable


def inspect_page(facts: dict[str, Any], model: str) -> str:
    """The whole page. facts: what `--json` prints; model: its name, which is no path of this machine."""
    title = printable(model)
    below = f"{facts['architecture']} ({facts['model_type']}), {facts['format']}"
    parts = [heading(title, printable(below)), _tiles(facts), _verdict(facts["to_serve"]), _layers(facts).to_html()]
    return page(title, [*parts, _kernels(facts), _details(facts)])


def _tiles(facts: dict[str, Any]) -> str:
    needs = facts["to_serve"]
    parameters = sum(row["parameters"] for row in facts["layers"])
    figures = [
        (f"{needs['weight_bytes'] / 1e6:,.1f} MB", "of weights, as stored"),
        (f"{parameters / 1e6:,.1f}M", "parameters, scales not counted"),
    ]
    if parameters:
        figures.append((f"{needs['weight_bytes'] * 8 / parameters:.2f} bits", "a parameter, scales included"))
    if "kv_bytes_per_1k_tokens" in needs:
        cache = needs["kv_bytes_per_1k_tokens"]
        figures += [
            (
                f"{cache['bfloat16'] / 1e6:,.1f} MB",
                f"of KV cache for 1,000 tokens; {cache['int8'] / 1e6:,.1f} MB in fp8 or int8",
            ),
            (f"{needs['max_position']:,}", "tokens of context"),
        ]
    return tiles(figures)


def _verdict(needs: dict[str, Any]) -> str:
    if "problem" in needs:
        return verdict([f"Not served by octavo's decoder: {printable(needs['problem'])}"], passed=False)
    if "note" in needs:
        return verdict([printable(needs["note"])], passed=True)
    return verdict([f"Served by octavo's decoder on {needs['device']}."], passed=True)


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
    return Table("Layers by kind", ("layers", "scheme", "count", "parameters", "MB", "kernel"), tuple(rows))


def _kernels(facts: dict[str, Any]) -> str:
    """Which kernels serve the layers there, and why."""
    reasons: dict[str, list[str]] = {}
    for row in facts["layers"]:
        if row["kernel"] and row["reason"] not in reasons.setdefault(row["kernel"], []):
            reasons[row["kernel"]].append(row["reason"])
    if not reasons:
        return ""
    joined = {kernel: printable("; ".join(found)) for kernel, found in reasons.items()}
    return f"<h2>Why these kernels</h2>\n{listing(joined)}"


def _details(facts: dict[str, Any]) -> str:
    cache = facts["kv_cache"]
    scales = f"{cache['scales']} for {cache['dtype'] or 'a quantized cache'}" if cache["scales"] else None
    found = {"files": facts["files"], "tensors": f"{facts['tensors']:,}", "scales of the KV cache": scales}
    return f"<h2>What is in it</h2>\n{listing(found)}"
