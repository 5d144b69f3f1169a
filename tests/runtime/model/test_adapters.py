"""Adapters in the decoder against PEFT's own forward pass, over each kind of base; and adapters that are refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hf_oracle import CASES, make_hf, save, scattered_logits
from peft_oracle import ATTENTION, EXPERTS, PeftOracle, assert_near, prompts
from safetensors.torch import load_file, save_file
from torch import Tensor
from trimmed import whole

from octavo.kernels.attention.step import StepInputs
from octavo.kernels.lora.rows import sort_by_slot
from octavo.quant.adapter_files import AdapterError, digest_of
from octavo.runtime.config import EngineConfig
from octavo.runtime.lora_config import LoraOptions
from octavo.runtime.model.model import Model
from octavo.runtime.model.weights import load_model
from octavo.runtime.worker import kv_cache

# What of PEFT's config each case has, over the Llama with biases, whose linear layers are all of the usual names.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 3},
    "rank above a vector": {"r": 20},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7},
        "alpha_pattern": {"layers.2.self_attn.o_proj": 3, "down_proj": 40},
    },
    "some layers": {"layers_to_transform": [0, 3], "target_modules": ["v_proj", "down_proj"]},
    "one layer": {"layers_to_transform": 2},
    "regex": {"target_modules": r".*\.[12]\.(self_attn\.[qo]|mlp\.gate)_proj"},
    "all linear": {"target_modules": "all-linear"},
    "all but": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "layers.0.mlp.up_proj"]},
    "biases of adapted": {"bias": "lora_only", "target_modules": ["k_proj", "o_proj"]},
    "all biases": {"bias": "all", "target_modules": ["q_proj", "up_proj"]},
    "dora": {"use_dora": True},
    "dora of some, rslora": {
        "use_dora": True,
        "use_rslora": True,
        "target_modules": ["k_proj", "up_proj", "down_proj"],
    },
    "dora and biases": {"use_dora": True, "bias": "lora_only"},
}

# Other architectures, and which of their modules are adapted.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"use_dora": True},
    "gemma2": {},
    "phi3": {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]},
    "granite": {"target_modules": "all-linear"},
    "mixtral": {"target_modules": list(ATTENTION)},
    "qwen2_moe": {"target_modules": r".*(self_attn\.[qkvo]_proj|shared_expert\.(gate|up|down)_proj)"},
    "deepseek_v2": {"target_modules": ["q_proj", "kv_a_proj_with_mqa", "o_proj"]},
    "deepseek_v3": {"target_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"], "use_dora": True},
    "gpt_oss": {"target_modules": list(ATTENTION)},
    "gemma3n_text": {"target_modules": r".*\.([qkvo]_proj|up_proj|per_layer_projection|linear_(left|right))"},
    "qwen3_next": {"target_modules": ["in_proj_qkvz", "out_proj", "q_proj"]},
    "qwen3_5_text": {"target_modules": ["in_proj_qkv", "in_proj_z", "out_proj", "q_proj", "o_proj"], "use_dora": True},
    "gemma4_text": {"target_modules": r".*\.([qko]|gate|up|down)_proj"},
    "gemma4_text-small": {"target_modules": r".*\.([qkvo]_proj|down_proj|per_layer_input_gate|per_layer_projection)"},
}

# Experts, which transformers keep in one tensor for all: parameters to PEFT, and no linear layers.
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "all experts and attention": ("mixtral", {"target_modules": list(ATTENTION), "target_parameters": EXPERTS}),
    "down alone": ("mixtral", {"target_modules": [], "target_parameters": EXPERTS[1:]}),
    "patterns": (
        "qwen2_moe",
        {
            "target_modules": r".*shared_expert\.(gate|up|down)_proj",
            "target_parameters": EXPERTS,
            "rank_pattern": {"experts.down_proj": 3},
            "alpha_pattern": {r"layers\.0\.mlp\.experts\.gate_up_proj": 5},
            "use_rslora": True,
        },
    ),
}

# The head and the embedding: of a model where they are two, where they are one, and with factors beside them.
ENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "a head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "both": ("llama", {"target_modules": ["lm_head", "embed_tokens"]}),
    "both, tied, scaled": ("gemma2", {"target_modules": ["lm_head", "embed_tokens", "down_proj"], "use_rslora": True}),
    "an embedding with a factor": ("granite", {"target_modules": ["embed_tokens"], "r": 20}),
    "DoRA of a head": ("qwen3", {"target_modules": ["lm_head"], "use_dora": True}),
}


def load(directory: Path, dtype: str = "float32", **options: Any) -> Model:
    lora = LoraOptions(enable_lora=True, **({"max_loras": 3} | options))
    return load_model(EngineConfig(model=str(directory), dtype=dtype, lora=lora))


def put(model: Model, slot: int, directory: Path) -> None:
    assert model.adapters is not None
    model.adapters.put(slot, model.adapters.load(directory, digest_of(directory)))


def check(base: Any, model: Model, tmp_path: Path, config: dict[str, Any]) -> None:
    """In mixed batches: the adapter, no adapter, and another one, each as if it were alone."""
    one, other = (PeftOracle(base, tmp_path / str(seed), seed=seed, **config) for seed in (1, 2))
    put(model, 0, one.directory)
    put(model, 2, other.directory)
    ids = prompts()
    found = scattered_logits(model, ids, slots=[0, -1, 2])
    expected = [
        one.logits(ids[0]),
        base(torch.tensor([ids[1]]), use_cache=False).logits[0].detach(),
        other.logits(ids[2]),
    ]
    for ours, theirs in zip(found, expected, strict=True):
        assert_near(ours, theirs)
    plain = base(torch.tensor([ids[0]]), use_cache=False).logits[0].detach()
    assert float((expected[0] - plain).abs().max()) > 0.01 * float(plain.abs().max())  # it matters


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_peft(name: str, tmp_path: Path) -> None:
    base = make_hf(*CASES["llama"])
    check(base, load(save(base, tmp_path / "base")), tmp_path, VARIANTS[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_families_are_those_of_peft(name: str, tmp_path: Path) -> None:
    base = make_hf(*CASES[name])
    check(base, load(save(base, tmp_path / "base")), tmp_path, FAMILIES[name])


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_those_of_peft(name: str, tmp_path: Path) -> None:
    family, config = MIXTURES[name]
    base = make_hf(*CASES[family])
    check(base, load(save(base, tmp_path / "base")), tmp_path, config | {"lora_dropout": 0.0})


def test_experts_one_by_one_are_the_same(tmp_path: Path) -> None:
    """As transformers 4 had them, by the names of that time."""
    base = make_hf(*CASES["mixtral"])
    oracle = PeftOracle(base, tmp_path / "stacked", target_modules=[], target_parameters=EXPERTS, lora_dropout=0.0)
    model = load(save(base, tmp_path / "base"))
    put(model, 0, one_by_one(oracle.directory, tmp_path / "one by one", base.config.num_local_experts))
    ids = prompts()
    for ours, prompt in zip(scattered_logits(model, ids, slots=[0, 0, 0]), ids, strict=True):
        assert_near(ours, oracle.logits(prompt))


def one_by_one(source: Path, target: Path, experts: int) -> Path:
    """The same adapter, a module for each expert."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(source / "adapter_model.safetensors").items():
        layer, _, rest = name.partition(".mlp.experts.")
        matrix = rest.removeprefix("base_layer.")
        is_down = rest == matrix  # around gate_up_proj, which PEFT has adapted before
        for expert in range(experts):
            owner = f"{layer}.block_sparse_moe.experts.{expert}"
            of_expert = (
                tensor.view(experts, -1, tensor.shape[1])[expert]
                if matrix == "lora_A.weight"
                else tensor.view(len(tensor), -1, experts)[:, :, expert]
            )
            if is_down:
                tensors[f"{owner}.w2.{matrix}"] = of_expert.contiguous()
                continue
            halves = (of_expert,) * 2 if matrix == "lora_A.weight" else of_expert.chunk(2)
            tensors |= {f"{owner}.{w}.{matrix}": half.clone() for w, half in zip(("w1", "w3"), halves, strict=True)}
    target.mkdir()
    save_file(tensors, target / "adapter_model.safetensors")
    config = json.loads((source / "adapter_config.json").read_text())
    config |= {"target_parameters": None, "target_modules": ["w1", "w2", "w3"]}
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("name", ENDS)
def test_heads_and_embeddings_are_those_of_peft(name: str, tmp_path: Path) -> None:
    """Saved with copies of the base's own tables, as PEFT does it where it is not told to leave them out."""
    family, config = ENDS[name]
    base = make_hf(*CASES[family])
    check(base, load(save(base, tmp_path / "base")), tmp_path, config)


