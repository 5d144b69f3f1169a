"""Experts in the formats that name no module class: GPTQ, AWQ and native FP8."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_oracle import scattered_logits
from safetensors.torch import load_file, save_file

import octavo.quant.body
from octavo.quant.formats.awq import AWQFormat, write_awq_config
from octavo.quant.formats.format import QuantFormat
from octavo.quant.formats.fp8 import Fp8Format, write_fp8_config
from octavo.quant.formats.gptq import GPTQFormat, write_gptq_config
from octavo.quant.qparams import quantize_weight
from octavo.quant.scheme import PRESETS, QuantScheme, WeightScheme, group
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.weights import load_model

INT4 = QuantScheme(WeightScheme("int4", group(32)))
INT4_ASYM = QuantScheme(WeightScheme("int4", group(32), symmetric=False))
FORMATS: dict[str, tuple[QuantFormat, torch.dtype, Callable[[QuantScheme, list[str]], dict[str, Any]]]] = {
    "gptq": (GPTQFormat(INT4), torch.float16, write_gptq_config),
    "gptq_v2": (GPTQFormat(INT4_ASYM, version=2), torch.float16, partial(write_gptq_config, version=2)),
    "awq": (AWQFormat(INT4_ASYM), torch.float16, write_awq_config),
    "fp8": (Fp8Format(PRESETS["FP8_BLOCK"]), torch.float32, write_fp8_config),
}


@pytest.mark.parametrize("name", FORMATS)
def test_experts_in_every_format(name: str, fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a plain checkpoint of what the codes stand for; activations are left as they are, which others test."""
    monkeypatch.setattr(octavo.quant.body, "input_rounding", lambda *_: lambda x: x)
    format_, scale_dtype, write_config = FORMATS[name]
    config = json.loads((fixtures / "tiny-moe" / "config.json").read_text())
    plain = {n: t.float() for n, t in load_file(fixtures / "tiny-moe" / "model.safetensors").items()}
    stored, ignore = dict(plain), ["lm_head"]
    for weight_name in [n for n in plain if ".layers." in n and plain[n].ndim == 2]:
        module = weight_name.removesuffix(".weight")
        if module.endswith("mlp.gate"):
            ignore.append(module)
            continue
        weight = quantize_weight(stored.pop(weight_name), format_.scheme, scale_dtype=scale_dtype)
        stored |= {f"{module}.{suffix}": tensor for suffix, tensor in format_.write(weight).items()}
        plain[weight_name] = weight.dequantize()
    quantized = config | {"quantization_config": write_config(format_.scheme, ignore)}
    found = []
    for kind, tensors, content in (("plain", plain, config), ("quantized", stored, quantized)):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").write_text(json.dumps(content))
        save_file(tensors, tmp_path / kind / "model.safetensors")
        model = load_model(EngineConfig(model=str(tmp_path / kind), dtype="float32"))
        found.append(torch.cat(scattered_logits(model, [list(range(3, 20)), list(range(40, 49))])))
    schemes = {kind: scheme for kind, scheme, _ in model.report_layers()}
    assert schemes["experts.*.gate_up"] == schemes["experts.*.down"] == schemes["qkv"] == str(format_.scheme)
    assert torch.equal(*found)


def test_dummy_experts_are_quantized_as_the_config_says(fixtures: Path) -> None:
    directory = fixtures / "tiny-moe--llmc-w4a16-g32"
    model = load_model(EngineConfig(model=str(directory), dtype="float32", load_format="dummy"))
    schemes = {kind: scheme for kind, scheme, _ in model.report_layers()}
    assert schemes["experts.*.gate_up"] == schemes["experts.*.down"] == schemes["o"] == "int4/g32"
