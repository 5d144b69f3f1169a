"""AutoRound 0.16 without training (iters=0), in its own environment: `python autoround_rtn.py MODEL SAMPLES.pt OUT`."""

from __future__ import annotations

import sys
import time

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Quantize, and say how long it took."""
    model_path, samples, out = sys.argv[1:4]
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto")
    token_ids = torch.load(samples)
    rounder = AutoRound(
        model,
        tokenizer,
        bits=4,
        group_size=64,
        sym=True,
        iters=0,
        nsamples=token_ids.shape[0],
        seqlen=token_ids.shape[1],
        dataset=[{"input_ids": row.unsqueeze(0)} for row in token_ids],
    )
    begin = time.perf_counter()
    rounder.quantize_and_save(out, format="auto_round:auto_gptq")
    print(f"autoround: {time.perf_counter() - begin:.1f} s", flush=True)


if __name__ == "__main__":
    main()
