"""llm-compressor 0.14 on given samples, in its own environment: `python llm_compressor.py MODEL SAMPLES.pt OUT KIND`.

KIND: gptq-w4g64, awq-w4g64, w8a8 (SmoothQuant and GPTQ, as its examples have it), fp8, fp8-block, fp8-dynamic. Options
are the library's defaults. AWQ pins memory, which needs a GPU: that one call is stubbed.
"""

from __future__ import annotations

import sys
import time

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer

W4G64 = {
    "group_0": QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=64, symmetric=True),
    )
}
W4G64_ASYM = {
    "group_0": QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=64, symmetric=False),
    )
}
HEAD = ["lm_head"]
RECIPES = {
    "gptq-w4g64": lambda: [GPTQModifier(config_groups=W4G64, ignore=HEAD)],
    "awq-w4g64": lambda: [AWQModifier(), QuantizationModifier(config_groups=W4G64, ignore=HEAD)],
    "awq-w4g64-asym": lambda: [AWQModifier(), QuantizationModifier(config_groups=W4G64_ASYM, ignore=HEAD)],
    "w8a8": lambda: [
        SmoothQuantModifier(smoothing_strength=0.8),
        GPTQModifier(targets="Linear", scheme="W8A8", ignore=HEAD),
    ],
    "fp8": lambda: [QuantizationModifier(targets="Linear", scheme="FP8", ignore=HEAD)],
    "fp8-block": lambda: [QuantizationModifier(targets="Linear", scheme="FP8_BLOCK", ignore=HEAD)],
    "fp8-dynamic": lambda: [QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=HEAD)],
}


def main() -> None:
    """Quantize, and say how long it took."""
    model_path, samples, out, kind = sys.argv[1:5]
    if not torch.cuda.is_available():  # nothing to pin for
        IntermediatesCache.pin_memory = lambda *_: None
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    token_ids = torch.load(samples)
    data = Dataset.from_dict({"input_ids": token_ids.tolist(), "attention_mask": torch.ones_like(token_ids).tolist()})
    begin = time.perf_counter()
    recipe = RECIPES[kind]()
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        max_seq_length=token_ids.shape[1],
        num_calibration_samples=token_ids.shape[0],
    )
    print(f"{kind}: {time.perf_counter() - begin:.1f} s", flush=True)
    model.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
