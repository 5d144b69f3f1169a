"""GPTQ and AWQ checkpoints with awkward features through load_model, against dense models of the same weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from served import logits_of
from torch import Tensor
from trimmed import whole

from octavo.quant.checkpoint import CheckpointError
from octavo.quant.formats.awq import AWQFormat, write_awq_config
from octavo.quant.formats.format import QuantFormat
from octavo.quant.formats.gptq import GPTQFormat, write_gptq_config
from octavo.quant.qparams import quantize_weight
from octavo.quant.scheme import QuantScheme, WeightDtype, WeightScheme, group
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.decoder import Decoder
from octavo.runtime.model.weights import load_model

FLOAT_NOISE = 1e-4  # of logits under 20: some hundred float32 roundings
IDS = torch.arange(2, 34).reshape(1, 32)
LAYER = re.compile(r"(layers\.\d+\..*_proj|lm_head)\.weight$")
Choice = Callable[[str], QuantFormat | None]


def scheme(dtype: WeightDtype, size: int, symmetric: bool = True) -> QuantScheme:
    return QuantScheme(WeightScheme(dtype, group(size), symmetric))


def check(base: Path, out: Path, config: Mapping[str, Any], choose: Choice, *, shuffled: bool = False) -> None:
    """Logits of `base` quantized by `choose` equal a dense model's of what its codes stand for.

    shuffled: each layer's columns have their groups in an order of its own.
    """
    quantized, dense = dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        format_ = choose(module) if LAYER.search(name) else None
        if format_ is None:
            quantized[name] = dense[name] = tensor
            continue
        weight = quantize_weight(tensor, format_.scheme, scale_dtype=torch.float16)
        if shuffled:
            k = tensor.shape[1]
            g_idx = torch.arange(k, dtype=torch.int32) // (format_.scheme.weight.granularity.group_size or k)
            weight = replace(weight, g_idx=g_idx[torch.randperm(k, generator=torch.Generator().manual_seed(len(name)))])
        quantized |= {f"{module}.{suffix}": t for suffix, t in format_.write(weight).items()}
        dense[name] = weight.dequantize()
    plain = json.loads((base / "config.json").read_text())
    ours = save(out / "quantized", quantized, plain | {"quantization_config": dict(config)})
    truth = save(out / "dense", dense, plain)
    torch.testing.assert_close(logits_of(ours, IDS), logits_of(truth, IDS), rtol=0, atol=FLOAT_NOISE)


def save(directory: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return directory


def table_of(directory: Path) -> dict[str, tuple[str, str]]:
    """Scheme and body of each kind of layer, served in bfloat16."""
    model = load_model(EngineConfig(model=str(directory), dtype="bfloat16"))
    assert isinstance(model, Decoder)
    return {kind: (scheme, body) for kind, scheme, body in model.report_layers()}


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize(("dtype", "size"), [("int4", 64), ("int3", 32), ("int2", 32), ("int8", -1)])
def test_gptq_of_any_width(fixtures: Path, tmp_path: Path, dtype: WeightDtype, size: int, shuffled: bool) -> None:
    """352 columns are five groups of 64 and a half. shuffled is desc_act."""
    format_ = GPTQFormat(scheme(dtype, size), 2, desc_act=shuffled)
    config = write_gptq_config(format_.scheme, ["lm_head"], version=2, desc_act=shuffled)
    check(fixtures / "tiny", tmp_path, config, lambda m: None if m == "lm_head" else format_, shuffled=shuffled)


def test_gptq_with_a_scheme_for_each_part_of_a_fused_layer_and_a_quantized_head(fixtures: Path, tmp_path: Path) -> None:
    """q, k and v in 4, 8 and 3 bits, v asymmetric; o_proj left as it is; lm_head in 8 bits."""
    schemes = {
        "q_proj": scheme("int4", 32),
        "k_proj": scheme("int8", 64),
        "v_proj": scheme("int3", -1, symmetric=False),
        "lm_head": scheme("int8", 128),
        "up_proj": scheme("int4", 32),
        "gate_proj": scheme("int4", 32),
        "down_proj": scheme("int4", 32),
    }

    def choose(module: str) -> GPTQFormat | None:
        found = schemes.get(module.rpartition(".")[2])
        return None if found is None else GPTQFormat(found, 2)

    names = [name.removesuffix(".weight") for name in load_file(fixtures / "tiny" / "model.safetensors")]
    formats = {module: choose(module) for module in names if LAYER.search(f"{module}.weight")}
    named = {module: format_.scheme for module, format_ in formats.items() if format_ is not None}
    ignore = [module for module, format_ in formats.items() if format_ is None]
    assert len(ignore) == 2
    check(fixtures / "tiny", tmp_path, write_gptq_config(named, ignore, version=2), choose)


@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_of_a_model_with_biases_and_a_layer_left_alone(fixtures: Path, tmp_path: Path, symmetric: bool) -> None:
    format_ = AWQFormat(scheme("int4", 64, symmetric))
    kept = "model.layers.1.mlp.up_proj"
    config = write_awq_config(format_.scheme, [kept])
    check(fixtures / "tiny-qwen2", tmp_path, config, lambda module: None if module == kept else format_)


@pytest.mark.parametrize("label", ["gptq", None])
def test_a_wrong_label_is_noted_and_the_zero_points_believed(fixtures: Path, tmp_path: Path, label: str | None) -> None:
    name = "tiny--gptqmodel-w4g32-v2"
    model, expected = whole(fixtures / name, tmp_path), load_file(fixtures / name / "expected.safetensors")
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] |= {"checkpoint_format": label, "format": label}
    (model / "config.json").write_text(json.dumps(config))
    ours = logits_of(model, expected["input_ids"])
    torch.testing.assert_close(ours, expected["logits"], rtol=0, atol=FLOAT_NOISE)
    notes = load_model(EngineConfig(model=str(model))).notes
    assert len([note for note in notes if "are gptq_v2's: read as such" in note]) == 1


def test_what_contradicts_its_config_is_refused_by_the_layers_name(fixtures: Path, tmp_path: Path) -> None:
    model = whole(fixtures / "tiny--gptqmodel-w4g32-asym", tmp_path)
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"]["sym"] = True
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"^model\.layers\.0\.self_attn\.q_proj: qzeros holds .* sym is true"):
        load_model(EngineConfig(model=str(model)))


def test_bodies(fixtures: Path, tmp_path: Path) -> None:
    """Act-order and narrow weights have native bodies, where the processor has its instructions; down no act-order."""
    act_order = ", columns in order of their groups"
    kinds = {
        "tiny--gptqmodel-w4g32-act": ("int4/g32", "int4 weights x bf16" + act_order),
        "tiny--gptqmodel-w3g32": ("int3/g32", "int3 weights in 4 bits x bf16"),
        "tiny--autoawq-w4g32": ("int4/g32/asym", "int4 weights x bf16"),
        "tiny--gptqmodel-w8g32": ("int8/g32", "int8 weights x bf16"),
    }
    for name, row in kinds.items():
        table = table_of(whole(fixtures / name, tmp_path))
        dequantized = (row[0], "dequantized at load, torch bfloat16")
        assert table.pop("down") in ((row[0], row[1].removesuffix(act_order)), dequantized)
        found = [table[kind] for kind in table if kind not in ("embedding", "lm_head", "norms, rope, attention")]
        assert set(found) in ({row}, {dequantized})


@pytest.mark.parametrize("name", ["tiny--gptqmodel-w4g32-act", "tiny--autoawq-w4g32"])
def test_random_weights_have_the_configs_schemes(fixtures: Path, tmp_path: Path, name: str) -> None:
    model = tmp_path / "empty"
    model.mkdir()
    (model / "config.json").write_bytes((fixtures / name / "config.json").read_bytes())
    loaded = load_model(EngineConfig(model=str(model), load_format="dummy"))
    assert isinstance(loaded, Decoder)
    schemes = {kind: scheme for kind, scheme, _ in loaded.report_layers()}
    assert schemes.pop("lm_head") == schemes.pop("embedding") == "bfloat16"
    del schemes["norms, rope, attention"]
    assert set(schemes.values()) == {"int4/g32/asym" if "awq" in name else "int4/g32"}
