"""compressed-tensors' transforms of inputs: read and written, its own code computing the same; others are refused."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from calibrated import held_out_tokens
from compressed_tensors.transform import TransformArgs, TransformConfig, TransformScheme, apply_transform_config
from hf_oracle import CASES, make_hf, save
from rotated_copies import rotated_copy, unquantized
from safetensors.torch import load_file, save_file
from served import logits_of

import octavo
from octavo.calibration.layers import QuantizeError
from octavo.calibration.recipe import Recipe, RecipeError
from octavo.cli import main
from octavo.quant.checkpoint import Checkpoint, CheckpointError
from octavo.quant.dequantized import open_dequantized
from octavo.runtime.config import EngineConfig
from octavo.runtime.lora_config import LoraOptions
from octavo.runtime.model.device import Device
from octavo.runtime.model.operators import REFERENCE
from octavo.runtime.model.sources import LoadError
from octavo.runtime.model.weights import load_model

SAME = 1e-4  # of logits in float32
DOWN = ["re:.*down_proj$"]


def ids(config: transformers.PretrainedConfig) -> torch.Tensor:
    return torch.randint(3, config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(3))


def r4(targets: list[str] = DOWN, **how: Any) -> TransformScheme:
    """As llm-compressor's SpinQuantModifier makes it."""
    before = TransformArgs(targets=targets, location="input")
    within = TransformArgs(targets=targets, location="weight_input", inverse=True)
    return TransformScheme(**{"type": "hadamard", "head_dim": 32, "apply": [before, within]} | how)


def written_by_compressed_tensors(model: Any, into: Path, **groups: TransformScheme) -> Path:
    """The model with the transforms applied by its own code, the matrices beside the weights, each once."""
    config = TransformConfig(config_groups=groups)
    turned = copy.deepcopy(model)
    apply_transform_config(turned, config)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in turned.state_dict().items():
        if not any(tensor.data_ptr() == other.data_ptr() for other in tensors.values()):
            tensors[name] = tensor.contiguous()
    into.mkdir()
    said = model.config.to_dict() | {"quantization_config": unquantized(config.model_dump(mode="json"))}
    (into / "config.json").write_text(json.dumps(said))
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    return into


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_checkpoint_of_compressed_tensors_gives_the_models_logits(name: str, tmp_path: Path) -> None:
    model = make_hf(*CASES[name])
    tokens = ids(model.config)
    with torch.no_grad():
        expected = model(tokens).logits
    directory = written_by_compressed_tensors(model, tmp_path / "rotated", R4=r4())
    assert sum(key.endswith("R4_input.weight") for key in load_file(directory / "model.safetensors")) == 1
    torch.testing.assert_close(logits_of(directory, tokens), expected, atol=SAME, rtol=SAME)
    plain = open_dequantized(directory)
    down = model.model.layers[1].mlp.down_proj.weight
    torch.testing.assert_close(plain.tensor("model.layers.1.mlp.down_proj.weight"), down, atol=1e-6, rtol=1e-5)
    assert not any("R4" in key for key in plain.names)


@pytest.mark.parametrize(("name", "size"), [("llama", None), ("qwen3", 16), ("qwen2", 8)])
def test_compressed_tensors_computes_the_same_from_what_octavo_writes(
    name: str, size: int | None, tmp_path: Path
) -> None:
    """Its own transforms before down_proj, in transformers, which by itself reads no transform_config."""
    model = make_hf(*CASES[name])
    tokens = ids(model.config)
    with torch.no_grad():
        expected = model(tokens).logits
    source = save(model, tmp_path / "model")
    recipe = Recipe("W4A16", rotations=("R1", "R2", "R4"), transform_block_size=size)
    turned = rotated_copy(source, tmp_path / "rotated", recipe)
    torch.testing.assert_close(logits_of(turned, tokens), expected, atol=SAME, rtol=SAME)
    config = json.loads((turned / "config.json").read_text())
    transforms = TransformConfig.model_validate(config.pop("quantization_config")["transform_config"])
    (scheme,) = transforms.config_groups.values()
    assert scheme.head_dim == (size or 32)
    scheme.apply = [args for args in scheme.apply if args.is_online()]
    (turned / "config.json").write_text(json.dumps(config))
    again = transformers.AutoModelForCausalLM.from_pretrained(turned).eval()
    with torch.no_grad():
        assert not torch.allclose(again(tokens).logits, expected, atol=1e-2)
        apply_transform_config(again, transforms)
        torch.testing.assert_close(again(tokens).logits, expected, atol=SAME, rtol=SAME)


