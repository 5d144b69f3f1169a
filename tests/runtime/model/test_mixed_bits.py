"""A scheme for each layer, in a fused layer too, and a quantized head: against plain weights of the same numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from served import logits_of
from torch import Tensor

from octavo.quant.formats.compressed_tensors import CompressedTensorsFormat, write_config
from octavo.quant.qparams import quantize_weight
from octavo.quant.scheme import CHANNEL, QuantScheme, WeightScheme, group
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.weights import load_model

W8, W4, W4A, W3, W2 = (
    QuantScheme(WeightScheme("int8", CHANNEL)),
    QuantScheme(WeightScheme("int4", group(32))),
    QuantScheme(WeightScheme("int4", group(32), symmetric=False)),
    QuantScheme(WeightScheme("int3", group(32), symmetric=False)),
    QuantScheme(WeightScheme("int2", group(32))),
)
KINDS = {
    "self_attn.q_proj": W4,
    "self_attn.k_proj": W4A,
    "self_attn.v_proj": W8,
    "self_attn.o_proj": W3,
    "mlp.gate_proj": W2,
    "mlp.up_proj": W4,
    "mlp.down_proj": QuantScheme(WeightScheme("fp8_e4m3", CHANNEL)),
}
FLOAT_NOISE = 1e-4  # of logits under 20: some hundred float32 roundings


def written(source: Path, schemes: dict[str, QuantScheme], out: Path) -> tuple[Path, Path]:
    """The checkpoint quantized so, and one with the plain weights that its codes stand for."""
    tensors = load_file(source / "model.safetensors")
    quantized, plain = dict(tensors), {name: tensor.float() for name, tensor in tensors.items()}
    for module, scheme in schemes.items():
        original = tensors.get(f"{module}.weight", tensors["model.embed_tokens.weight"])  # of a tied head
        weight = quantize_weight(original, scheme)
        plain[f"{module}.weight"] = weight.dequantize()
        quantized.pop(f"{module}.weight", None)
        quantized |= {f"{module}.{name}": t for name, t in CompressedTensorsFormat(scheme).write(weight).items()}
    return (
        _checkpoint(source, quantized, out / "quantized", schemes),
        _checkpoint(source, plain, out / "plain", None),
    )


def _checkpoint(source: Path, tensors: dict[str, Tensor], out: Path, schemes: dict[str, QuantScheme] | None) -> Path:
    out.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    if schemes is not None:
        linears = [f"model.layers.{i}.{kind}" for i in range(2) for kind in KINDS]
        ignore = [module for module in (*linears, "lm_head") if module not in schemes]
        config["quantization_config"] = write_config(schemes, ignore, "minmax")
    elif "lm_head.weight" in tensors:
        config["tie_word_embeddings"] = False
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_every_layer_in_bits_of_its_own(fixtures: Path, tmp_path: Path) -> None:
    schemes = {f"model.layers.{i}.{kind}": scheme for i in range(2) for kind, scheme in KINDS.items()}
    schemes["model.layers.1.self_attn.q_proj"] = W8
    quantized, plain = written(fixtures / "tiny", schemes, tmp_path)
    ids = load_file(fixtures / "tiny" / "expected.safetensors")["input_ids"]
    torch.testing.assert_close(logits_of(quantized, ids), logits_of(plain, ids), rtol=0, atol=FLOAT_NOISE)
    rows = load_model(EngineConfig(model=str(quantized), dtype="float32")).report_layers()
    assert ("qkv (1 of 2)", "int4/g32 + int4/g32/asym + int8/channel", "dequantized at load, torch float32") in rows


@pytest.mark.parametrize("scheme", [W8, W4A, W3], ids=str)
@pytest.mark.parametrize("name", ["tiny", "tiny-qwen2"])
def test_a_quantized_head(name: str, scheme: QuantScheme, fixtures: Path, tmp_path: Path) -> None:
    """tiny-qwen2's is tied: the embedding stays as it is and the head has codes of its own."""
    quantized, plain = written(fixtures / name, {"lm_head": scheme}, tmp_path)
    ids = load_file(fixtures / name / "expected.safetensors")["input_ids"]
    torch.testing.assert_close(logits_of(quantized, ids), logits_of(plain, ids), rtol=0, atol=FLOAT_NOISE)
    model = load_model(EngineConfig(model=str(quantized), dtype="float32"))
    assert ("lm_head", str(scheme), "dequantized at load, torch float32") in model.report_layers()


def test_random_weights_in_the_shape_of_every_scheme(fixtures: Path, tmp_path: Path) -> None:
    """--load-format dummy: a static scale of the input comes from nowhere, and is 1."""
    shutil.copy(fixtures / "tiny--llmc-fp8-static" / "config.json", tmp_path)
    model = load_model(EngineConfig(model=str(tmp_path), dtype="float32", load_format="dummy"))
    assert (
        "down",
        "fp8_e4m3/tensor x fp8_e4m3/static tensor",
        "dequantized at load, torch float32",
    ) in model.report_layers()
