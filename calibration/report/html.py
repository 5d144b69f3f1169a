"""A report as one HTML page that needs nothing else: no script, no font, no image, no link to anywhere."""

from __future__ import annotations

from html import escape

from octavo.calibration.report.plots import block_snr, kind_snr, kl_histogram
from octavo.calibration.report.report import Report
from octavo.calibration.report.tables import kinds_table, kv_table, worst_table

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6575; --line: #d5dae2; --page: #fff; --card: #f5f7fa;
  --bar: #3a6ea5; --mark: #c2571a; --good: #1b7f4b; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #9aa4b5; --line: #384151; --page: #14181f;
  --card: #1d232d; --bar: #6ba0d8; --mark: #e8935a; --good: #58c48b; --bad: #f2837b; } }
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p.sub { color: var(--soft); margin: .2rem 0 1.2rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; }
.tile { background: var(--card); border-radius: 8px; padding: .7rem 1rem; }
.tile b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .85rem; }
.verdict { border-left: 4px solid var(--good); padding: .4rem .9rem; margin: 1.2rem 0; background: var(--card); }
.verdict.failed { border-color: var(--bad); } .verdict p { margin: .2rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
svg { width: 100%; height: auto; background: var(--card); border-radius: 8px; }
.bar { fill: var(--bar); } .line { fill: none; stroke: var(--bar); stroke-width: 2; } .dot { fill: var(--bar); }
.mark { stroke: var(--mark); stroke-width: 2; } .grid { stroke: var(--line); }
.tick { fill: var(--soft); font-size: 12px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; } dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
"""


def render_html(report: Report) -> str:
    """The whole page. Every value out of a checkpoint or a command line is escaped."""
    title = f"{report.model}: {report.scheme}"
    how = f"quantized with {report.algorithm}, " if report.task == "quantize" else "evaluated; "
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="sub">{escape(how)}in the format {escape(report.format)}</p>',
        _tiles(report),
        _verdict(report),
        _plots(report),
        kinds_table(report).to_html(),
        worst_table(report).to_html(),
        kv_table(report).to_html(),
        _details(report),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def _tiles(report: Report) -> str:
    sizes = report.sizes
    quality = report.quality
    tiles = [(f"{sizes.after / 1e6:,.1f} MB", f"{sizes.ratio:.2f} times smaller than {sizes.before / 1e6:,.1f} MB")]
    if sizes.bits_per_weight is not None:
        tiles.append((f"{sizes.bits_per_weight:.2f} bits", "a weight of the quantized layers, scales included"))
    if quality is not None:
        tiles += [
            (f"{quality.mean_kl:.4f}", f"mean KL, nats a token; 99th percentile {quality.p99_kl:.4f}"),
            (
                f"{quality.perplexity_after:.3f}",
                f"perplexity; the original's {quality.perplexity_before:.3f} ({quality.perplexity_change:+.2%})",
            ),
            (f"{quality.top1_agreement:.1%}", f"same most likely token, of {quality.num_tokens:,}"),
        ]
    inner = "".join(f'<div class="tile"><b>{escape(b)}</b><span>{escape(text)}</span></div>' for b, text in tiles)
    return f'<div class="tiles">{inner}</div>'


def _verdict(report: Report) -> str:
    if report.verdict is None:
        return "" if report.quality else '<div class="verdict failed"><p>Quality was not measured.</p></div>'
    lines = "".join(f"<p>{escape(line)}</p>" for line in report.verdict.lines())
    return f'<div class="verdict{"" if report.verdict.passed else " failed"}">{lines}</div>'


def _plots(report: Report) -> str:
    quality = report.quality
    parts = []
    if quality is not None:
        histogram = kl_histogram(quality.kl_histogram, quality.mean_kl, quality.p99_kl)
        parts += ["<h2>KL divergence per token</h2>", histogram]
        if quality.blocks:
            parts += ["<h2>Hidden states: signal over noise, block by block</h2>", block_snr(quality.blocks)]
    if report.kinds:
        parts += ["<h2>Weights: signal over noise, by kind of layer</h2>", kind_snr(report.kinds)]
    return "\n".join(parts)


def _details(report: Report) -> str:
    facts = {
        "original": report.base_model,
        "architecture": report.architecture,
        "KV cache": report.kv_cache,
        **report.options,
        "left as they are": ", ".join(report.ignore),
        **{f"seconds to {phase}": value for phase, value in report.seconds.items()},
        **report.versions,
    }
    if report.calibration is not None:
        data = report.calibration
        made = ", generated by the model itself" if data.generated else ""
        facts["calibration text"] = (
            f"{data.source}{made}: {data.samples} samples, {data.tokens:,} tokens, seed {data.seed}"
        )
    if report.quality is not None:
        facts["measured on"] = (
            f"{report.quality.text}, {report.quality.num_tokens:,} tokens in windows of {report.quality.window}"
        )
    known = {name: value for name, value in facts.items() if value not in (None, "")}
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>\n" for name, value in known.items())
    warnings = "".join(f"<li>{escape(warning)}</li>\n" for warning in report.warnings)
    warned = f"<h2>Warnings</h2>\n<ul>\n{warnings}</ul>\n" if warnings else ""
    return f"{warned}<h2>How it was made</h2>\n<dl>\n{items}</dl>"