def test_an_mtp_layer_behind_the_last_one_is_not_said_to_be_rotated(fixtures: Path, tmp_path: Path) -> None:
    """It is kept as it is, and its name differs from the decoder's layers' by the number alone."""
    checkpoint = Checkpoint.open(fixtures / "tiny-qwen2")
    source = tmp_path / "model"
    source.mkdir()
    config = checkpoint.config | {"model_type": "mimo", "num_nextn_predict_layers": 1}
    (source / "config.json").write_text(json.dumps(config))
    tensors = {name: checkpoint.tensor(name).clone() for name in checkpoint.names}
    last, mtp = (f"model.layers.{config['num_hidden_layers'] - 1 + i}.mlp.down_proj.weight" for i in range(2))
    tensors[mtp] = tensors[last].clone()
    save_file(tensors, source / "model.safetensors")
    turned = rotated_copy(source, tmp_path / "rotated", Recipe("W4A16", rotations=("R4",)))
    stored = load_file(turned / "model.safetensors")
    assert torch.equal(stored[mtp], tensors[mtp])
    assert not torch.allclose(stored[last], tensors[last], atol=1e-2)
    assert torch.equal(open_dequantized(turned).tensor(mtp), tensors[mtp])


@pytest.mark.parametrize("algorithm", ["gptq", pytest.param("tune", marks=pytest.mark.slow)])
def test_what_is_written_stands_for_the_original(algorithm: str, fixtures: Path, tmp_path: Path) -> None:
    """And again for it once it is dequantized."""
    out = tmp_path / "out"
    tokens = held_out_tokens(fixtures / "tiny", 4, 64)
    how = {"scheme": "W8A16@32", "algorithm": algorithm, "rotations": ["R2", "R4"]}
    report = octavo.quantize(fixtures / "tiny", out, data=list(tokens), evaluate=False, **how)
    assert any(warning.startswith("R4: ") for warning in report.warnings)
    assert all(row.output_snr_db is None or row.output_snr_db > 30 for row in report.layers)
    original = logits_of(fixtures / "tiny", tokens)
    assert (logits_of(out, tokens) - original).norm() < 0.05 * original.norm()
    name = "model.layers.0.mlp.down_proj.weight"
    before = Checkpoint.open(fixtures / "tiny").tensor(name).float()
    after = open_dequantized(out).tensor(name).float()
    assert (after - before).norm() < 0.02 * before.norm()


def test_algorithms_see_inputs_as_they_are_rotated(fixtures: Path, tmp_path: Path) -> None:
    """What is corrected for the inputs before their rotation is further from the original than what isn't at all."""
    tokens = held_out_tokens(fixtures / "tiny", 4, 64)
    original = logits_of(fixtures / "tiny", tokens)
    how = {"scheme": "W4A16@32", "rotations": ["R2", "R4"], "evaluate": False}
    off = {}
    for algorithm in ("rtn", "gptq", "awq"):
        data = {} if algorithm == "rtn" else {"data": list(tokens)}
        octavo.quantize(fixtures / "tiny", tmp_path / algorithm, algorithm=algorithm, **how, **data)
        off[algorithm] = float((logits_of(tmp_path / algorithm, tokens) - original).norm())
    assert max(off, key=off.__getitem__) == "rtn"


def test_scales_are_not_folded_through_a_rotation(fixtures: Path, tmp_path: Path) -> None:
    """Up's rows are no columns of down then; a strength that is given scales whatever has an op to fold into."""
    tokens = held_out_tokens(fixtures / "tiny", 4, 64)
    recipe = Recipe("W8A16@32", "smoothquant", smoothing=0.8, rotations=("R4",))
    octavo.quantize(fixtures / "tiny", tmp_path / "out", recipe=recipe, data=list(tokens), evaluate=False)
    original = logits_of(fixtures / "tiny", tokens)
    assert (logits_of(tmp_path / "out", tokens) - original).norm() < 0.05 * original.norm()


