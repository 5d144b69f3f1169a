"""Greedy tokens of one checkpoint by vLLM: runs in vLLM's environment, knows nothing of octavo.

    python vllm_greedy.py CHECKPOINT JOB.json

JOB.json holds {"prompts": [[token ids]], "max_tokens": n, "dtype": "bfloat16"}; the answer, on the last line of stdout,
is {"tokens": [[token ids]], "version": ...}, or {"error": ...} with the peer's own words.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    checkpoint, job_path = sys.argv[1:]
    with open(job_path) as file:
        job = json.load(file)
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_CPU_KVCACHE_SPACE="1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # an error in the worker reaches us with its words
    import vllm

    try:
        model = vllm.LLM(
            checkpoint, dtype=job["dtype"], max_model_len=1024, enforce_eager=True, enable_prefix_caching=False
        )
        params = vllm.SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True)
        prompts = [vllm.TokensPrompt(prompt_token_ids=ids) for ids in job["prompts"]]
        outputs = model.generate(prompts, params, use_tqdm=False)
        answer = {"tokens": [list(output.outputs[0].token_ids) for output in outputs]}
    except Exception as error:  # whatever a peer says is the result
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer | {"version": f"vLLM {vllm.__version__}"}), flush=True)
    os._exit(0)  # some builds end in `terminate called` after a correct answer


if __name__ == "__main__":
    main()
