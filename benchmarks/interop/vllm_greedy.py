"""One checkpoint by vLLM: runs in vLLM's environment, knows nothing of octavo. The job is described in peers.py.

    python vllm_greedy.py CHECKPOINT JOB.json

PLAIN_TORCH in the environment names an op that vLLM's build for CPUs lacks, and that is plain torch then; all else is
vLLM's own. hadacore_transform multiplies by Sylvester's matrix over sqrt(n), static_scaled_fp8_quant rounds to e4m3 by
a stored scale, with the formula of vLLM's QuantFP8.forward_native.
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

    if op := os.environ.get("PLAIN_TORCH"):
        {"hadacore_transform": replace_hadacore, "static_scaled_fp8_quant": replace_static_fp8}[op]()
    try:
        model = vllm.LLM(
            checkpoint, dtype=job["dtype"], max_model_len=1024, enforce_eager=True, enable_prefix_caching=False
        )
        params = vllm.SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True)
        answer: dict[str, object] = {
            "tokens": [list(output.outputs[0].token_ids) for output in run(model, job["prompts"], params)]
        }
        params = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=job["top"])
        answer["scores"] = [score(output) for output in run(model, job["texts"], params)]
    except Exception as error:  # whatever a peer says is the result
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer | {"version": f"vLLM {vllm.__version__}"}), flush=True)
    os._exit(0)  # some builds end in `terminate called` after a correct answer


def replace_hadacore() -> None:
    import torch
    from vllm import _custom_ops

    def transform(x, inplace=True):  # type: ignore[no-untyped-def]  # noqa: ARG001
        out = x.float().reshape(-1, x.shape[-1])
        half = 1
        while half < x.shape[-1]:
            first, second = out.view(len(out), -1, 2, half).unbind(2)
            out = torch.stack([first + second, first - second], 2).reshape(len(out), -1)
            half *= 2
        return (out * x.shape[-1] ** -0.5).to(x.dtype).view(x.shape)

    _custom_ops.hadacore_transform = transform


def replace_static_fp8() -> None:
    import torch
    from vllm import _custom_ops

    original = _custom_ops.scaled_fp8_quant

    def quantize(x, scale=None, *rest, group_shape=None, **named):  # type: ignore[no-untyped-def]
        if scale is None:
            return original(x, scale, *rest, group_shape=group_shape, **named)
        if scale.numel() != 1 or any(rest) or any(value is not None for value in named.values()):
            raise ValueError(f"only one scale is known here, not {list(scale.shape)}, {rest}, {named}")
        largest = torch.finfo(torch.float8_e4m3fn).max
        return (x.float() * scale.float().reciprocal()).clamp(-largest, largest).to(torch.float8_e4m3fn), scale

    _custom_ops.scaled_fp8_quant = quantize


def run(model, prompts: list[list[int]], params):  # type: ignore[no-untyped-def]
    import vllm

    return model.generate([vllm.TokensPrompt(prompt_token_ids=ids) for ids in prompts], params, use_tqdm=False)


def score(output) -> list[object]:  # type: ignore[no-untyped-def]
    places = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return [
        [entries[token].logprob, {other: entry.logprob for other, entry in entries.items()}]
        for token, entries in places
    ]


if __name__ == "__main__":
    main()
