"""One GPTQ or AWQ checkpoint by gptqmodel, by its kernel in plain torch: runs in its environment. Job: peers.py.

    python gptqmodel_greedy.py CHECKPOINT JOB.json

gptqmodel loads a model in float16 or bfloat16, and its layers multiply by scales of that type: bfloat16 rounds those
that the file has. In float32 the model is loaded in float16 and widened, scales included; the code is gptqmodel's own.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys


def main() -> None:
    checkpoint, job_path = sys.argv[1:]
    with open(job_path) as file:
        job = json.load(file)
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    try:
        from gptqmodel import BACKEND, GPTQModel

        dtype = getattr(torch, job["dtype"])
        loaded = torch.float16 if dtype == torch.float32 else dtype
        model = GPTQModel.load(checkpoint, device="cpu", backend=BACKEND.TORCH, dtype=loaded).model.eval().to(dtype)
        with torch.inference_mode():
            answer: dict[str, object] = {"tokens": [greedy(model, ids, job["max_tokens"]) for ids in job["prompts"]]}
    except Exception as error:  # whatever a peer says is the result
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer | {"version": f"gptqmodel {importlib.metadata.version('gptqmodel')}"}), flush=True)


def greedy(model, prompt: list[int], max_tokens: int) -> list[int]:  # type: ignore[no-untyped-def]
    import torch

    ids, past, chosen = torch.tensor([prompt]), None, []
    for _ in range(max_tokens):
        out = model(ids, past_key_values=past, use_cache=True)
        past, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        chosen.append(int(ids))
    return chosen


if __name__ == "__main__":
    main()