def test_tables_beside_an_adapter_must_be_the_model_s_own(tmp_path: Path) -> None:
    base = make_hf(*CASES["llama"])
    model = load(save(base, tmp_path / "base"))
    config = {"target_modules": ["lm_head", "embed_tokens"]}
    directory = PeftOracle(base, tmp_path / "adapter", **config).directory
    for name, own in (("lm_head", base.lm_head), ("model.embed_tokens", base.model.embed_tokens)):
        other = own.weight.detach().clone()
        other[3, 5] += 1
        spoiled = tmp_path / name
        spoil(directory, spoiled, {}, {f"base_model.model.{name}.base_layer.weight": other})
        with pytest.raises(AdapterError, match=r"base_layer\.weight is not the model's own as far"):
            put(model, 0, spoiled)
    bare = PeftOracle(base, tmp_path / "bare", saving={"save_embedding_layers": False}, **config)
    put(model, 1, bare.directory)
    ids = prompts()
    assert_near(scattered_logits(model, ids, slots=[1, -1, -1])[0], bare.logits(ids[0]))


def test_merged_weights_give_the_same(tmp_path: Path) -> None:
    base = make_hf(*CASES["llama"])
    oracle = PeftOracle(base, tmp_path / "adapter", use_dora=True, bias="all")
    model = load(save(base, tmp_path / "base"))
    put(model, 1, oracle.directory)
    merged = load_model(EngineConfig(model=str(save(oracle.merged(), tmp_path / "merged")), dtype="float32"))
    for ours, theirs in zip(
        scattered_logits(model, prompts(), slots=[1, 1, 1]), scattered_logits(merged, prompts()), strict=True
    ):
        assert_near(ours, theirs)


