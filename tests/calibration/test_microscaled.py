"""NVFP4, MXFP4 and MXFP8 out of `octavo quantize`: compressed-tensors reads what is written and means the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ct_oracle
import pytest
import torch.nn.functional as F
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from served import logits_of

import octavo
from octavo.calibration.layers import FUSED, QuantizeError
from octavo.calibration.prepare import prepare
from octavo.calibration.recipe import Recipe, RecipeError

pytestmark = pytest.mark.long

LICENSE = Path(__file__).parent.parent.parent / "LICENSE"


def quantized(fixtures: Path, out: Path, scheme: str, algorithm: str) -> Path:
    options: dict[str, Any] = {"scheme": scheme, "algorithm": algorithm, "evaluate": False}
    if algorithm != "rtn" or scheme == "NVFP4":
        text = shutil.copy(LICENSE, out.parent / "license.txt")
        options |= {"data": str(text), "num_calibration_samples": 16, "max_seq_length": 64}
    octavo.quantize(fixtures / "tiny", out, **options)
    return out


@pytest.mark.parametrize(
    ("scheme", "algorithm"),
    [
        ("NVFP4", "rtn"),
        ("NVFP4", "awq+gptq"),
        ("NVFP4A16", "rtn"),
        ("NVFP4A16", "gptq"),
        ("MXFP4", "gptq"),
        ("MXFP4A16", "awq"),
        ("MXFP8", "rtn"),
        ("MXFP8A16", "gptq"),
    ],
)
def test_what_is_written_means_the_same_to_compressed_tensors(
    fixtures: Path, tmp_path: Path, scheme: str, algorithm: str
) -> None:
    out = quantized(fixtures, tmp_path / "out", scheme, algorithm)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    theirs, parsed = ct_oracle.scheme_of(scheme), QuantizationConfig(**config)
    assert parsed.format == theirs.format
    (group_,) = parsed.config_groups.values()
    for args, wanted in ((group_.weights, theirs.weights), (group_.input_activations, theirs.input_activations)):
        assert (args is None) == (wanted is None)
        for key in ("num_bits", "type", "strategy", "group_size", "dynamic", "symmetric", "scale_dtype"):
            assert getattr(args, key, None) == getattr(wanted, key, None), key
    tensors = load_file(out / "model.safetensors")
    if scheme.startswith("NVFP4"):
        for joined in (parts for parts in FUSED if f"model.layers.1.{parts[0]}.weight_packed" in tensors):
            for kind in ("weight", "input")[: 1 if scheme.endswith("A16") else 2]:
                names = [f"model.layers.1.{name}.{kind}_global_scale" for name in joined]
                assert len({float(tensors[name]) for name in names}) == 1
    ids = load_file(fixtures / "tiny" / "expected.safetensors")["input_ids"]
    expected, ours = ct_oracle.logits_of_checkpoint(out, scheme, ids), logits_of(out, ids)
    difference = (ours - expected).abs().amax(-1)
    if scheme.endswith("A16"):
        assert float(difference.max()) < 1e-4
    else:
        assert float((difference < 1e-4).float().mean()) >= 0.05  # until a tie of a rounded input falls the other way


def divergence(fixtures: Path, written: Path) -> float:
    expected = load_file(fixtures / "tiny" / "expected.safetensors")
    truth = F.log_softmax(expected["logits"].double(), dim=-1)
    guess = F.log_softmax(logits_of(written, expected["input_ids"]).double(), dim=-1)
    return float((truth.exp() * (truth - guess)).sum(-1).mean())


def test_gptq_beats_rounding_on_both_grids(fixtures: Path, tmp_path: Path) -> None:
    for scheme in ("NVFP4A16", "MXFP4A16"):
        written = {how: quantized(fixtures, tmp_path / f"{scheme}-{how}", scheme, how) for how in ("rtn", "gptq")}
        kl = {how: divergence(fixtures, out) for how, out in written.items()}
        assert kl["gptq"] < 0.9 * kl["rtn"], kl


def test_what_cant_be_is_refused_by_name(fixtures: Path, tmp_path: Path) -> None:
    for spelled, message in (("NVFP4@32", "NVFP4 has groups of 16"), ("NVFP4A8", "scheme 'NVFP4A8' is unknown")):
        with pytest.raises(RecipeError, match=message):
            Recipe(spelled)
    with pytest.raises(RecipeError, match="format gptq holds integer weights"):
        Recipe("MXFP4A16", format="gptq")
    with pytest.raises(RecipeError, match="format fp8 holds FP8_BLOCK"):
        Recipe("MXFP8", format="fp8")
    with pytest.raises(QuantizeError, match="NVFP4 needs calibration text"):
        prepare(fixtures / "tiny", tmp_path / "out", Recipe("NVFP4"))
