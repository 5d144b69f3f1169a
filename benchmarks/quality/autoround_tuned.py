"""AutoRound 0.16 with its tuning, in its own environment.

    python autoround_tuned.py MODEL SAMPLES.pt OUT BITS GROUP ITERS

Symmetric weights, batches of 4 samples, the library's defaults otherwise. OUT is a plain
checkpoint with the weights that the codes stand for, so that whatever reads it can't differ.
"""

from __future__ import annotations

import sys

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Quantize."""
    model_path, samples, out = sys.argv[1:4]
    bits, group_size, iters = map(int, sys.argv[4:7])
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto")
    token_ids = torch.load(samples)
    rounder = AutoRound(
        model,
        tokenizer,
        scheme="W4A16",
        bits=bits,
        group_size=group_size,
        sym=True,
        iters=iters,
        batch_size=4,
        nsamples=token_ids.shape[0],
        seqlen=token_ids.shape[1],
        dataset=[{"input_ids": row.unsqueeze(0)} for row in token_ids],
        device_map="cpu",
        enable_torch_compile=False,
    )
    rounder.quantize_and_save(out, format="fake")


if __name__ == "__main__":
    main()
