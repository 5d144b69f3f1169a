"""llm-compressor 0.14 on given samples, in its own environment: `python llm_compressor.py MODEL SAMPLES.pt OUT KIND`.

KIND: W4A16@64 and W4A8@64 (any bits and group), NVFP4 and MXFP4, all with GPTQ; W8A8 (SmoothQuant and GPTQ, as its
examples have it); FP8, FP8_BLOCK, FP8_DYNAMIC; awq-W4A16@64, awq-W4A16_ASYM@64. Options are the library's defaults. AWQ
pins memory, which needs a GPU: that one call is stubbed.
"""

from __future__ import annotations

import sys
import time

import torch
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer

IGNORED = ["lm_head"]


def recipe(kind: str) -> list[Modifier]:
    """What one KIND is."""
    if kind in ("FP8", "FP8_BLOCK", "FP8_DYNAMIC"):
        return [QuantizationModifier(targets="Linear", scheme=kind, ignore=IGNORED)]
    if kind.startswith("awq-"):
        return [AWQModifier(), QuantizationModifier(config_groups=groups(kind[4:]), ignore=IGNORED)]
    gptq = GPTQModifier(config_groups=groups(kind), ignore=IGNORED)
    return [SmoothQuantModifier(smoothing_strength=0.8), gptq] if kind == "W8A8" else [gptq]


def groups(kind: str) -> dict[str, QuantizationScheme]:
    """A preset, in groups of another size after an @."""
    preset, _, size = kind.partition("@")
    scheme = preset_name_to_scheme(preset, ["Linear"])
    if size:
        scheme.weights.group_size = int(size)
    return {"group_0": scheme}


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
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe(kind),
        max_seq_length=token_ids.shape[1],
        num_calibration_samples=token_ids.shape[0],
    )
    print(f"{kind}: {time.perf_counter() - begin:.1f} s", flush=True)
    model.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
