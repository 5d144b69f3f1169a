"""Decode at several lengths of context, by octavo's LLM: what a token costs behind 1,000 tokens and behind 32,000.

    PYTHONPATH=src python -m benchmarks.context_length MODEL [--contexts 1000 32000] [--rounds 5] [--options JSON]

MODEL needs no weights with --options '{"load_format": "dummy"}': decode's time doesn't depend on their values. Prompts
are random tokens, prefilled once; then each round asks for one token and for 65 of each context, out of the prefix
cache, and 64 tokens' time is the difference. Contexts take turns, so that what else the machine does meets all of them.
The cache has room for all contexts; a prompt that isn't found there again is an error, since its prefill would count.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from typing import Any

from benchmarks.intervals import interval

from octavo import LLM, SamplingParams

TOKENS = 64


def seconds(llm: LLM, prompt: list[int], count: int) -> tuple[float, int]:
    """Of an answer of so many tokens, and how many of the prompt's tokens were computed for it."""
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    begun = time.perf_counter()
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    return time.perf_counter() - begun, len(prompt) - (output.num_cached_tokens or 0)


def a_token(llm: LLM, prompt: list[int]) -> float:
    """Seconds of a token of decode behind a prompt that the cache has."""
    (many, computed), (one, again) = (seconds(llm, prompt, count) for count in (TOKENS + 1, 1))
    if max(computed, again) > TOKENS:
        raise SystemExit(f"{computed} and {again} tokens of a prompt of {len(prompt)} were computed anew")
    return (many - one) / TOKENS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1000, 32000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--options", default="{}", help="more arguments of octavo's LLM, as JSON")
    args = parser.parse_args()
    options: dict[str, Any] = {"max_model_len": max(args.contexts) + 2 * TOKENS, "max_num_seqs": len(args.contexts)}
    rng = random.Random(0)
    with LLM(args.model, **(options | json.loads(args.options))) as llm:
        prompts = {length: [rng.randrange(1000, 30000) for _ in range(length)] for length in args.contexts}
        for length, prompt in prompts.items():
            print(f"prefill of {length:,}: {seconds(llm, prompt, 1)[0]:.1f} s", file=sys.stderr, flush=True)
        for prompt in prompts.values():
            seconds(llm, prompt, 1)  # what a longer one displaced
        rounds = []
        for _ in range(args.rounds):
            rounds.append({length: a_token(llm, prompt) for length, prompt in prompts.items()})
            print({n: f"{1000 * s:.2f} ms" for n, s in rounds[-1].items()}, file=sys.stderr, flush=True)
    first = args.contexts[0]
    print("| context | ms a token | to the first |\n|---|---|---|")
    for length in args.contexts:
        ratios = [r[length] / r[first] for r in rounds]
        low, high = interval(ratios, statistics.median)
        middle = 1000 * statistics.median(r[length] for r in rounds)
        print(f"| {length:,} | {middle:.2f} | {statistics.median(ratios):.3f} ({low:.3f} to {high:.3f}) |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
