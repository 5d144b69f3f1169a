"""A report on the terminal: its tables, and a line each on sizes, quality, the verdict and every warning."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from octavo.calibration.report.report import Report
from octavo.calibration.report.tables import kinds_table, kv_table
from octavo.calibration.verify import Quality
from octavo.report.table import Table


def print_report(report: Report, console: Console) -> None:
    """The report as tables, and lines on sizes, quality and the verdict."""
    if report.kinds:
        console.print(_kinds(report).to_rich())
    if report.kv_layers:
        console.print(replace(kv_table(report), title=f"KV cache: {report.kv_cache}").to_rich())
    sizes = report.sizes
    bits = f", {sizes.bits_per_weight:.2f} bits a quantized weight" if sizes.bits_per_weight else ""
    lines = [f"weights {sizes.before / 1e6:.1f} MB -> {sizes.after / 1e6:.1f} MB ({sizes.ratio:.2f}x smaller{bits})"]
    if report.calibration is not None:
        better = "; text of your users is better: --dataset" if report.calibration.generated else ""
        lines.append(f"calibration text: {report.calibration.source}{better}")
    lines += [str(report.embeddings)] if report.embeddings is not None else quality_lines(report.quality)
    if report.rtn_kl is not None and report.quality is not None:
        lines.append(f"KL mean: {report.algorithm} {report.quality.mean_kl:.4f}, rtn {report.rtn_kl:.4f}")
    if report.verdict is not None:
        lines += report.verdict.lines()
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for warning in report.warnings:
        console.print("[yellow]warning:[/yellow]", end=" ")
        console.print(warning, highlight=False, markup=False, soft_wrap=True)


def _kinds(report: Report) -> Table:
    """The table under what was asked for. Eighty columns are enough when one scheme for all stands in the title."""
    table = kinds_table(report)
    schemes = {scheme for row in report.kinds for scheme in row.schemes}
    title = report.scheme
    if report.task == "quantize":
        title += f"{f' ({next(iter(schemes))})' if len(schemes) == 1 else ''}, {report.algorithm}"
    return replace(table if len(schemes) > 1 else table.without("scheme"), title=f"{title}, {report.format}")


def quality_lines(quality: Quality | None) -> list[str]:
    """For a person."""
    if quality is None:
        return ["quality was not measured"]
    lines = [
        f"perplexity {quality.perplexity_before:.3f} -> {quality.perplexity_after:.3f} "
        f"({quality.perplexity_change:+.2%}), KL mean {quality.mean_kl:.4f} p99 {quality.p99_kl:.4f} nats, "
        f"same top token {quality.top1_agreement:.1%}, over {quality.num_tokens:,} tokens of {quality.text}"
    ]
    known = [block for block in quality.blocks if block.snr_db is not None]
    if known:
        first = known[0]
        last = known[-1]
        lines.append(
            f"hidden states: signal over noise {first.snr_db:.1f} dB behind block {first.block}, "
            f"{last.snr_db:.1f} dB behind block {last.block}"
        )
    return lines
