"""octavo on given samples: `python octavo_samples.py MODEL SAMPLES.pt OUT SCHEME ALGORITHM`; nothing is measured."""

from __future__ import annotations

import sys

import torch

import octavo


def main() -> None:
    """Quantize."""
    model, samples, out, scheme, algorithm = sys.argv[1:6]
    data = None if algorithm == "rtn" else torch.load(samples)
    octavo.quantize(model, out, scheme=scheme, algorithm=algorithm, data=data, evaluate=False, overwrite=True)


if __name__ == "__main__":
    main()
