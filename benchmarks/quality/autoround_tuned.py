"""AutoRound 0.16 with its tuning, in its own environment.

    python autoround_tuned.py MODEL SAMPLES.pt OUT SCHEME STEPS

SCHEME: W4A16@64 (any bits and group), W4A8@64, or one of PRESETS. Symmetric weights, batches of 4 samples, the
library's defaults otherwise, but amp is off on a CPU where bfloat16 takes 1.6 times as long as float32: an Intel that
has no AMX (octavo decides so, too, in `kernels/native/cpu_features.py`, which this environment doesn't have).
OUT is a plain checkpoint with the weights that the codes stand for, so that whatever reads it can't differ; but where
inputs have scales that are stored (NVFP4, FP8), llm-compressor's format has them.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

PRESETS = {"W8A8": "INT8_W8A8", "FP8": "FP8_STATIC", "NVFP4": "NVFP4", "MXFP4": "MXFP4"}


def main() -> None:
    """Quantize."""
    model_path, samples, out, scheme, steps = sys.argv[1:6]
    token_ids = torch.load(samples)
    rounder = AutoRound(
        AutoModelForCausalLM.from_pretrained(model_path, dtype="auto"),
        AutoTokenizer.from_pretrained(model_path),
        **_scheme(scheme),
        iters=int(steps),
        batch_size=4,
        nsamples=token_ids.shape[0],
        seqlen=token_ids.shape[1],
        dataset=[{"input_ids": row.unsqueeze(0)} for row in token_ids],
        device_map="cpu",
        enable_torch_compile=False,
        amp=torch.cpu._is_amx_tile_supported() or "AuthenticAMD" in Path("/proc/cpuinfo").read_text(),
    )
    has_input_scales = scheme in ("NVFP4", "FP8")
    rounder.quantize_and_save(out, format="llm_compressor" if has_input_scales else "fake")
    if not has_input_scales:
        for file in Path(out).rglob("config.json"):  # which says how its library is to round inputs
            config = json.loads(file.read_text())
            config.pop("quantization_config", None)
            file.write_text(json.dumps(config))


def _scheme(name: str) -> dict[str, Any]:
    if name in PRESETS:
        return {"scheme": PRESETS[name]}
    found = re.fullmatch(r"W(\d)A(\d+)@(\d+)", name)
    if found is None:
        raise SystemExit(f"scheme {name}: W4A16@64, W4A8@64 and {', '.join(PRESETS)} are known")
    bits, inputs, group = map(int, found.groups())
    scheme = {"scheme": "W4A16", "bits": bits, "group_size": group, "sym": True}
    if inputs == 16:
        return scheme
    return scheme | {"act_bits": inputs, "act_group_size": -1, "act_sym": True, "act_dynamic": True}


if __name__ == "__main__":
    main()
