"""One checkpoint by octavo's reference bodies in float64: runs in octavo's environment. The job: see peers.py.

    python octavo_float64.py CHECKPOINT JOB.json

octavo has no float64 of its own. The reference bodies are plain torch and say `.float()` where they widen; here that
widens to float64, and everything else is octavo's own code: loading, schemes, rounding, decoder, paged cache. Only the
logits come out in float32.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor

from octavo import __version__
from octavo.kernels.attention import reference as attention_reference
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.native import cpu_features
from octavo.quant import input_rounding, kernel_table
from octavo.runtime.config import EngineConfig
from octavo.runtime.model import dtypes, operators, weights
from octavo.runtime.model.device import Device
from octavo.runtime.model.model import Model
from octavo.runtime.worker.kv_cache import allocate


def main() -> None:
    checkpoint, job_path = sys.argv[1:]
    with open(job_path) as file:
        job = json.load(file)
    compute_in_float64()
    if job["divisor"] is not None:
        divide_by(job["divisor"])
    device = Device(torch.device("cpu"), 0, lambda _: operators.REFERENCE)
    model = weights.load_model(EngineConfig(model=checkpoint, dtype="float32"), device)
    assert model.dtype == torch.float64
    answer = {
        "tokens": [greedy(model, ids, job["max_tokens"]) for ids in job["prompts"]],
        "scores": [score(model, ids, job["top"]) for ids in job["texts"]],
    }
    print(json.dumps(answer | {"version": f"octavo {__version__}"}), flush=True)


def compute_in_float64() -> None:
    names = {name: getattr(torch, name) for name in dir(torch)} | {"float32": torch.float64}
    attention_reference.torch = SimpleNamespace(**names)  # type: ignore[assignment]
    attention_reference.gather.__defaults__ = (torch.float64,)
    dtypes.DTYPES["float32"] = torch.float64
    wide = [row for row in kernel_table.TABLE if torch.float32 in row.dtypes]
    kernel_table.TABLE = tuple(replace(row, dtypes=(torch.float64,)) for row in wide)
    cpu_features.has_dot_products = lambda: False
    Tensor.float = Tensor.double  # type: ignore[method-assign]


def divide_by(divisor: float) -> None:
    def fake_quantize_per_token(x: Tensor) -> Tensor:
        absmax = x.abs().amax(dim=-1, keepdim=True)
        scale = torch.where(absmax == 0, 1.0, absmax / divisor)
        return (x / scale).round().clamp(-128, 127) * scale

    own = SimpleNamespace(fake_quantize_per_token=fake_quantize_per_token)
    input_rounding.int8_reference = own  # type: ignore[assignment]


def greedy(model: Model, prompt: list[int], max_tokens: int) -> list[int]:
    """The most likely token, max_tokens times, through the paged cache."""
    size = len(prompt) + max_tokens
    caches = allocate(model, 1, size, model.dtype)
    chosen = [int(model.forward(StepInputs.prefill([len(prompt)], size, token_ids=prompt), caches).argmax())]
    for length in range(len(prompt) + 1, size):
        step = StepInputs.decode([length], size, token_ids=chosen[-1:])
        chosen.append(int(model.forward(step, caches).argmax()))
    return chosen


def score(model: Model, ids: list[int], count: int) -> list[object]:
    step = StepInputs.prefill([len(ids)], len(ids), token_ids=ids, logits_index=range(len(ids)))
    rows = model.forward(step, allocate(model, 1, len(ids), model.dtype))[:-1].double().log_softmax(-1)
    values, tokens = (tensor.tolist() for tensor in rows.topk(count))
    following = rows.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1).tolist()
    return [
        [value, dict(zip(top, logprobs, strict=True))]
        for value, top, logprobs in zip(following, tokens, values, strict=True)
    ]


if __name__ == "__main__":
    main()
