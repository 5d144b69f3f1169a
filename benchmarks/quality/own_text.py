"""What `octavo quantize --effort best` calibrates on: `python own_text.py MODEL SAMPLES.pt OUT.pt`.

The samples, and windows of as many tokens that MODEL has written itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from octavo.jobs.calibration_data import TUNED_SAMPLES, DataOptions, make_data


def main() -> None:
    """Write."""
    model, samples, out = sys.argv[1:4]
    given = torch.load(samples)
    asked = max(0, TUNED_SAMPLES - len(given))  # with the number, a model that can't write is an error
    data = make_data(Path(model), DataOptions(given, self_generated_samples=asked))
    torch.save(torch.stack(data.samples), out)


if __name__ == "__main__":
    main()
