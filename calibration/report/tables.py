"""The tables of a report."""

from __future__ import annotations

from octavo.calibration.report.report import Report
from octavo.calibration.report.weight_error import worst_first
from octavo.report.table import Table

MOST_LAYERS = 20  # in the table of the worst


def kinds_table(report: Report) -> Table:
    """A row for each kind of layer."""
    heads = ("layers", "scheme", "count", "shape", "MB before", "MB after", "SNR, dB", "worst")
    rows = (
        (
            row.kind,
            " ".join(row.schemes),
            f"{row.count}",
            "×".join(map(str, row.shape)),
            f"{row.bytes_before / 1e6:,.1f}",
            f"{row.bytes_after / 1e6:,.1f}",
            decibels(row.snr_db),
            decibels(row.worst_snr_db),
        )
        for row in report.kinds
    )
    return Table("Layers by kind", heads, tuple(rows))


def worst_table(report: Report) -> Table:
    """The layers that lost most."""
    rows = (
        (row.module, row.scheme, decibels(row.snr_db), _decibels_if_known(row.output_snr_db))
        for row in worst_first(report.layers)[:MOST_LAYERS]
    )
    return Table("Worst layers", ("layer", "scheme", "weight SNR, dB", "output SNR, dB"), tuple(rows))


def kv_table(report: Report) -> Table:
    """A row for the keys or the values of each block; beyond and clipped: shares of them."""
    heads = ("block", "of", "stored as", "largest", "its limit", "beyond it", "clipped", "SNR dB")
    rows = (
        (
            str(row.block),
            row.side,
            row.dtype,
            f"{row.amax:.4g}",
            "" if row.limit is None else f"{row.limit:g}",
            f"{row.beyond:.2%}",
            "" if row.limit is None else f"{row.clipped:.2%}",
            _decibels_if_known(row.snr_db),
        )
        for row in report.kv_layers
    )
    return Table("KV cache", heads, tuple(rows))


def quality_table(report: Report) -> Table:
    """The cost in quality; no rows where it was not measured."""
    quality = report.quality
    rows: tuple[tuple[str, ...], ...] = ()
    if quality is not None:
        rows = (
            ("perplexity", f"{quality.perplexity_before:.3f}", f"{quality.perplexity_after:.3f}"),
            ("KL to the original per token, mean, nats", "0", f"{quality.mean_kl:.4f}"),
            ("KL to the original per token, 99th percentile, nats", "0", f"{quality.p99_kl:.4f}"),
            ("same most likely token as the original", "100%", f"{quality.top1_agreement:.1%}"),
        )
    return Table("", ("", "original", "this model"), rows)


def decibels(value: float | None) -> str:
    """A ratio of which None means that not a bit differs."""
    return "exact" if value is None else f"{value:.1f}"


def _decibels_if_known(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
