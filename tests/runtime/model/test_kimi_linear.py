"""Kimi Linear beyond what every architecture's tests say: published configs and names, quantizing, values to refuse."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from calibrated import calibration
from hf_oracle import CASES, make_hf, save, scattered_logits
from safetensors.torch import load_file, save_file
from torch import Tensor

from octavo.calibration.layers import select_linears
from octavo.calibration.prepare import prepare
from octavo.calibration.quantize_model import quantize_model
from octavo.calibration.recipe import Recipe
from octavo.cli import main
from octavo.quant.checkpoint import Checkpoint
from octavo.quant.dequantized import open_dequantized
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.config_types import ModelConfigError
from octavo.runtime.model.families.registry import LAYOUTS
from octavo.runtime.model.mixers import LatentSpec
from octavo.runtime.model.spec import DecoderSpec, UnsupportedModelError
from octavo.runtime.model.weights import load_model

PROMPTS = [list(range(3, 40)), list(range(40, 49)), list(range(20, 71))]
ATTENDS = [4, 8, 12, 16, 20, 24, 27]  # counted from 1
LINEAR = {"head_dim": 128, "num_heads": 32, "short_conv_kernel_size": 4, "full_attn_layers": ATTENDS}
LINEAR |= {"kda_layers": [number for number in range(1, 28) if number not in ATTENDS]}
PUBLISHED: dict[str, Any] = {
    "model_type": "kimi_linear",
    "architectures": ["KimiLinearForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_kimi.KimiLinearForCausalLM"},
    "vocab_size": 163840,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 27,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 72,
    "hidden_act": "silu",
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "mla_use_nope": True,
    "linear_attn_config": LINEAR,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 1024,
    "moe_layer_freq": 1,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_shared_experts": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "use_grouped_topk": True,
    "routed_scaling_factor": 2.446,
    "num_nextn_predict_layers": 0,
    "model_max_length": 1048576,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
"""As the keys are that Kimi-Linear-48B-A3B's config.json has."""


