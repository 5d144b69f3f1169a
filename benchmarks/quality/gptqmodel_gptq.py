"""GPTQModel 7.6 on given samples, in its own environment: `python gptqmodel_gptq.py MODEL SAMPLES.pt OUT BITS GROUP`.

GPTQ, symmetric, the library's defaults otherwise. It wants more workers than two cores have, unless it is told.
"""

from __future__ import annotations

import os
import sys
import time

import torch

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
from gptqmodel import GPTQModel, QuantizeConfig


def main() -> None:
    """Quantize, and say how long it took."""
    model_path, samples, out = sys.argv[1:4]
    bits, group_size = map(int, sys.argv[4:6])
    token_ids = torch.load(samples)
    data = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in token_ids]
    model = GPTQModel.load(model_path, QuantizeConfig(bits=bits, group_size=group_size))
    begin = time.perf_counter()
    model.quantize(data, batch_size=1)
    print(f"gptqmodel: {time.perf_counter() - begin:.1f} s", flush=True)
    model.save(out)


if __name__ == "__main__":
    main()
