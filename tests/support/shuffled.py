"""GPTQ checkpoints with act-order: what desc_act is to a reader, without a calibration."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SAME_INPUT = re.compile(r"\.(?:(?:[qkv]|gate|up)_proj|w1|w3)\.")
OF_EXPERTS = re.compile(r"\.(?:experts\.\d+|shared_expert)\.(?=gate|up|w1|w3)")


def input_of(name: str, alike: bool) -> str:
    """Names what a layer reads. alike: experts have seen all tokens in calibration, not those they were chosen for."""
    return SAME_INPUT.sub(".", OF_EXPERTS.sub(".", name) if alike else name)


def shuffle_groups(directory: Path, *, alike: bool = False) -> None:
    """Put the columns' groups of a GPTQ checkpoint's layers in any order, in place.

    Layers with the same input have the same order, as GPTQ finds it from that input.
    """
    path = directory / "model.safetensors"
    tensors = load_file(path)
    inputs: dict[str, int] = {}
    for name in sorted(name for name in tensors if name.endswith(".g_idx")):
        seed = inputs.setdefault(input_of(name, alike), len(inputs))
        order = torch.randperm(len(tensors[name]), generator=torch.Generator().manual_seed(seed))
        tensors[name] = tensors[name][order]
    save_file(tensors, path)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["desc_act"] = True
    (directory / "config.json").write_text(json.dumps(config))
