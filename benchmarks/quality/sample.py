"""Calibration samples for every tool, the same token ids: `python benchmarks/quality/sample.py MODEL TEXT OUT.pt`.

Uses octavo's own data pipeline: windows of the text by a seed. OUT holds int64 [samples, tokens].
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from octavo.jobs.calibration_data import DataOptions, make_data


def main() -> None:
    """Write the samples."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("text")
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512)
    args = parser.parse_args()
    data = make_data(args.model, DataOptions(args.text, num_samples=args.samples, max_seq_length=args.tokens))
    torch.save(torch.stack(list(data.samples)), args.out)
    print(data.fingerprint, data.source)


if __name__ == "__main__":
    main()
