"""Reading a config.json: the same spec from transformers 4's and 5's spelling, and a refusal by name of all else."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import transformers
from hf_oracle import CASES, SIZES, make_config

from octavo.runtime.model.config_types import ModelConfigError
from octavo.runtime.model.families.keys import NEUTRAL
from octavo.runtime.model.families.registry import ARCHITECTURES, FAMILIES
from octavo.runtime.model.spec import DecoderSpec, UnsupportedModelError

LLAMA = SIZES | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "factor": 4.0}
PHI3 = {"model_type": "phi3", "architectures": None}
MIXTRAL = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 8}


@pytest.mark.parametrize("name", CASES)
def test_both_spellings_make_the_same_spec(name: str) -> None:
    """The cases are written as transformers 4 writes a config; transformers 5 saves rope_parameters and layer_types."""
    family, overrides = CASES[name]
    saved = make_config(family, overrides).to_dict()
    written = SIZES | overrides | {"model_type": saved["model_type"], "dtype": saved["dtype"]}
    specs = [DecoderSpec.from_hf(config) for config in (written, saved)]
    assert specs[0] == dataclasses.replace(specs[1], unknown_keys=specs[0].unknown_keys)
    assert specs[0].unknown_keys == ()


@pytest.mark.parametrize(("model_type", "num_layers"), [("gemma4_text", 12), ("gemma3n_text", 20)])
def test_what_a_config_leaves_out_is_what_transformers_makes_of_it(model_type: str, num_layers: int) -> None:
    """Heads of global layers, windows, ropes, shared caches, sparse activations."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    sizes = {name: SIZES[name] for name in names} | {"num_hidden_layers": num_layers}
    kinds = {"gemma4_text": transformers.Gemma4TextConfig, "gemma3n_text": transformers.Gemma3nTextConfig}
    written = DecoderSpec.from_hf(sizes | {"model_type": model_type})
    saved = DecoderSpec.from_hf(kinds[model_type](**sizes).to_dict())
    assert dataclasses.replace(saved, dtype=written.dtype) == written


def test_a_family_is_found_by_its_file_and_claims_what_no_other_does() -> None:
    """Every case of the decoder's comparison with transformers belongs to one."""
    model_types = [model_type for family in FAMILIES for model_type in family.architectures]
    assert len(set(model_types)) == len(model_types)
    of_itself = {"mimo", "kimi_k2"}  # their code lies in their checkpoints: test_heads.py, test_latent.py
    of_itself |= {
        "qwen2_vl_text",
        "qwen2_5_vl_text",
        "qwen3_vl_text",
        "qwen3_vl_moe_text",
    }  # halves: vision/test_towers.py
    assert {make_config(*CASES[name]).model_type for name in CASES} == set(model_types) - of_itself


