"""One library for benchmarks/embeddings.py: lists of texts come as lines of JSON, seconds and a vector go back.

    python benchmarks/embeddings_child.py octavo|sentence_transformers|vllm MODEL bfloat16|auto

It imports nothing of this repository but octavo, so that it runs in the peers' environments too.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

BATCH = 32


def main() -> None:
    module, model, dtype = sys.argv[1:]
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to stdout
    embed = _embedder(importlib.import_module(module), model, dtype)
    print("ready", file=told, flush=True)
    for line in sys.stdin:
        texts = json.loads(line)
        begun = time.perf_counter()
        vectors = embed(texts)
        seconds = time.perf_counter() - begun
        print(json.dumps({"seconds": seconds, "first": [float(x) for x in vectors[0]]}), file=told, flush=True)


def _embedder(library: Any, model: str, dtype: str) -> Callable[[list[str]], list[Any]]:
    """Texts -> vectors, a batch after the other."""
    if library.__name__ == "sentence_transformers":
        encoder = library.SentenceTransformer(model, device="cpu", model_kwargs={"dtype": dtype})
        return lambda texts: [
            vector
            for batch in _batches(texts)
            for vector in encoder.encode(batch, batch_size=BATCH, convert_to_tensor=True)
        ]
    options = {"runner": "pooling"} if library.__name__ == "vllm" else {}
    llm = library.LLM(model, dtype=dtype, **options)
    return lambda texts: [
        out.outputs.embedding for batch in _batches(texts) for out in llm.embed(batch, use_tqdm=False)
    ]


def _batches(texts: list[str]) -> Iterator[list[str]]:
    return (texts[begin : begin + BATCH] for begin in range(0, len(texts), BATCH))


if __name__ == "__main__":
    main()
