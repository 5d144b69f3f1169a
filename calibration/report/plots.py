"""Three plots as inline SVG: text in, text out. No script, no font, no link; colours are the page's own variables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from octavo.calibration.report.weight_error import KindRow
from octavo.calibration.verify import KL_EDGES, BlockSnr

WIDTH = 720
HEIGHT = 260
LEFT = 56
RIGHT = 16
TOP = 16
BOTTOM = 44
ROW = 26  # of a horizontal bar


def kl_histogram(counts: Sequence[int], mean: float, p99: float) -> str:
    """A histogram of the tokens' KL: a bin is a quarter of a decade, the first and the last are open."""
    most = max(counts)
    step = (WIDTH - LEFT - RIGHT) / len(counts)
    body = _grid(most, _ticks(most), "tokens")
    for i, count in enumerate(counts):
        height = (HEIGHT - TOP - BOTTOM) * count / most
        low = f"{KL_EDGES[i - 1]:.2g}" if i else "0"
        high = f"{KL_EDGES[i]:.2g}" if i < len(KL_EDGES) else "more"
        body.append(
            f'<rect class="bar" x="{LEFT + i * step + 1:.1f}" y="{HEIGHT - BOTTOM - height:.1f}" '
            f'width="{step - 2:.1f}" height="{height:.1f}"><title>{low} to {high} nats: {count} tokens</title></rect>'
        )
    for exponent in range(-6, 2):
        x = LEFT + step * (1 + 4 * (exponent + 6))
        body.append(_label(x, f"1e{exponent}"))
    for name, value, side, shift in (("mean", mean, "end", -4), ("p99", p99, "start", 4)):
        x = LEFT + step * (1 + 4 * (min(max(math.log10(max(value, 1e-9)), -6.25), 1.25) + 6))
        body.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        body.append(
            f'<text class="tick" x="{x + shift:.1f}" y="{TOP - 4}" text-anchor="{side}">{name} {value:.3g}</text>'
        )
    body.append(_below("KL of the next token's distribution, nats"))
    return _svg("Histogram of the KL divergence per token", HEIGHT, body)


def block_snr(blocks: Sequence[BlockSnr]) -> str:
    """Signal over noise of the hidden state behind each block; a block that is exact has no dot."""
    known = [(block.block, block.snr_db) for block in blocks if block.snr_db is not None]
    top = max([snr for _, snr in known], default=1.0)
    low = min([0.0, *(snr for _, snr in known)])
    body = _grid(top, _ticks(top), "dB", low)
    step = (WIDTH - LEFT - RIGHT) / max(1, len(blocks))

    def place(index: int, snr: float) -> tuple[float, float]:
        return LEFT + (index + 0.5) * step, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (snr - low) / ((top - low) or 1)

    points = [(*place(block, snr), block, snr) for block, snr in known]
    body.append(f'<polyline class="line" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in points)}"/>')
    body += [
        f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>block {block}: {snr:.1f} dB</title></circle>'
        for x, y, block, snr in points
    ]
    every = max(1, math.ceil(len(blocks) / 16))
    for block in range(0, len(blocks), every):
        x, _ = place(block, low)
        body.append(_label(x, str(block)))
    body.append(_below("decoder block"))
    return _svg("Signal-to-noise ratio of the hidden state behind each decoder block", HEIGHT, body)


def kind_snr(kinds: Sequence[KindRow]) -> str:
    """The weights' signal over noise, a bar for each kind of layer and a stroke at the kind's worst layer."""
    left = 210
    known = [row for row in kinds if row.snr_db is not None]
    top = max([row.snr_db or 0.0 for row in known], default=1.0) or 1.0
    scale = (WIDTH - left - 70) / top
    body = []
    for i, row in enumerate(kinds):
        y = 8 + i * ROW
        snr = top if row.snr_db is None else max(0.0, row.snr_db)
        label = "exact" if row.snr_db is None else f"{row.snr_db:.1f} dB"
        body.append(f'<text class="tick" x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(row.kind)}</text>')
        body.append(f'<rect class="bar" x="{left}" y="{y}" width="{snr * scale:.1f}" height="{ROW - 8}"/>')
        body.append(f'<text class="tick" x="{left + snr * scale + 6:.1f}" y="{y + 13}">{label}</text>')
        if row.worst_snr_db is not None:
            x = left + max(0.0, row.worst_snr_db) * scale
            body.append(
                f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 2}" y2="{y + ROW - 6}">'
                f"<title>worst: {escape(row.worst_layer)}, {row.worst_snr_db:.1f} dB</title></line>"
            )
    return _svg("Signal-to-noise ratio of the weights by kind of layer", 16 + ROW * len(kinds), body)


def _grid(top: float, ticks: Sequence[float], unit: str, low: float = 0.0) -> list[str]:
    lines = []
    for value in ticks:
        y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / ((top - low) or 1)
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    lines.append(f'<text class="tick" x="4" y="{TOP - 4}">{unit}</text>')
    return lines


def _ticks(top: float) -> list[float]:
    """Round numbers from 0 up, four or five of them."""
    if top <= 0:
        return [0.0]
    power = 10 ** math.floor(math.log10(top))
    step = next(power * part for part in (0.2, 0.25, 0.5, 1.0, 2.0, 2.5) if top / (power * part) <= 5)
    return [step * i for i in range(int(top / step) + 1)]


def _label(x: float, text: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{text}</text>'


def _below(label: str) -> str:
    return f'<text class="tick" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{label}</text>'


def _svg(title: str, height: int, body: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">\n' + "\n".join(body) + "\n</svg>"
    )
