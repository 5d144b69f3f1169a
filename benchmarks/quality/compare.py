"""Quality of several tools' quantizations of one model, as octavo serves them, on one held-out text.

    python benchmarks/quality/compare.py ORIGINAL TABLE.md SCHEME=TOOL=DIRECTORY ...

Every row is `octavo eval DIRECTORY --against ORIGINAL`: the same code computes all models, so that only the weights
differ. Rows of a scheme stand together, the least KL first. A row that is in TABLE.md already is kept.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from octavo.jobs.quality import measure_quality
from octavo.quant.checkpoint import Checkpoint

HEAD = ("scheme", "tool", "MB", "KL mean", "KL 99 %", "perplexity", "same top token")


def row_of(original: Path, scheme: str, tool: str, directory: Path, tokens: int) -> dict[str, object]:
    """One measured row."""
    checkpoint = Checkpoint.open(directory)
    quality = measure_quality(original, directory, max_tokens=tokens)
    return {
        "scheme": scheme,
        "tool": tool,
        "MB": round(sum(checkpoint.spec(name).nbytes for name in checkpoint.names) / 1e6, 1),
        "KL mean": round(quality.mean_kl, 5),
        "KL 99 %": round(quality.p99_kl, 4),
        "perplexity": f"{quality.perplexity_before:.3f} -> {quality.perplexity_after:.3f}",
        "same top token": f"{quality.top1_agreement:.1%}",
    }


def main() -> None:
    """Measure what is new and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path)
    parser.add_argument("table", type=Path)
    parser.add_argument("rows", nargs="+")
    parser.add_argument("--tokens", type=int, default=3000)
    args = parser.parse_args()
    kept = args.table.with_suffix(".json")
    rows = json.loads(kept.read_text()) if kept.exists() else []
    known = {(row["scheme"], row["tool"]) for row in rows}
    for entry in args.rows:
        scheme, tool, directory = entry.split("=", 2)
        if (scheme, tool) in known:
            continue
        rows.append(row_of(args.original, scheme, tool, Path(directory), args.tokens))
        print(rows[-1], flush=True)
        rows.sort(key=lambda row: (row["scheme"], row["KL mean"]))
        kept.write_text(json.dumps(rows, indent=1) + "\n")
    lines = ["| " + " | ".join(HEAD) + " |", "|" + " --- |" * len(HEAD)]
    lines += ["| " + " | ".join(str(row[name]) for name in HEAD) + " |" for row in rows]
    args.table.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
