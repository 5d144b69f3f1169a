"""Attention over latents beyond what every architecture's tests say: its cache, native FP8, quantizing, refusals."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import calibration
from hf_oracle import CASES, make_hf, save, scattered_logits
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy_model import make_request, run_to_end, tokens_of

from octavo.calibration.prepare import prepare
from octavo.calibration.quantize_model import quantize_model
from octavo.calibration.recipe import Recipe, RecipeError
from octavo.cli import main
from octavo.kernels.attention.step import StepInputs
from octavo.quant.checkpoint import Checkpoint
from octavo.quant.formats.fp8 import Fp8Format, write_fp8_config
from octavo.quant.qparams import quantize_weight
from octavo.quant.scheme import PRESETS
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.config_types import ModelConfigError
from octavo.runtime.model.device import Device
from octavo.runtime.model.families.registry import LAYOUTS
from octavo.runtime.model.model import Model
from octavo.runtime.model.operators import REFERENCE
from octavo.runtime.model.sources import CheckpointSource, LoadError
from octavo.runtime.model.spec import DecoderSpec, UnsupportedModelError
from octavo.runtime.model.weights import load_model
from octavo.runtime.startup import load_engine
from octavo.runtime.worker import kv_cache
from octavo.runtime.worker.kv_layout import one_group

PROMPTS = [list(range(3, 40)), list(range(40, 49)), list(range(20, 71))]
V3 = "deepseek_v3"


def load(directory: Path, **changes: Any) -> Model:
    return load_model(EngineConfig(model=str(directory), **({"dtype": "float32"} | changes)))


def logits(model: Model) -> Tensor:
    return torch.cat(scattered_logits(model, PROMPTS))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_hf(*CASES[V3]), tmp_path_factory.mktemp(V3))


def test_kimi_k2_is_deepseek_v3_by_another_name(saved: Path, tmp_path: Path) -> None:
    """As its config.json has it, in transformers 4's keys, and with a layer for further tokens, which is left."""
    config = json.loads((saved / "config.json").read_text())
    rope = config.pop("rope_parameters")
    kimi = config | {"model_type": "kimi_k2", "num_nextn_predict_layers": 1, "topk_method": "noaux_tc"}
    kimi |= {"scoring_func": "sigmoid", "moe_layer_freq": 1, "ep_size": 1, "seq_aux": True, "aux_loss_alpha": 0.001}
    kimi |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope | {"type": rope["rope_type"]}}
    del kimi["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(kimi))
    further = {"model.layers.4.eh_proj.weight": torch.ones(64, 128), "model.layers.4.enorm.weight": torch.ones(64)}
    save_file(load_file(saved / "model.safetensors") | further, tmp_path / "model.safetensors")
    model = load(tmp_path)
    assert torch.equal(logits(model), logits(load(saved)))
    assert any(note.startswith("model.layers.4 is not loaded") for note in model.notes)
    assert not any("doesn't know" in note for note in model.notes)


def test_answers_are_those_of_transformers_with_shared_prefixes(saved: Path) -> None:
    """In chunks, among others, with prefixes found in the cache, and with fewer blocks than all need at once."""
    reference = make_hf(*CASES[V3])
    rng = random.Random(0)
    stem = [rng.randrange(3, 96) for _ in range(40)]
    prompts = [[*stem[: 10 * i], rng.randrange(3, 96)] for i in range(5)]
    limits = {"num_blocks": 24, "block_size": 4, "max_num_batched_tokens": 16}
    engine, _ = load_engine(EngineConfig(model=str(saved), dtype="float32", **limits), time.time())
    for turn in range(2):
        requests = [make_request(f"{turn} {i}", prompt, max_tokens=10) for i, prompt in enumerate(prompts)]
        outputs = run_to_end(engine, requests)
        for i, prompt in enumerate(prompts):
            answer = tokens_of(outputs[f"{turn} {i}"])
            with torch.no_grad():
                said = reference(torch.tensor([prompt + answer]), use_cache=False).logits[0].argmax(-1).tolist()
            assert answer == said[len(prompt) - 1 : -1]
            assert len(answer) == 10
    assert engine.scheduler.stats().prefix_cache_hits > 0


def test_the_cache_has_one_latent_and_one_key_a_token(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """32 + 16 numbers in each of 4 layers, where keys and values of 4 heads would be 4 * (40 + 24)."""
    model = load(saved)
    layout = one_group(model.num_layers)
    assert kv_cache.bytes_per_block(model, 16, torch.bfloat16, layout) == 16 * 4 * 48 * 2
    caches = kv_cache.allocate(model, 3, 16, torch.bfloat16)
    assert sum(cache.key.nbytes for cache in caches) == 3 * 16 * 4 * 48 * 2
    assert all(cache.value is cache.key for cache in caches)
    assert main(["inspect", str(saved), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["to_serve"]["kv_bytes_per_1k_tokens"]["bfloat16"] == 1000 * 4 * 48 * 2


@pytest.mark.parametrize("dtype", ["fp8_e4m3", "int8"])
def test_a_cache_of_8_bits(dtype: str, saved: Path) -> None:
    """As the operators' reference has it, with one scale for keys and values."""
    engine, ready = load_engine(
        EngineConfig(model=str(saved), dtype="float32", num_blocks=64, block_size=4, kv_cache_dtype=dtype), time.time()
    )
    caches = engine.worker.caches
    assert all(cache.key.itemsize == 1 and torch.equal(cache.key_scale, cache.value_scale) for cache in caches)
    assert ready.report.kv_cache_bytes == 64 * 4 * 4 * 48
    step = StepInputs.prefill([37], 4, token_ids=PROMPTS[0], logits_index=range(37))
    reference = load_model(
        EngineConfig(model=str(saved), dtype="float32"), Device(torch.device("cpu"), 0, lambda _: REFERENCE)
    )
    scales = [(cache.key_scale, cache.value_scale) for cache in caches]
    theirs = kv_cache.allocate(reference, 64, 4, caches[0].key.dtype, scales)
    expected = reference.forward(step, theirs)
    difference = (engine.worker.model.forward(step, caches) - expected).abs()
    # A number between two codes may become another one: the median shows none of them.
    assert float(difference.median()) < 3e-4 * float(expected.abs().max())


def test_scales_of_a_cache_are_not_calibrated(saved: Path, tmp_path: Path) -> None:
    recipe = Recipe("W8A8", kv_cache="fp8")
    with pytest.raises(RecipeError, match="the cache of this model holds latents"):
        prepare(saved, tmp_path / "out", recipe, layouts=LAYOUTS)


@pytest.mark.parametrize(("scheme", "dtype"), [("W8A8", "int8"), ("FP8_DYNAMIC", "fp8")])
def test_quantized_at_load_is_quantized_and_loaded(scheme: str, dtype: str, saved: Path, tmp_path: Path) -> None:
    """All but kv_b_proj, the routers and the head."""
    quantize_model(prepare(saved, tmp_path / "out", Recipe(scheme, search="absmax"), layouts=LAYOUTS))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    whole = {name for name, tensor in load_file(saved / "model.safetensors").items() if tensor.ndim == 2}
    kept = {name for name in whole if f"{name}_scale" not in tensors}
    assert {name.partition("layers.")[2][2:] or name for name in kept} == {
        *("model.embed_tokens.weight", "lm_head.weight", "mlp.gate.weight", "self_attn.kv_b_proj.weight")
    }
    written = logits(load(tmp_path / "out", dtype="auto"))
    assert torch.equal(written, logits(load(saved, dtype=dtype)))
    assert not torch.equal(written, logits(load(saved)))


@pytest.mark.parametrize("algorithm", ["gptq", "awq", "smoothquant"])
def test_calibrated_weights_are_served(algorithm: str, saved: Path, tmp_path: Path) -> None:
    """As transformers computes with what they stand for; and scales that were folded leave what is computed alone."""
    scheme = "W8A8" if algorithm == "smoothquant" else "W8A16@-1"
    token_ids = torch.randint(3, 90, (4, 32), generator=torch.Generator().manual_seed(4))
    ready = calibration(saved, token_ids)
    recipe = Recipe(scheme, algorithm=algorithm)
    quantize_model(prepare(saved, tmp_path / "out", recipe, calibration=ready, layouts=LAYOUTS))
    decoded = Checkpoint.open(tmp_path / "out", LAYOUTS)
    hf = make_hf(*CASES[V3])
    theirs = hf_logits(hf)
    hf.load_state_dict(fused(dense_tensors(decoded)), strict=True)
    ours = hf_logits(hf)
    assert 0 < float((ours - theirs).abs().mean()) < 0.1 * float(theirs.std()), "8 bits, of experts that may change"
    if algorithm != "smoothquant":  # whose inputs are rounded, too
        served = logits(load(tmp_path / "out"))
        torch.testing.assert_close(served, ours, rtol=0, atol=3e-4 * float(ours.abs().max()))


def dense_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All of a checkpoint's tensors, with what quantized weights stand for."""
    modules = {name.rpartition(".")[0] for name in checkpoint.names}
    coded = {module for module in modules if any(s.startswith("weight_") for s in checkpoint.suffixes(module))}
    plain = {name: checkpoint.tensor(name) for name in checkpoint.names if name.rpartition(".")[0] not in coded}
    decoded = {f"{module}.weight": checkpoint.linear(module).dequantize() for module in coded}  # type: ignore[union-attr]
    biases = {
        f"{module}.bias": checkpoint.tensor(f"{module}.bias") for module in coded if checkpoint.has(f"{module}.bias")
    }
    return plain | decoded | biases


def fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts as transformers 5 holds them in memory: one tensor for all, gate and up side by side."""
    out = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in {name.partition("experts.")[0] for name in tensors if ".experts." in name}:
        of = {
            part: [tensors[f"{layer}experts.{i}.{part}_proj.weight"] for i in range(8)]
            for part in ("gate", "up", "down")
        }
        gate_up = [torch.cat(pair) for pair in zip(of["gate"], of["up"], strict=True)]
        out |= {
            f"{layer}experts.gate_up_proj": torch.stack(gate_up),
            f"{layer}experts.down_proj": torch.stack(of["down"]),
        }
    return out


@torch.inference_mode()
def hf_logits(model: Any) -> Tensor:
    return torch.cat([model(torch.tensor([ids]), use_cache=False).logits[0] for ids in PROMPTS])


def rounded(module: torch.nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:  # noqa: ARG001
    """A linear layer's input, as e4m3 with a scale for each token and group of 128 columns."""
    groups = given[0].split(128, dim=-1)
    scales = [group.abs().amax(-1, keepdim=True) / 448 for group in groups]
    codes = [(group / scale).to(torch.float8_e4m3fn) for group, scale in zip(groups, scales, strict=True)]
    return (torch.cat([code.float() * scale for code, scale in zip(codes, scales, strict=True)], dim=-1),)


def test_native_fp8_blocks_against_transformers(tmp_path: Path) -> None:
    """All linear layers in blocks, as DeepSeek has them, kv_b_proj among them, whose input alone isn't rounded."""
    sizes = {"hidden_size": 192, "q_lora_rank": 160, "kv_lora_rank": 144, "first_k_dense_replace": 4}
    hf = make_hf("DeepseekV3", CASES[V3][1] | sizes)
    scheme = PRESETS["FP8_BLOCK"]
    coded = {name: tensor.clone() for name, tensor in hf.state_dict().items()}
    for name, layer in hf.model.layers.named_modules():
        if not isinstance(layer, torch.nn.Linear):
            continue
        weight = quantize_weight(layer.weight.data, scheme, "absmax")
        del coded[f"model.layers.{name}.weight"]
        coded |= {f"model.layers.{name}.{key}": value for key, value in Fp8Format(scheme).write(weight).items()}
        layer.weight.data.copy_(weight.dequantize())
        if not name.endswith("kv_b_proj"):
            layer.register_forward_pre_hook(rounded)
    save_file(coded, tmp_path / "model.safetensors")
    config = hf.config.to_dict() | {"quantization_config": write_fp8_config(scheme, ["lm_head"])}
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    model = load(tmp_path)
    expected = hf_logits(hf)
    difference = (logits(model) - expected).abs()
    # Codes of inputs that lie between two may differ, and then a token's logits do: the median shows none of them.
    assert float(difference.median()) < 3e-4 * float(expected.abs().max())
    assert any(note.startswith("kv_b_proj (") and "dequantized" in note for note in model.notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 2}, "num_key_value_heads 2: latents make keys and values of all 4 heads"),
        ({"topk_method": "greedy"}, "topk_method 'greedy' is not known of such a model; 'noaux_tc' is"),
        ({"scoring_func": "softmax"}, "scoring_func 'softmax' is not known of such a model; 'sigmoid' is"),
        ({"q_lora_rank": None}, "attention_bias without q_lora_rank"),
        ({"model_type": "deepseek_v2", "norm_topk_prob": True}, "norm_topk_prob True is not known of such a model"),
        (
            {"model_type": "deepseek_v2", "topk_method": "best", "norm_topk_prob": False},
            "topk_method 'best' is not known of such a model",
        ),
    ],
)
def test_what_is_not_known_is_refused_by_name(changes: dict[str, Any], message: str, saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    with pytest.raises(UnsupportedModelError, match=message):
        DecoderSpec.from_hf(config | changes)


def test_groups_that_are_scored_by_two_experts_have_two(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    with pytest.raises(ModelConfigError, match="n_group 8 groups of 8 experts have one each, and are scored by two"):
        DecoderSpec.from_hf(config | {"n_group": 8, "topk_group": 4})


def test_layers_behind_the_last_are_counted_by_what_there_is(saved: Path) -> None:
    source = CheckpointSource(Checkpoint.open(saved, LAYOUTS))
    assert source.leave_layers(2, 1 << 31) == ["model.layers.2", "model.layers.3"]
    assert source.leave_layers(3, 0) == []


def test_a_gpu_and_a_deterministic_engine_are_refused_by_name(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", str(saved), "--json", "--device", "cuda:9.0"])
    assert "deepseek_v3 has attention over latents, which no kernel of" in capsys.readouterr().out
    with pytest.raises(LoadError, match="--deterministic: "):
        load(saved, deterministic=True)
