"""Families by all that octavo does with a checkpoint: served out of the prefix cache, quantized, inspected."""

from __future__ import annotations

import json
import time
from pathlib import Path

import msgspec
import pytest
import torch
import transformers
from calibrated import calibration
from hf_oracle import CASES, READS_MORE, make_config, make_hf, randomize, scattered_logits
from safetensors.torch import load_file, save_file
from toy_model import make_request, run_to_end, tokens_of
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from octavo.calibration.prepare import prepare
from octavo.calibration.quantize_model import quantize_model
from octavo.calibration.recipe import Recipe
from octavo.cli import main
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.linear_attention.states import StateCache
from octavo.quant.checkpoint import Checkpoint
from octavo.quant.qparams import QuantizedWeight
from octavo.quant.scheme import PRESETS
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.config_types import ModelConfigError
from octavo.runtime.model.families.registry import LAYOUTS
from octavo.runtime.model.sources import LoadError
from octavo.runtime.model.spec import DecoderSpec, UnsupportedModelError
from octavo.runtime.model.weights import load_model
from octavo.runtime.startup import load_engine
from octavo.runtime.worker import kv_cache
from octavo.runtime.worker.cache_memory import tensors_of

NAMES = ("olmo3", "glm4_moe", "gpt_oss", "ministral3", "mistral4", "llama4_text", "gemma4_text", "gemma4_text-moe")
NAMES += ("granitemoehybrid", "lfm2", "falcon_h1", "nemotron_h", "mamba2", "kimi_linear")
SERVED = (*NAMES, *READS_MORE)
PROMPTS = [list(range(3, 40)), list(range(40, 49))]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each family as transformers writes it."""
    root = tmp_path_factory.mktemp("families")
    for name in SERVED:
        make_hf(*CASES[name]).save_pretrained(root / name)
    return {name: root / name for name in SERVED}


@pytest.mark.parametrize("name", SERVED)
def test_answers_out_of_the_prefix_cache_are_transformers(name: str, checkpoints: dict[str, Path]) -> None:
    """In chunks of 8 tokens at first; the second time all but the last tokens are found."""
    engine = load_engine(
        EngineConfig(
            model=str(checkpoints[name]),
            dtype="float32",
            num_blocks=100,
            block_size=4,
            max_model_len=64,
            max_num_batched_tokens=8,
        ),
        time.time(),
    )[0]
    prompt = PROMPTS[0]
    reference = make_hf(*CASES[name])
    answer: list[int] = []
    with torch.inference_mode():
        for _ in range(8):
            answer.append(int(reference(torch.tensor([prompt + answer]), use_cache=False).logits[0, -1].argmax()))
    for known in (0, 36):
        before = engine.scheduler.stats().prefix_cache_hits
        outputs = run_to_end(engine, [make_request(f"after{known}", prompt, max_tokens=8)])
        assert tokens_of(outputs[f"after{known}"]) == answer
        assert engine.scheduler.stats().prefix_cache_hits - before == known


@pytest.mark.parametrize(
    ("name", "scheme", "algorithm"),
    [(name, "W4A16@8", "rtn") for name in SERVED]
    + [(name, *recipe) for name in NAMES for recipe in (("W4A16@8", "gptq"), ("W8A16@8", "awq"))],
)
def test_a_quantized_one_computes_with_the_numbers_of_its_files(
    name: str, scheme: str, algorithm: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """As does the plain checkpoint with every weight replaced by what its codes stand for."""
    source = checkpoints[name]
    token_ids = torch.randint(3, 90, (4, 32), generator=torch.Generator().manual_seed(4))
    ready = None if algorithm == "rtn" else calibration(source, token_ids)
    recipe = Recipe(scheme, algorithm=algorithm)
    quantize_model(prepare(source, tmp_path / "quantized", recipe, calibration=ready, layouts=LAYOUTS))
    quantized = Checkpoint.open(tmp_path / "quantized", LAYOUTS)
    original = Checkpoint.open(source, LAYOUTS)
    tensors = {}
    changed = 0
    for tensor in sorted(original.names):
        module, _, kind = tensor.rpartition(".")
        is_linear = kind == "weight" and "weight_scale" in quantized.suffixes(module)
        weight = quantized.linear(module) if is_linear else quantized.tensor(tensor)
        changed += isinstance(weight, QuantizedWeight)
        tensors[tensor] = weight.dequantize() if isinstance(weight, QuantizedWeight) else weight.clone()
    own = ("per_layer_input_gate", "per_layer_projection", "linear_left", "linear_right")
    ends = ("proj.weight", *(f"{name}.weight" for name in own))
    ends += ("_linear.weight", ".w1.weight", ".w2.weight", ".w3.weight")
    kept = ("router", ".b_proj.", ".f_a_proj.", ".f_b_proj.", ".g_a_proj.", ".g_b_proj.")  # a Kimi Linear's gates
    assert changed == sum(
        tensor.endswith(ends) and not any(name in tensor for name in kept) for tensor in original.names
    )
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(tensors, tmp_path / "plain" / "model.safetensors")
    plain, served = (
        torch.cat(scattered_logits(load_model(EngineConfig(model=str(tmp_path / kind), dtype="float32")), PROMPTS))
        for kind in ("plain", "quantized")
    )
    torch.testing.assert_close(served, plain, rtol=0, atol=3e-4 * float(plain.abs().max()))


def test_mxfp4_experts_of_gpt_oss_are_served_as_they_are(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Codes and exponents drawn at random; transformers' own decoder makes the truth of them."""
    config = json.loads((checkpoints["gpt_oss"] / "config.json").read_text())
    tensors = load_file(checkpoints["gpt_oss"] / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    rounded = {}
    reference = make_hf(*CASES["gpt_oss"])
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(120, 125, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
        rounded |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        reference.get_parameter(name).data.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    source = tmp_path / "source"
    source.mkdir()
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    save_file(tensors | rounded, source / "model.safetensors")
    with torch.inference_mode():
        truth = torch.cat([reference(torch.tensor([ids]), use_cache=False).logits[0] for ids in PROMPTS])
    model = load_model(EngineConfig(model=str(source), dtype="float32"))
    assert ("experts.*.gate_up", str(PRESETS["MXFP4A16"])) in [row[:2] for row in model.report_layers()]
    torch.testing.assert_close(torch.cat(scattered_logits(model, PROMPTS)), truth, rtol=0, atol=1e-4)
    quantize_model(prepare(source, tmp_path / "again", Recipe("W8A8"), layouts=LAYOUTS))
    kinds = [row[:2] for row in load_model(EngineConfig(model=str(tmp_path / "again"))).report_layers()]
    assert ("experts.*.gate_up", str(PRESETS["W8A8"])) in kinds


@pytest.mark.parametrize("family", ["Mistral", "Ministral3"])
def test_the_text_part_of_a_mistral_3_is_served(family: str, tmp_path: Path) -> None:
    """Mistral Small 3's and Ministral 3's, without what sees."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Mistral3Config(
        text_config=make_config(family, CASES[family.lower()][1]),
        vision_config=transformers.PixtralVisionConfig(**sizes, image_size=28, patch_size=14),
        tie_word_embeddings=False,
    )
    reference = transformers.Mistral3ForConditionalGeneration(config).float().eval()
    randomize(reference, 0)
    reference.save_pretrained(tmp_path)
    with torch.inference_mode():
        truth = torch.cat([reference(torch.tensor([ids]), use_cache=False).logits[0] for ids in PROMPTS])
    model = load_model(EngineConfig(model=str(tmp_path), dtype="float32"))
    assert "the vision tower is not loaded: text only" in model.notes
    assert any(
        note.startswith("images are not read: the checkpoint has no preprocessor_config") for note in model.notes
    )
    torch.testing.assert_close(torch.cat(scattered_logits(model, PROMPTS)), truth, rtol=0, atol=1e-4)


def test_the_text_part_of_a_llama_4_is_served_and_quantized(tmp_path: Path) -> None:
    """Scout's and Maverick's, without what sees."""
    vision = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"image_size": 28, "patch_size": 14, "vision_output_dim": 32}
    projector = {"projector_input_dim": 32, "projector_output_dim": 32}
    config = transformers.Llama4Config(
        text_config=make_config(*CASES["llama4_text"]),
        vision_config=transformers.Llama4VisionConfig(**vision, **sizes, **projector),
    )
    reference = transformers.Llama4ForConditionalGeneration(config).float().eval()
    randomize(reference, 0)
    reference.save_pretrained(tmp_path / "source")
    with torch.inference_mode():
        text = reference.language_model
        truth = torch.cat([text(torch.tensor([ids]), use_cache=False).logits[0] for ids in PROMPTS])
    recipe = Recipe("W8A16@8")
    quantize_model(prepare(tmp_path / "source", tmp_path / "quantized", recipe, layouts=LAYOUTS))
    model, quantized = (
        load_model(EngineConfig(model=str(tmp_path / x), dtype="float32")) for x in ("source", "quantized")
    )
    torch.testing.assert_close(torch.cat(scattered_logits(model, PROMPTS)), truth, rtol=0, atol=1e-4)
    for served in (model, quantized):
        assert "the vision tower is not loaded: text only" in served.notes
    schemes = {kind: scheme for kind, scheme, _ in quantized.report_layers()}
    for kind in ("qkv", "o", "gate_up", "down", "experts.*.gate_up", "experts.*.down", "shared.gate_up", "shared.down"):
        assert schemes[kind] == str(recipe.default)


def test_a_llama_4_holds_the_windows_of_its_layers(checkpoints: dict[str, Path]) -> None:
    assert load_model(EngineConfig(model=str(checkpoints["llama4_text"]))).kv_windows == [10, 10, None, 10]


def test_the_text_part_of_a_gemma_4_is_served(tmp_path: Path) -> None:
    """Without what sees and hears, and as the Hub's files are: what made keys and values of layers that have another
    one's is still there, and config.json says once what differs in global layers.
    """
    source = tmp_path / "source"
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma4Config(
        text_config=make_config(*CASES["gemma4_text-small"]),
        vision_config=transformers.Gemma4VisionConfig(**sizes, num_key_value_heads=2, head_dim=16),
        audio_config=transformers.Gemma4AudioConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2),
    )
    reference = transformers.Gemma4ForConditionalGeneration(config).float().eval()
    randomize(reference, 0)
    reference.save_pretrained(source)
    written = json.loads((source / "config.json").read_text())
    del written["text_config"]["per_layer_config"]
    written["text_config"] |= {"global_head_dim": 40, "num_global_key_value_heads": None}
    (source / "config.json").write_text(json.dumps(written))
    stored = load_file(source / "model.safetensors")
    tensors = {name: x.clamp(-1e3, 1e3) for name, x in stored.items()}  # sounds' have infinite limits until trained
    layers = "model.language_model.layers."
    left = {f"{layers}{i}.self_attn.{kind}_proj.weight": torch.ones(8, 64) for i in (3, 4, 5) for kind in "kv"}
    left |= {f"{layers}{i}.self_attn.k_norm.weight": torch.ones(8) for i in (3, 4, 5)}
    save_file(tensors | left, source / "model.safetensors")
    with torch.inference_mode():
        truth = torch.cat([reference(torch.tensor([ids]), use_cache=False).logits[0] for ids in PROMPTS])
    model = load_model(EngineConfig(model=str(source), dtype="float32"))
    assert {
        "keys and values of layers that read another layer's are not loaded",
        "the vision and audio towers are not loaded: text only",
    } <= set(model.notes)
    torch.testing.assert_close(torch.cat(scattered_logits(model, PROMPTS)), truth, rtol=0, atol=1e-4)
    quantize_model(prepare(source, tmp_path / "quantized", Recipe("W8A16@8"), layouts=LAYOUTS))
    load_model(EngineConfig(model=str(tmp_path / "quantized"), dtype="float32"))


def test_the_text_part_of_a_gemma_3n_is_served(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """By the names of the Hub's files, without what sees and hears."""
    written = json.loads((checkpoints["gemma3n_text"] / "config.json").read_text())
    stored = load_file(checkpoints["gemma3n_text"] / "model.safetensors")
    tensors = {name.replace("model.", "model.language_model.", 1): x for name, x in stored.items()}
    tensors |= {"model.audio_tower.a.weight": torch.ones(1), "model.embed_vision.b.weight": torch.ones(1)}
    config = {"model_type": "gemma3n", "architectures": ["Gemma3nForConditionalGeneration"], "text_config": written}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    model, whole = (
        load_model(EngineConfig(model=str(path), dtype="float32")) for path in (tmp_path, checkpoints["gemma3n_text"])
    )
    assert "the vision and audio towers are not loaded: text only" in model.notes
    ours, theirs = (torch.cat(scattered_logits(each, PROMPTS)) for each in (model, whole))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_layers_that_read_the_cache_of_others_take_none_of_its_memory(
    checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Layers 0 and 2 have 2 heads of 24 numbers, layer 1 has 2 of 40, keys and values; 3 to 5 read these."""
    source = str(checkpoints["gemma4_text-small"])
    assert main(["inspect", source, "--json"]) == 0
    per_token = 2 * 2 * (24 + 40 + 24)
    assert json.loads(capsys.readouterr().out)["to_serve"]["kv_bytes_per_1k_tokens"]["bfloat16"] == 2000 * per_token
    engine = load_engine(
        EngineConfig(model=source, dtype="float32", kv_cache_dtype="int8", num_blocks=10, block_size=4), time.time()
    )[0]
    assert sum(each.nbytes for each in tensors_of(engine.worker.caches)) == 10 * 4 * per_token


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("gemma4_text", "int8"), ("gemma4_text-small", "fp8_e4m3"), ("gemma4_text-small", "int8_per_token_head")],
)
def test_a_cache_of_8_bits_costs_layers_of_several_kinds_little(
    name: str, dtype: str, checkpoints: dict[str, Path]
) -> None:
    """Measured scales for each cache, or rows with their own. KL is second order in the logits' error: the bound is ten
    times what was seen to be lost here.
    """
    config = EngineConfig(model=str(checkpoints[name]), dtype="float32", num_blocks=100, block_size=4)
    step = StepInputs.prefill([37], 4, token_ids=PROMPTS[0], logits_index=range(37))
    logits = []
    for kind in ("auto", dtype):
        model = load_model(config)
        caches, _ = kv_cache.create(model, msgspec.structs.replace(config, kv_cache_dtype=kind), [])
        logits.append(model.forward(step, caches))
    p, q = (each.double().log_softmax(-1) for each in logits)
    assert 0 < float((p.exp() * (p - q)).sum(-1).mean()) < 2e-2


@pytest.mark.parametrize("name", READS_MORE)
def test_calibration_block_by_block_is_refused_where_blocks_read_more(name: str, checkpoints: dict[str, Path]) -> None:
    with pytest.raises(LoadError, match=r"has layers that read the cache of others.*--algorithm rtn"):
        calibration(checkpoints[name], torch.zeros(1, 8, dtype=torch.int64))


def test_layers_of_a_nemotron_are_read_off_its_pattern(checkpoints: dict[str, Path]) -> None:
    config = json.loads((checkpoints["nemotron_h"] / "config.json").read_text())
    kinds = config.pop("layers_block_type")
    by_kinds = DecoderSpec.from_hf(config | {"layers_block_type": kinds})
    assert DecoderSpec.from_hf(config | {"hybrid_override_pattern": "M-*ME", "num_hidden_layers": 5}) == by_kinds
    with pytest.raises(UnsupportedModelError, match="hybrid_override_pattern has 'X'"):
        DecoderSpec.from_hf(config | {"hybrid_override_pattern": "M-X"})
    with pytest.raises(ModelConfigError, match="num_hidden_layers 4, and 5 kinds"):
        DecoderSpec.from_hf(config | {"hybrid_override_pattern": "M-*ME", "num_hidden_layers": 4})
    with pytest.raises(UnsupportedModelError, match="moe_latent_size 16"):
        DecoderSpec.from_hf(config | {"layers_block_type": kinds, "moe_latent_size": 16})


def test_a_mamba_has_states_and_no_cache_of_keys(checkpoints: dict[str, Path]) -> None:
    """Blocks name prefixes alone, and one sequence may be as long as the model says."""
    settings = {"model": str(checkpoints["mamba2"]), "dtype": "float32"}
    engine = load_engine(EngineConfig(**settings), time.time())[0]
    assert all(isinstance(cache, StateCache) for cache in engine.worker.caches)
    limits = engine.scheduler.config
    assert limits.num_blocks * limits.block_size >= limits.max_model_len == 64
    with pytest.raises(ValueError, match="--kv-cache-dtype int8: all layers of mamba2 have states"):
        load_engine(EngineConfig(**settings, kv_cache_dtype="int8"), time.time())


GPU_LACKS = {
    "gpt_oss": "attention with sinks",
    "llama4_text": "attention in chunks",
    "gemma3n_text": "attention with normed values",
    "gemma4_text": "attention with normed values",
}


@pytest.mark.parametrize("name", GPU_LACKS)
def test_a_gpu_refuses_attention_by_name(
    name: str, checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(checkpoints[name]), "--device", "cuda:9.0", "--json"]) == 0
    assert f"{name} has {GPU_LACKS[name]}, which no kernel of" in capsys.readouterr().out


def test_a_layer_for_further_tokens_is_left_with_a_word(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """GLM's files have it behind the others, as one layer more."""
    config = json.loads((checkpoints["glm4_moe"] / "config.json").read_text())
    tensors = load_file(checkpoints["glm4_moe"] / "model.safetensors")
    further = {name.replace("layers.3.", "layers.4."): x.clone() for name, x in tensors.items() if "layers.3." in name}
    further["model.layers.4.eh_proj.weight"] = torch.zeros(64, 128)
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    save_file(tensors | further, source / "model.safetensors")
    quantize_model(prepare(source, tmp_path / "quantized", Recipe("W4A16@8"), layouts=LAYOUTS))
    for directory in (source, tmp_path / "quantized"):
        notes = load_model(EngineConfig(model=str(directory), dtype="float32")).notes
        assert "model.layers.4 is not loaded: it says further tokens, and no drafter is made of it here" in notes


@pytest.mark.parametrize("name", SERVED)
def test_inspect_knows_every_layer(name: str, checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(checkpoints[name]), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["layers"]
    tensors = load_file(checkpoints[name] / "model.safetensors")
    assert sum(row["parameters"] for row in rows) == sum(tensor.numel() for tensor in tensors.values())