def test_a_published_config_is_read_as_transformers_reads_it() -> None:
    spec = DecoderSpec.from_hf(PUBLISHED)
    given = {key: value for key, value in PUBLISHED.items() if key != "rope_scaling"}  # of which it would warn
    saved = DecoderSpec.from_hf(transformers.KimiLinearConfig(**given).to_dict())
    assert dataclasses.replace(saved, unknown_keys=()) == spec  # of which it says none
    assert [number for number, layer in enumerate(spec.layers, 1) if isinstance(layer.mixer, LatentSpec)] == ATTENDS
    assert [layer.sparse for layer in spec.layers] == [False] + [True] * 26
    assert spec.max_position == 1 << 20


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As transformers writes it."""
    return save(make_hf(*CASES["kimi_linear"]), tmp_path_factory.mktemp("kimi"))


def logits(directory: Path) -> Tensor:
    model = load_model(EngineConfig(model=str(directory), dtype="float32"))
    assert not any("doesn't know" in note for note in model.notes)
    return torch.cat(scattered_logits(model, PROMPTS))


@torch.inference_mode()
def hf_logits(model: Any) -> Tensor:
    return torch.cat([model(torch.tensor([ids]), use_cache=False).logits[0] for ids in PROMPTS])


def test_published_names_are_read_as_transformers_own(source: Path, tmp_path: Path) -> None:
    """A published dense MLP is no part of a mixture by its name, and layers are counted from 1."""
    config = json.loads((source / "config.json").read_text())
    linear = {"head_dim": config.pop("linear_head_dim"), "num_heads": config.pop("linear_num_heads")}
    linear |= {"short_conv_kernel_size": config.pop("linear_conv_kernel_dim")}
    linear |= {"full_attn_layers": [2], "kda_layers": [1, 3, 4]}
    for key in ("layer_types", "mlp_layer_types"):
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config | {"linear_attn_config": linear}))
    tensors = load_file(source / "model.safetensors")
    dense = "model.layers.0.block_sparse_moe."
    renamed = {name.replace(dense, "model.layers.0.mlp."): tensor for name, tensor in tensors.items()}
    assert len(renamed.keys() - tensors.keys()) == 3
    save_file(renamed, tmp_path / "model.safetensors")
    assert torch.equal(logits(tmp_path), logits(source))


def test_transformers_computes_the_same_with_the_numbers_of_its_files(source: Path, tmp_path: Path) -> None:
    """What AWQ folds into norms is taken out of the gates behind them, too, or decays would be other ones."""
    ready = calibration(source, torch.randint(3, 90, (4, 32), generator=torch.Generator().manual_seed(4)))
    recipe = Recipe("W8A16@8", algorithm="awq")
    quantize_model(prepare(source, tmp_path / "out", recipe, calibration=ready, layouts=LAYOUTS))
    stands_for = open_dequantized(tmp_path / "out", LAYOUTS)
    tensors = {name: stands_for.tensor(name).clone() for name in stands_for.names}
    save(make_hf(*CASES["kimi_linear"]), tmp_path / "plain")
    save_file(tensors, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    plain, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs = hf_logits(plain.eval())
    torch.testing.assert_close(logits(tmp_path / "out"), theirs, rtol=0, atol=3e-4 * float(theirs.abs().max()))
    original = hf_logits(make_hf(*CASES["kimi_linear"]))
    assert 0 < float((theirs - original).abs().mean()) < 0.1 * float(original.std())


def test_gates_and_what_expands_latents_stay_as_they_are(source: Path) -> None:
    linears = select_linears(Checkpoint.open(source, LAYOUTS), []).linears
    in_attention = {name.partition("self_attn.")[2] for name in linears if "self_attn" in name}
    assert in_attention == {"q_proj", "k_proj", "v_proj", "o_proj", "kv_a_proj_with_mqa"}


def test_inspect_counts_states_and_latents(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(source), "--json"]) == 0
    needs = json.loads(capsys.readouterr().out)["to_serve"]
    assert needs["state_bytes_per_sequence"] == 3 * 4 * (2 * 3 * 96 + 6 * 16 * 16)
    assert needs["kv_bytes_per_1k_tokens"]["bfloat16"] == 1000 * (32 + 16) * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mla_use_nope": False}, "mla_use_nope False is not known of such a model; True is"),
        ({"moe_router_activation_func": "softmax"}, "moe_router_activation_func 'softmax' is not known"),
        ({"topk_method": "greedy"}, "topk_method 'greedy' is not known"),
        ({"num_expert_group": 4, "topk_group": 2, "use_grouped_topk": False}, "use_grouped_topk false with 4 groups"),
        ({"moe_layer_freq": 2}, "kimi_linear: moe_layer_freq = 2 changes the computation"),
        ({"hidden_act": "situ"}, "hidden_act 'situ' is unknown"),
        ({"mla_use_output_gate": True}, "kimi_linear: mla_use_output_gate = True changes the computation"),
        ({"routed_expert_hidden_size": 3584}, "kimi_linear: routed_expert_hidden_size = 3584 changes the computation"),
        ({"attn_res_block_size": 12}, "kimi_linear: attn_res_block_size = 12 changes the computation"),
        ({"layer_types": ["sliding_attention"] * 27}, "layer_types"),
        ({"attention_bias": True}, "attention_bias without q_lora_rank"),
        ({"num_key_value_heads": 8}, "num_key_value_heads 8: latents make keys and values of all 32 heads"),
    ],
)
def test_what_is_not_known_of_it_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    """Kimi K3's text half goes by this model type, and is another one."""
    with pytest.raises(UnsupportedModelError) as error:
        DecoderSpec.from_hf(PUBLISHED | changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_full_rank_gate": True}, "unknown field `use_full_rank_gate` - at `linear_attn_config`"),
        ({"gate_lower_bound": -5.0}, "unknown field `gate_lower_bound` - at `linear_attn_config`"),
        ({"num_heads": "32"}, "got `str` - at `linear_attn_config.num_heads`"),
        ({"head_dim": math.nan}, "at `linear_attn_config.head_dim`"),
        ({"head_dim": 0}, "Expected `int` >= 1 - at `linear_attn_config.head_dim`"),
        ({"full_attn_layers": 4}, "got `int` - at `linear_attn_config.full_attn_layers`"),
        ({"full_attn_layers": [0]}, "Expected `int` >= 1 - at `linear_attn_config.full_attn_layers[0]`"),
        ({"full_attn_layers": [*ATTENDS, 28]}, "don't name each of 27 layers once"),
        ({"full_attn_layers": [1, *ATTENDS]}, "don't name each of 27 layers once"),
        ({"full_attn_layers": None}, "don't name each of 27 layers once"),
        ({"kda_layers": None}, "don't name each of 27 layers once"),
    ],
)
def test_a_dictionary_that_can_not_be_is_refused_by_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelConfigError) as error:
        DecoderSpec.from_hf(PUBLISHED | {"linear_attn_config": LINEAR | changes})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linear_attn_config": [1]}, "got `array` - at `linear_attn_config`"),
        ({"num_experts_per_tok": 4}, "num_experts_per_tok = 4 and num_experts_per_token = 8 can't both be"),
        ({"n_group": 2}, "n_group = 2 and num_expert_group = 1 can't both be"),
        ({"num_experts_per_token": 257}, "num_experts_per_tok 257 isn't 1 to 256"),
        ({"num_hidden_layers": 26}, "don't name each of 26 layers once"),
    ],
)
def test_values_that_can_not_be_are_refused_by_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelConfigError) as error:
        DecoderSpec.from_hf(PUBLISHED | changes)
    assert message in str(error.value)