@pytest.mark.parametrize(
    ("group", "reason"),
    [
        (r4(type="random-hadamard"), "type random-hadamard is not supported while serving"),
        (r4(randomize=True), "type hadamard, randomized is not supported"),
        (
            r4(["re:.*q_proj$"]),
            r"q_proj: transform_config \(R4\) rotates its input while serving; octavo does so before",
        ),
        (r4(["Linear"]), r"q_proj: transform_config \(R4\) rotates"),
        (r4(head_dim=64), "96 columns have no Hadamard blocks of 64"),
        (r4(head_dim=None), "96 columns have no Hadamard blocks of 96"),
        (
            TransformScheme(type="hadamard", apply=[TransformArgs(targets=["lm_head"], location="output")]),
            "location output is not supported; input is",
        ),
    ],
)
def test_other_transforms_are_refused_by_name(group: TransformScheme, reason: str, tmp_path: Path) -> None:
    source = save(make_hf(*CASES["llama"]), tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    said = TransformConfig(config_groups={"R4": group}).model_dump(mode="json")
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": unquantized(said)}))
    with pytest.raises((CheckpointError, LoadError), match=reason):
        load_model(EngineConfig(model=str(source), dtype="float32"))


def test_a_rotation_of_queries_and_keys_is_left_out_and_said(tmp_path: Path) -> None:
    model = make_hf(*CASES["llama"])
    source = save(model, tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    ends = [TransformArgs(targets=["re:.*self_attn$"], location=where) for where in ("q_attn", "k_cache")]
    group = TransformScheme(type="hadamard", head_dim=8, apply=ends)
    said = unquantized(TransformConfig(config_groups={"R3": group}).model_dump(mode="json"))
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    loaded = load_model(EngineConfig(model=str(source), dtype="float32"))
    assert any("'R3': rotating queries and keys changes no score" in note for note in loaded.notes)
    tokens = ids(model.config)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(source, tokens), model(tokens).logits, atol=SAME, rtol=SAME)
    said["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    with pytest.raises(CheckpointError, match="with scales of the KV cache behind them is not supported"):
        Checkpoint.open(source)


def test_a_matrix_that_is_none_is_refused(tmp_path: Path) -> None:
    directory = written_by_compressed_tensors(make_hf(*CASES["llama"]), tmp_path / "rotated", R4=r4())
    tensors = load_file(directory / "model.safetensors")
    (name,) = [key for key in tensors if key.endswith("R4_input.weight")]
    tensors[name][3, 4] *= -1
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"R4_input.weight \[32, 32\] is not Sylvester's Hadamard matrix"):
        Checkpoint.open(directory, takes_transforms=True)


def test_what_can_not_go_along_says_so(fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    how = {"scheme": "W8A8", "algorithm": "rtn", "evaluate": False}
    octavo.quantize(fixtures / "tiny", out, rotations=["R4"], **how)
    gpu = Device(torch.device("cpu"), 90, lambda _: replace(REFERENCE, hadamard=None))
    with pytest.raises(LoadError, match=r"transform_config \(R4\): no .* kernel rotates inputs while serving"):
        load_model(EngineConfig(model=str(out)), gpu)
    with pytest.raises(LoadError, match=r"transform_config \(R4\): adapters read inputs"):
        load_model(EngineConfig(model=str(out), lora=LoraOptions(enable_lora=True)))
    assert main(["convert", str(out), str(tmp_path / "converted"), "--format", "gptq"]) == 1
    assert "transform_config: R4 is done while serving" in " ".join(capsys.readouterr().err.split())
    source = save(make_hf(*CASES["qwen3_moe"]), tmp_path / "moe")
    with pytest.raises(QuantizeError, match="R4: qwen3_moe has experts"):
        octavo.quantize(source, tmp_path / "never", rotations=["R4"], **how)
    with pytest.raises(RecipeError, match="format gptq can't say what R4 does"):
        Recipe("W4A16", format="gptq", rotations=("R4",))
