"""The three plots of a report, drawn by matplotlib as SVG that stands in the page: no script, no font, no link.

Colors are the page's own variables, so that a plot is light or dark as the page is. A title in an element is what a
browser shows under the pointer.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from octavo.calibration.report.weight_error import KindRow
from octavo.calibration.verify import KL_EDGES, BlockSnr

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 8.0  # inches, of 72 units
HEIGHT = 2.9
ROW = 0.3  # of a horizontal bar
STEP = KL_EDGES[1] / KL_EDGES[0]

# What matplotlib is told, and what stands in the page for it
BAR = "#000001"
MARK = "#000002"
SOFT = "#000003"
GRID = "#000004"
VARIABLES = {BAR: "var(--series-0)", MARK: "var(--series-1)", SOFT: "var(--soft)", GRID: "var(--line)"}
SETTINGS: dict[Any, Any] = {  # matplotlib's type for it is a list of all its names
    "svg.fonttype": "none",  # text stays text
    "font.size": 9,
    "text.color": SOFT,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
}


def kl_histogram(counts: Sequence[int], mean: float, p99: float) -> str:
    """A histogram of the tokens' KL: a bin is a quarter of a decade, the first and the last are open."""
    figure, axes = _figure(HEIGHT, top=0.25)
    edges = [KL_EDGES[0] / STEP, *KL_EDGES, KL_EDGES[-1] * STEP]
    widths = [high - low for low, high in pairwise(edges)]
    bars = axes.bar(edges[:-1], counts, widths, align="edge", color=BAR, edgecolor="none")
    tips = {}
    for i, (bar, count) in enumerate(zip(bars, counts, strict=True)):
        bar.set_gid(f"kl-{i}")
        low = f"{edges[i]:.2g}" if i else "0"
        high = f"{edges[i + 1]:.2g}" if i < len(KL_EDGES) else "more"
        tips[f"kl-{i}"] = f"{low} to {high} nats: {count} tokens"
    axes.set_xscale("log")
    decades = range(-6, 2)
    axes.set_xticks([10.0**n for n in decades], [f"1e{n}" for n in decades])
    axes.minorticks_off()
    axes.set_xlim(edges[0], edges[-1])
    for name, value, side in (("mean", mean, "right"), ("p99", p99, "left")):
        x = min(max(value, edges[0]), edges[-1])
        axes.axvline(x, color=MARK)
        shift = -4 if side == "right" else 4
        axes.annotate(
            f"{name} {value:.3g}", (x, 1), (shift, 4), ("data", "axes fraction"), "offset points", ha=side, color=SOFT
        )
    axes.set_xlabel("KL of the next token's distribution, nats")
    axes.set_ylabel("tokens")
    return _svg(figure, "kl", "Histogram of the KL divergence per token", tips)


def block_snr(blocks: Sequence[BlockSnr]) -> str:
    """Signal over noise of the hidden state behind each block; a block that is exact has no dot."""
    figure, axes = _figure(HEIGHT)
    known = [(block.block, block.snr_db) for block in blocks if block.snr_db is not None]
    axes.plot([block for block, _ in known], [snr for _, snr in known], color=BAR)
    tips = {}
    for block, snr in known:
        (dot,) = axes.plot([block], [snr], "o", color=BAR, markersize=5)
        dot.set_gid(f"block-{block}")
        tips[f"block-{block}"] = f"block {block}: {snr:.1f} dB"
    axes.set_xlim(-0.5, max(1, len(blocks)) - 0.5)
    axes.set_ylim(bottom=min([0.0, *(snr for _, snr in known)]))
    axes.locator_params("x", integer=True)
    axes.set_xlabel("decoder block")
    axes.set_ylabel("dB")
    return _svg(figure, "block", "Signal-to-noise ratio of the hidden state behind each decoder block", tips)


def kind_snr(kinds: Sequence[KindRow]) -> str:
    """The weights' signal over noise, a bar for each kind of layer and a stroke at the kind's worst layer."""
    longest = max((len(row.kind) for row in kinds), default=0)
    figure, axes = _figure(0.8 + ROW * len(kinds), left=0.3 + 0.075 * longest)
    top = max([row.snr_db for row in kinds if row.snr_db is not None and row.snr_db > 0], default=1.0)
    tips = {}
    for i, row in enumerate(kinds):
        snr = top if row.snr_db is None else max(0.0, row.snr_db)
        axes.barh(i, snr, 0.7, color=BAR, edgecolor="none")
        label = "exact" if row.snr_db is None else f"{row.snr_db:.1f} dB"
        axes.annotate(label, (snr, i), (5, 0), textcoords="offset points", va="center", color=SOFT)
        if row.worst_snr_db is not None and math.isfinite(row.worst_snr_db):
            (mark,) = axes.plot([max(0.0, row.worst_snr_db)] * 2, [i - 0.42, i + 0.42], color=MARK, linewidth=2)
            mark.set_gid(f"kind-{i}")
            tips[f"kind-{i}"] = f"worst: {row.worst_layer}, {row.worst_snr_db:.1f} dB"
    axes.set_yticks(range(len(kinds)), [row.kind for row in kinds], parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, top * 1.12)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("dB")
    return _svg(figure, "kind", "Signal-to-noise ratio of the weights by kind of layer", tips)


def _figure(height: float, *, left: float = 0.6, top: float = 0.1) -> tuple[Figure, Axes]:
    """An empty plot with these margins; to find them itself, matplotlib would draw everything twice.

    It is imported when a plot is drawn, since that takes half a second.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(SETTINGS):
        figure = Figure((WIDTH, height))
        share = (left / WIDTH, 0.5 / height, 1 - (left + 0.15) / WIDTH, 1 - (0.5 + top) / height)
        axes = figure.add_axes(share)
        axes.grid(visible=True, axis="both", linewidth=0.6)
        axes.tick_params(which="both", length=0)
    return figure, axes


def _svg(figure: Figure, name: str, summary: str, tips: Mapping[str, str]) -> str:
    """The plot as an element of a page. name: of this plot, in whose identifiers it stands."""
    from matplotlib import rc_context

    out = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with rc_context(SETTINGS | {"svg.hashsalt": name, "svg.id": name}):
        figure.savefig(out, format="svg", transparent=True, metadata=metadata)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(
        r"<style.*?</style>|<metadata>.*?</metadata>|<!--.*?-->| xmlns(:\w+)?=\"[^\"]*\"", "", text, flags=re.DOTALL
    )
    text = re.sub(r" (width|height)=\"[\d.]+pt\"", "", text, count=2)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", text)
    for color, variable in VARIABLES.items():
        text = text.replace(color, variable)
    for gid, tip in tips.items():
        text = text.replace(f'<g id="{gid}">', f'<g id="{gid}"><title>{escape(tip)}</title>')
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(summary)}" ', 1).strip()
