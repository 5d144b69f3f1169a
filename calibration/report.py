"""The report of a quantization: what was saved, layer kind by layer kind, and what it cost. A table and a JSON file."""

from __future__ import annotations

import math
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from octavo.calibration.quantize_model import LayerError, Quantized
from octavo.calibration.sidecars import write_json
from octavo.calibration.verify import Quality
from octavo.version import VERSION

REPORT = "quantization_report.json"


def build_report(result: Quantized, *, scheme: str, search: str, quality: Quality | None) -> dict[str, Any]:
    """Everything that was measured, as plain values; no path of this machine."""
    return {
        "scheme": scheme,
        "format": "compressed-tensors",
        "weights_and_activations": str(result.scheme),
        "search": search,
        "ignore": result.selection.ignore,
        "bytes": {
            "before": result.bytes_before,
            "after": result.bytes_after,
            "ratio": round(result.bytes_before / result.bytes_after, 4),
        },
        "layers": [_kind_row(kind, layers) for kind, layers in _by_kind(result.layers).items()],
        "quality": None if quality is None else asdict(quality),
        "warnings": result.warnings,
        "versions": {"octavo": VERSION, "torch": torch.__version__, "python": platform.python_version()},
    }


def _by_kind(layers: list[LayerError]) -> dict[str, list[LayerError]]:
    kinds: dict[str, list[LayerError]] = {}
    for layer in sorted(layers, key=lambda layer: (layer.linear.kind, layer.linear.index)):
        kinds.setdefault(layer.linear.kind, []).append(layer)
    return kinds


def _kind_row(kind: str, layers: list[LayerError]) -> dict[str, Any]:
    worst = min(layers, key=lambda layer: snr(layer.signal, layer.noise))
    return {
        "kind": kind,
        "count": len(layers),
        "shape": [worst.linear.out_features, worst.linear.in_features],
        "bytes_before": sum(layer.bytes_before for layer in layers),
        "bytes_after": sum(layer.bytes_after for layer in layers),
        "snr_db": _json_number(snr(sum(x.signal for x in layers), sum(x.noise for x in layers))),
        "worst_layer": worst.linear.module,
        "worst_snr_db": _json_number(snr(worst.signal, worst.noise)),
    }


def snr(signal: float, noise: float) -> float:
    """Signal-to-noise ratio in dB; infinite for a weight that is represented exactly."""
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)


def _json_number(value: float) -> float | None:
    """JSON has no infinity; null means that nothing was lost."""
    return round(value, 2) if math.isfinite(value) else None


def write_report(directory: Path, report: dict[str, Any]) -> None:
    write_json(directory / REPORT, report)


def print_report(report: dict[str, Any], console: Console) -> None:
    """The report as a table, and a line on quality."""
    table = Table(title=f"{report['scheme']}: {report['weights_and_activations']}, {report['search']} scales")
    table.add_column("layers")
    for heading in ("count", "shape", "MB before", "MB after", "SNR dB", "worst"):
        table.add_column(heading, justify="right")
    for row in report["layers"]:
        table.add_row(
            row["kind"],
            str(row["count"]),
            "x".join(map(str, row["shape"])),
            f"{row['bytes_before'] / 1e6:.1f}",
            f"{row['bytes_after'] / 1e6:.1f}",
            _decibels(row["snr_db"]),
            _decibels(row["worst_snr_db"]),
        )
    console.print(table)
    size = report["bytes"]
    console.print(
        f"weights {size['before'] / 1e6:.1f} MB -> {size['after'] / 1e6:.1f} MB ({size['ratio']:.2f}x smaller)",
        highlight=False,
    )
    quality = report["quality"]
    if quality is None:
        console.print("quality was not measured")
    else:
        change = quality["perplexity_after"] / quality["perplexity_before"] - 1
        console.print(
            f"perplexity {quality['perplexity_before']:.3f} -> {quality['perplexity_after']:.3f} ({change:+.2%}), "
            f"KL mean {quality['mean_kl']:.4f} p99 {quality['p99_kl']:.4f} nats, "
            f"same top token {quality['top1_agreement']:.1%}, over {quality['num_tokens']} tokens",
            highlight=False,
        )
    for warning in report["warnings"]:
        console.print(f"[yellow]warning:[/yellow] {warning}", highlight=False)


def _decibels(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f}"