@pytest.mark.parametrize("key", NEUTRAL)
def test_a_key_that_changes_the_computation_and_is_not_read_is_refused(key: str) -> None:
    """With a value that such a key has somewhere: by each architecture that doesn't read it."""
    lists = {"layer_types": ["sliding_attention"] * 4, "no_rope_layers": [1, 0, 1, 0], "mlp_only_layers": [1]}
    lists["activation_sparsity_pattern"] = [0.5] * 4
    flag = key == "norm_topk_prob" or any(value is False for value in NEUTRAL[key])
    words = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "per_layer_config": {"1": {"head_dim": 8}}}
    value = (lists | words).get(key, True if flag else 3)
    for name, row in ARCHITECTURES.items():
        if key not in row.reads:
            # what attention over latents has, and fewer layers than Gemma 3n has that read others' caches
            sizes = SIZES | {"num_key_value_heads": SIZES["num_attention_heads"], "num_kv_shared_layers": 0}
            sizes |= {"num_heads": 2, "n_groups": 2}  # which make the channels of Mamba 2
            DecoderSpec.from_hf(sizes | {"model_type": name, key: None})
            with pytest.raises(UnsupportedModelError, match=f"{name}: {key} = .*--model-impl hf"):
                DecoderSpec.from_hf(sizes | {"model_type": name, key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' has no decoder here; known are .*gemma2, .*llama, mistral"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "is not a decoder with a language-model head"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is unknown; known are silu"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 isn't a multiple of num_key_value_heads 3"),
        (
            {"rope_scaling": {"type": "spiral", "factor": 2.0}},
            "rope type 'spiral' is unknown; known are default, linear",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 1.0}},
            "'linear' has no parameter 'beta_fast'",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope type 'linear' needs the parameter 'factor'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "rope_parameters per kind of layer"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "short_factor has 1 entries; rotary_dim 16 needs half as many",
        ),
        ({"model_type": "qwen2", "layer_types": ["full_attention"] * 3}, "layer_types has 3 entries for 4 layers"),
        ({"model_type": "qwen2", "layer_types": ["chunked"] * 4}, "layer type 'chunked' is unknown"),
        (
            {"model_type": "qwen2", "layer_types": ["sliding_attention"] * 4},
            "use_sliding_window or sliding_window is off",
        ),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers has 1 entries for 4 layers"),
        ({"model_type": "gemma2", "sliding_window": None}, "layers have a sliding window, but sliding_window is None"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.2}, "3 rotating elements can't be paired"),
        ({"head_dim": 7, "rope_scaling": YARN}, "7 rotating elements can't be paired"),
        ({"model_type": "gemma4_text", "pad_token_id": -1}, "pad_token_id -1 is no token"),
        ({"model_type": "gemma4_text", "pad_token_id": "0"}, "pad_token_id '0' is no token"),
    ],
)
def test_what_is_not_known_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    config = {**LLAMA, **changes}
    if "model_type" in changes:
        config["architectures"] = None
    with pytest.raises(UnsupportedModelError, match=message):
        DecoderSpec.from_hf(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "config.json has no hidden_size, which llama needs"),
        ({"hidden_size": "64"}, "Expected `int | null`, got `str` - at `hidden_size`"),
        ({"hidden_size": True}, "got `bool` - at `hidden_size`"),
        ({"num_attention_heads": 0}, "Expected `int` >= 1 - at `num_attention_heads`"),
        ({"num_hidden_layers": 10**30}, "Expected `int` <= 10000 - at `num_hidden_layers`"),
        ({"rms_norm_eps": math.nan}, "Expected `float` > 0.0 - at `rms_norm_eps`"),
        ({"rope_theta": math.inf}, "at `rope_theta`"),
        ({"ssm_multipliers": [1.0, math.nan]}, "at `ssm_multipliers[1]`"),
        ({"mlp_multipliers": [math.inf]}, "at `mlp_multipliers[0]`"),
        ({"tie_word_embeddings": "yes"}, "Expected `bool | null`, got `str` - at `tie_word_embeddings`"),
        ({"rope_scaling": ["linear"]}, "Expected `object | null`, got `array` - at `rope_scaling`"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "got `str` - at `rope_scaling.factor`"),
        ({"hidden_act": ["silu"]}, "got `array` - at `hidden_act`"),
        ({"layer_types": "full_attention"}, "got `str` - at `layer_types`"),
        ({"mlp_only_layers": [-1]}, "Expected `int` >= 0 - at `mlp_only_layers[0]`"),
        ({"decoder_sparse_step": 0}, "Expected `int` >= 1 - at `decoder_sparse_step`"),
        (MIXTRAL | {"num_experts_per_tok": 9}, "num_experts_per_tok 9 isn't 1 to 8, the number of experts"),
        (MIXTRAL | {"num_experts_per_tok": 0}, "num_experts_per_tok 0 isn't 1 to 8, the number of experts"),
        (MIXTRAL | {"num_local_experts": 10**9}, "layers of 1000000000 experts are more than 100000 experts in all"),
        (PHI3 | {"partial_rotary_factor": 1e15}, "rotates 16000000000000000 of the head's 16 elements"),
        (PHI3 | {"partial_rotary_factor": 0.01}, "rotates 0 of the head's 16 elements"),
        ({"head_dim": 1 << 31}, "head_dim 2147483648 is more than any model's; at most 65536"),
        ({"rope_theta": 1e-300}, "rope_theta 1e-300 and factor 1.0 rotates by up to inf radians a position"),
        ({"rope_scaling": YARN, "rope_theta": 1.0}, "yarn: rope_theta 1.0 must be above 1"),
        ({"rope_scaling": YARN, "rope_theta": 0.5}, "yarn: rope_theta 0.5 must be above 1"),
        ({"rope_scaling": YARN | {"beta_fast": 5e-324}}, "yarn: beta_fast 5e-324 is not from 1e-6 to 1e6"),
        ({"rope_scaling": YARN | {"beta_slow": 1e15}}, "yarn: beta_slow 1000000000000000.0 is not from 1e-6 to 1e6"),
        (
            {"rope_scaling": LONGROPE | {"original_max_position_embeddings": 1}},
            "longrope: original_max_position_embeddings 1 gives no attention factor",
        ),
        (
            {"rope_scaling": LONGROPE | {"long_factor": [1.0] * 7 + [1e-300]}},
            "rope type 'longrope' with rope_theta 10000.0 and factor 4.0 rotates by up to inf radians",
        ),
        (MIXTRAL | {"num_experts": 4}, "num_experts = 4 and num_local_experts = 8 can't both be"),
    ],
)
def test_values_that_can_not_be_are_refused_by_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelConfigError) as error:
        DecoderSpec.from_hf({**LLAMA, **changes})
    assert message in str(error.value)


def test_keys_that_nobody_knows_are_told() -> None:
    assert DecoderSpec.from_hf({**LLAMA, "mystery": 1, "use_cache": True}).unknown_keys == ("mystery",)


def test_a_vision_checkpoints_text_half_is_read() -> None:
    text = {**SIZES, "model_type": "gemma3_text", "head_dim": 24, "sliding_window": 6}
    whole = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    assert DecoderSpec.from_hf(whole) == dataclasses.replace(DecoderSpec.from_hf(text), text_only=True)


def test_the_longest_sequence_is_what_the_rope_is_meant_for() -> None:
    """dynamic ends where its scaling would begin; yarn and linear stretch, Gemma 3's own number counts that already."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    for rope, longest in (
        ({"rope_type": "dynamic", "factor": 2.0}, 64),
        ({"rope_type": "linear", "factor": 2.0}, 128),
        (yarn, 128),
        (yarn | {"original_max_position_embeddings": 8}, 64),
    ):
        assert DecoderSpec.from_hf({**LLAMA, "rope_scaling": rope}).max_position == longest
    gemma = {**SIZES, "model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    assert DecoderSpec.from_hf(gemma).max_position == 64
