"""One class LLM for benchmarks/offline.py, octavo's or vLLM's: loads come as lines of JSON, and seconds go back.

    python benchmarks/offline_child.py octavo|vllm MODEL '{"max_model_len": 2048}'

It imports nothing of this repository but octavo, so that it runs in vLLM's environment too.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time


def main() -> None:
    module, model, options = sys.argv[1:]
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to stdout
    library = importlib.import_module(module)
    llm = library.LLM(model, **json.loads(options))
    print("ready", file=told, flush=True)
    for line in sys.stdin:
        load = json.loads(line)
        begun = time.perf_counter()
        params = [library.SamplingParams(temperature=0, max_tokens=most, ignore_eos=True) for most in load["tokens"]]
        outputs = llm.generate(load["prompts"], params, use_tqdm=False)
        seconds = time.perf_counter() - begun
        counts = [len(output.outputs[0].token_ids) for output in outputs]
        cached = sum(output.num_cached_tokens or 0 for output in outputs)
        print(json.dumps({"seconds": seconds, "counts": counts, "cached": cached}), file=told, flush=True)


if __name__ == "__main__":
    main()
