"""One checkpoint by transformers and its readers of quantized checkpoints: runs in their environment. Job: peers.py.

    python transformers_greedy.py CHECKPOINT JOB.json

Weights that compressed-tensors decompresses come in bfloat16 whatever type was asked for (floats of 4 and 8 bits in
small groups). bfloat16 holds those of MXFP4 and MXFP8, which are widened to that type; NVFP4's it rounds, so they are
decompressed in that type, unless NVFP4_WEIGHTS=bfloat16 asks for what compressed-tensors does by itself. In float64,
what transformers computes in float32 whatever the model's type (norms, the softmax of its eager attention) is replaced
by the same formula in float64. A divisor replaces compressed-tensors' 127.5 for int8 activations.
"""

from __future__ import annotations

import contextlib
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
    import transformers

    if job["dtype"] == "float64":
        compute_in_float64()
    if job["divisor"] is not None:
        divide_by(job["divisor"])
    if os.environ.get("NVFP4_WEIGHTS") != "bfloat16":
        decompress_in(getattr(torch, job["dtype"]))
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=getattr(torch, job["dtype"]), attn_implementation=job["attention"]
        ).eval()
        widen(model, getattr(torch, job["dtype"]))
        with torch.inference_mode():
            answer: dict[str, object] = {
                "tokens": [greedy(model, ids, job["max_tokens"]) for ids in job["prompts"]],
                "scores": [score(model, ids, job["top"]) for ids in job["texts"]],
            }
    except Exception as error:  # whatever a peer says is the result
        answer = {"error": f"{type(error).__name__}: {error}"}
    version = f"transformers {transformers.__version__} with {', '.join(readers())}"
    print(json.dumps(answer | {"version": version}), flush=True)


def decompress_in(dtype) -> None:  # type: ignore[no-untyped-def]
    """Products of NVFP4's codes and scales, which compressed-tensors rounds to the type of its codes, bfloat16."""
    with contextlib.suppress(ImportError):
        from compressed_tensors.compressors.nvfp4 import base

        unpack = base.unpack_fp4_from_uint8
        base.unpack_fp4_from_uint8 = lambda packed, rows, columns: unpack(packed, rows, columns, dtype)


def widen(model, dtype) -> None:  # type: ignore[no-untyped-def]
    """Before each forward, and behind the hook that decompresses before the first."""
    import torch

    def hook(module, _):  # type: ignore[no-untyped-def]
        for parameter in module.parameters():
            if parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.to(dtype)

    if dtype.itemsize > 2:
        model.register_forward_pre_hook(hook)


def readers() -> list[str]:
    """What is installed beside transformers to read quantized checkpoints."""
    found = []
    for name in ("compressed-tensors", "optimum", "gptqmodel"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return found


def greedy(model, prompt: list[int], max_tokens: int) -> list[int]:  # type: ignore[no-untyped-def]
    """The most likely token, max_tokens times, through transformers' own cache."""
    import torch

    ids, past, chosen = torch.tensor([prompt]), None, []
    for _ in range(max_tokens):
        out = model(ids, past_key_values=past, use_cache=True)
        past, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        chosen.append(int(ids))
    return chosen


def score(model, ids: list[int], count: int) -> list[object]:  # type: ignore[no-untyped-def]
    import torch

    rows = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    values, tokens = (tensor.tolist() for tensor in rows.topk(count))
    following = rows.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1).tolist()
    return [
        [value, dict(zip(top, logprobs, strict=True))]
        for value, top, logprobs in zip(following, tokens, values, strict=True)
    ]


def compute_in_float64() -> None:
    import torch
    from transformers.models.llama import modeling_llama as llama
    from transformers.models.qwen2 import modeling_qwen2 as qwen2

    def rms_norm(self, x):  # type: ignore[no-untyped-def]
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    def attention(module, q, k, v, mask, scaling, **_):  # type: ignore[no-untyped-def]
        k, v = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (k, v))
        scores = q @ k.transpose(2, 3) * scaling
        return (scores if mask is None else scores + mask).softmax(-1).matmul(v).transpose(1, 2), None

    llama.LlamaRMSNorm.forward = qwen2.Qwen2RMSNorm.forward = rms_norm
    llama.eager_attention_forward = qwen2.eager_attention_forward = attention


def divide_by(divisor: float) -> None:
    """Only a dynamic scheme calls this function while a model runs."""
    from compressed_tensors.quantization.utils import helpers

    original = helpers.calculate_qparams

    def calculate(min_vals, max_vals, args, *rest, **keywords):  # type: ignore[no-untyped-def]
        scale, zero_point = original(min_vals, max_vals, args, *rest, **keywords)
        return scale * (127.5 / divisor), zero_point

    helpers.calculate_qparams = calculate


if __name__ == "__main__":
    main()
