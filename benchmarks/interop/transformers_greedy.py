"""Greedy tokens of one checkpoint by transformers and compressed-tensors: runs in their environment.

    python transformers_greedy.py CHECKPOINT JOB.json

The job and the answer are those of vllm_greedy.py; "attention" in the job is transformers' attn_implementation.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    checkpoint, job_path = sys.argv[1:]
    with open(job_path) as file:
        job = json.load(file)
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=getattr(torch, job["dtype"]), attn_implementation=job.get("attention", "sdpa")
        ).eval()
        answer: dict[str, object] = {"tokens": [greedy(model, ids, job["max_tokens"]) for ids in job["prompts"]]}
    except Exception as error:  # whatever a peer says is the result
        answer = {"error": f"{type(error).__name__}: {error}"}
    import compressed_tensors

    version = f"transformers {transformers.__version__}, compressed-tensors {compressed_tensors.__version__}"
    print(json.dumps(answer | {"version": version}), flush=True)


def greedy(model, prompt: list[int], max_tokens: int) -> list[int]:  # type: ignore[no-untyped-def]
    """The most likely token, max_tokens times; end tokens don't end it, as with ignore_eos."""
    import torch

    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
        )
    return output[0, len(prompt) :].tolist()


if __name__ == "__main__":
    main()