@pytest.mark.parametrize("name", ["tiny--llmc-w4a16-g32", "tiny--llmc-w4a16-asym-g32", "tiny--llmc-mxfp4a16"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_over_a_quantized_base_it_is_peft_over_the_dequantized_one(
    name: str, use_dora: bool, fixtures: Path, tmp_path: Path
) -> None:
    model = load(whole(fixtures / name, tmp_path))
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(fixtures / "tiny", dtype=torch.float32).eval()
    for index, linears in enumerate(model.linears()):  # type: ignore[attr-defined]
        attention, mlp = base.model.layers[index].self_attn, base.model.layers[index].mlp
        of = {
            "qkv": [attention.q_proj, attention.k_proj, attention.v_proj],
            "o": [attention.o_proj],
            "gate_up": [mlp.gate_proj, mlp.up_proj],
            "down": [mlp.down_proj],
        }
        for key, modules in of.items():
            weight = torch.cat([part.weight.unpack() for part in linears[key].parts])
            pieces = weight.split([module.out_features for module in modules])
            for module, piece in zip(modules, pieces, strict=True):
                module.weight.data.copy_(piece)
    oracle = PeftOracle(base, tmp_path / "adapter", use_dora=use_dora)
    put(model, 0, oracle.directory)
    ids = [[token + 3 for token in prompt] for prompt in prompts()]
    for ours, prompt in zip(scattered_logits(model, ids, slots=[0, 0, 0]), ids, strict=True):
        assert_near(ours, oracle.logits(prompt))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_read_what_the_base_rounds_as_it_is(dtype: str, fixtures: Path, tmp_path: Path) -> None:
    """W8A8: the base's product has its input in int8, and the adapter adds to it what it makes of the input itself."""
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(fixtures / "tiny", dtype=torch.float32)
    oracle = PeftOracle(base, tmp_path / "adapter", target_modules=["down_proj"], r=16)
    model = load(whole(fixtures / "tiny--llmc-w8a8", tmp_path), dtype)
    put(model, 0, oracle.directory)
    down = model.linears()[1]["down"]  # type: ignore[attr-defined]
    lora = oracle.model.base_model.model.model.layers[1].mlp.down_proj
    x = torch.randn(5, lora.in_features, generator=torch.Generator().manual_seed(1)).to(model.dtype)
    alone = down.forward(x, None).double()
    found = down.forward(x, with_slots(StepInputs.prefill([5], 16), [0] * 5, 3)).double() - alone
    with torch.inference_mode():
        added = (lora.lora_B["default"](lora.lora_A["default"](x.float())) * lora.scaling["default"]).double()
    eps = torch.finfo(model.dtype).eps  # of A and B and of the sum
    assert float((found - added).abs().max()) <= 3 * eps * float((alone.abs() + added.abs()).max())


def test_only_wanted_rows_of_the_last_layer_are_adapted(tmp_path: Path) -> None:
    base = make_hf(*CASES["qwen2"])
    model = load(save(base, tmp_path / "base"))
    oracle = PeftOracle(base, tmp_path / "adapter")
    put(model, 1, oracle.directory)
    ids = prompts()
    step = StepInputs.prefill([len(one) for one in ids], 16, token_ids=[*chain(*ids)])
    slots = [-1] * len(ids[0]) + [1] * len(ids[1]) + [-1] * len(ids[2])
    adapted = with_slots(step, slots, 3)
    logits = model.forward(adapted, kv_cache.allocate(model, 16, 16, torch.float32))
    assert_near(logits[1], oracle.logits(ids[1])[-1])
    assert_near(logits[2], base(torch.tensor([ids[2]]), use_cache=False).logits[0, -1].detach())


def with_slots(step: StepInputs, slots: list[int], num_slots: int) -> StepInputs:
    return dataclasses.replace(step, adapters=sort_by_slot(np.array(slots), num_slots))


def test_bf16_adapters_are_near_those_of_float32(tmp_path: Path) -> None:
    """bf16 kernels differ from float32's with an adapter about as much as without one."""
    base = make_hf(*CASES["qwen2"])
    directory = save(base, tmp_path / "base")
    oracle = PeftOracle(base, tmp_path / "adapter", r=8)
    narrow, wide = load(directory, "bfloat16"), load(directory)
    errors = []
    for slots in ([-1, -1, -1], [0, 0, 0]):
        found = []
        for model in (narrow, wide):
            put(model, 0, oracle.directory)
            found.append(torch.cat(scattered_logits(model, prompts(), slots=slots)))
        errors.append(float((found[0].float() - found[1]).square().mean().sqrt() / found[1].std()))
    assert errors[1] < 2 * errors[0]


# Adapters that are refused, and what is said: what happens to a good one's config, and to its tensors.
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")
HOSTILE: dict[str, tuple[dict[str, Any], dict[str, Tensor | None], str]] = {
    "r 0": ({"r": 0}, {}, "r is 0; it must be an integer from 1"),
    "huge r": ({"r": 1 << 40}, {}, "r is 1099511627776"),
    "r true": ({"r": True}, {}, "r is True"),
    "r above the most": ({"r": 65}, {}, "--max-lora-rank 65 works"),
    "NaN": ({"lora_alpha": float("nan")}, {}, "lora_alpha is nan"),
    "another kind": ({"peft_type": "LOHA"}, {}, "peft_type is 'LOHA'; LORA is served"),
    "a wrong A": ({}, {A: torch.zeros(4, 63)}, "lora_A is [4, 63]; this model needs [4, 64]"),
    "a wrong B": ({}, {B: torch.zeros(64, 5)}, "lora_B is [64, 5]; this model needs [64, 4]"),
    "no B": ({}, {B: None}, "has lora_A alone"),
    "no module": ({}, {A: None, B: None}, "has nothing of model.layers.0.self_attn.q_proj"),
    "infinite": ({}, {A: torch.full((4, 64), torch.inf)}, "not finite"),
    "integers": ({}, {A: torch.zeros(4, 64, dtype=torch.int32)}, "float32, bfloat16 and float16 are read"),
    "another layer": ({}, {A.replace("layers.0", "layers.9"): torch.zeros(4, 64)}, "no such linear layer"),
    "an image's": ({}, {A.replace("model.layers", "vision_tower.layers"): torch.zeros(4, 64)}, "no such linear layer"),
    "half an embedding": (
        {},
        {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 96)},
        "has lora_embedding_A alone",
    ),
    "half a head": ({}, {"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64)}, "has lora_A alone"),
    "a linear layer's as an embedding's": (
        {},
        {A.replace("lora_A.weight", "lora_embedding_A"): torch.zeros(4, 64)},
        "is a linear layer",
    ),
    "an embedding's as a linear layer's": (
        {},
        {"base_model.model.model.embed_tokens.lora_A.weight": torch.zeros(4, 64)},
        "lora_A of an embedding is not served",
    ),
    "a base's weight": (
        {},
        {A.replace("lora_A.weight", "base_layer.weight"): torch.zeros(64, 64)},
        "base_layer.weight is no tensor of a LoRA adapter",
    ),
    "experts": (
        {},
        {A.replace("self_attn.q_proj", "mlp.experts.1.down_proj"): torch.zeros(4, 64)},
        "no such linear layer",
    ),
    "all experts": (
        {"target_parameters": ["mlp.experts.down_proj"]},
        {A.replace("self_attn.q_proj", "mlp.experts"): torch.zeros(4, 64)},
        "no such linear layer",
    ),
    "parameters as a regex": ({"target_parameters": ".*experts"}, {}, "target_parameters is '.*experts'"),
    "a whole head": ({}, {"base_model.model.lm_head.weight": torch.zeros(96, 64)}, "modules_to_save"),
    "a bias of B": ({"lora_bias": True}, {}, "lora_bias is True, which is not served"),
    "an unknown tensor": ({}, {"x": torch.zeros(1)}, "x is no tensor of a LoRA adapter"),
    "a magnitude": (
        {},
        {A.replace("lora_A.weight", "lora_magnitude_vector"): torch.zeros(64)},
        "stands for DoRA alone",
    ),
    "no magnitude": ({"use_dora": True}, {}, "stands for DoRA alone"),
    "a bias": ({}, {A.replace("lora_A.weight", "bias"): torch.zeros(64)}, "has a bias, and bias is 'none'"),
    "a module that is not named": ({"target_modules": ["k_proj"]}, {}, "is not among target_modules"),
    "no modules": ({"target_modules": []}, {}, "target_modules names nothing"),
    "a regex that hangs": ({"target_modules": r"(a+)+\1"}, {}, "is not a regex that RE2 takes"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save is ['lm_head'], which is not served"),
    "tokens": ({"trainable_token_indices": [1]}, {}, "trainable_token_indices"),
    "aLoRA": ({"alora_invocation_tokens": [1]}, {}, "alora_invocation_tokens"),
    "replication": ({"layer_replication": [[0, 2]]}, {}, "layer_replication"),
    "a key that nobody knows": ({"twist": 2}, {}, "twist is 2, which is not served"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, {}, "change the base's weights too"),
    "another pattern of layers": ({"layers_pattern": "h"}, {}, "layers_pattern is 'h'; 'layers' works"),
    "a layer that is no number": ({"layers_to_transform": ["0"]}, {}, "layers_to_transform"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    """A model, and an adapter that it takes."""
    base = make_hf(*CASES["qwen2"])
    directory = tmp_path_factory.mktemp("good")
    oracle = PeftOracle(base, directory / "adapter")
    return load(save(base, directory / "base")), oracle.directory


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_not_served_is_refused_by_name(name: str, good: tuple[Model, Path], tmp_path: Path) -> None:
    model, adapter = good
    keys, tensors, said = HOSTILE[name]
    spoil(adapter, tmp_path / "adapter", keys, tensors)
    with pytest.raises(AdapterError) as error:
        put(model, 0, tmp_path / "adapter")
    assert said in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def spoil(source: Path, target: Path, keys: dict[str, Any], tensors: dict[str, Tensor | None]) -> None:
    shutil.copytree(source, target)
    config = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(config | keys))
    content = load_file(target / "adapter_model.safetensors") | tensors
    save_file({k: v for k, v in content.items() if v is not None}, target / "adapter_model.safetensors")


def test_experts_that_no_parameter_of_the_config_is_are_refused(tmp_path: Path) -> None:
    base = make_hf(*CASES["mixtral"])
    model = load(save(base, tmp_path / "base"))
    config = {"target_modules": [], "target_parameters": EXPERTS, "lora_dropout": 0.0}
    adapter = PeftOracle(base, tmp_path / "adapter", **config).directory
    for keys, said in (
        ({"target_parameters": EXPERTS[:1]}, "not among target_parameters"),
        ({"target_parameters": [*EXPERTS, "mlp.gate"]}, "has nothing of mlp.gate, which target_parameters select"),
        ({"r": 5}, r"lora_A is .* this model needs"),
        ({"use_dora": True}, "use_dora of a mixture's experts"),
    ):
        shutil.rmtree(tmp_path / "spoiled", ignore_errors=True)
        spoil(adapter, tmp_path / "spoiled", keys, {})
        with pytest.raises(AdapterError, match=said):
            put(model, 0, tmp_path / "spoiled")


def test_pickles_are_never_opened(good: tuple[Model, Path], tmp_path: Path) -> None:
    model, adapter = good
    shutil.copy(adapter / "adapter_config.json", tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(AdapterError, match="a pickle, which can run any code and is never opened"):
        put(model, 0, tmp_path)
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(AdapterError, match=r"no adapter_model\.safetensors"):
        put(model, 0, tmp_path)


def test_files_that_change_are_refused(good: tuple[Model, Path], tmp_path: Path) -> None:
    model, adapter = good
    digest = digest_of(adapter)
    spoil(adapter, tmp_path / "other", {"lora_alpha": 3}, {})
    assert model.adapters is not None
    with pytest.raises(AdapterError, match="has changed since it was loaded"):
        model.adapters.load(tmp_path / "other", digest)


def test_some_modules_may_be_adapted_alone(good: tuple[Model, Path], tmp_path: Path) -> None:
    base = make_hf(*CASES["qwen2"])
    directory = save(base, tmp_path / "base")
    model = load(directory, lora_target_modules=("q_proj", "down_proj"))
    with pytest.raises(AdapterError, match="--lora-target-modules are down_proj, q_proj, and don't have it"):
        put(model, 0, good[1])
    put(model, 0, PeftOracle(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"]).directory)
    with pytest.raises(ValueError, match="--lora-target-modules qkv: the model has no such module; it has down_proj"):
        load(directory, lora_target_modules=("qkv",))
