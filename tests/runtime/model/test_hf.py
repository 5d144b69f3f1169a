"""--model-impl hf: transformers' own code over the paged cache, right or refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_oracle import BLOCK_SIZE, CASES, LONGROPE, NUM_BLOCKS, SIZES, Sequences, randomize, save, scattered_logits
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy_model import make_request, run_to_end

from octavo.quant.checkpoint import CheckpointError
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.hf import attention as hf_attention
from octavo.runtime.model.hf import checks as hf_checks
from octavo.runtime.model.hf import model as hf
from octavo.runtime.model.hf.attention import HFModelError
from octavo.runtime.model.hf.model import HFModel
from octavo.runtime.model.model import Model
from octavo.runtime.model.sources import LoadError
from octavo.runtime.model.spec import UnsupportedModelError
from octavo.runtime.model.weights import load_model
from octavo.runtime.startup import load_engine
from octavo.runtime.worker import kv_cache

MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
HYBRID = {"layer_types": ["conv", "full_attention", "conv", "full_attention"]}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}

# Architectures that the decoder doesn't have, and one or two that it has. Windows are shorter than the sequences.
SERVED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 64, "n_inner": 96}),
    "gpt_neox": ("GPTNeoX", {"rotary_pct": 0.5}),
    "phi": ("Phi", {"partial_rotary_factor": 0.5, "qk_layernorm": True}),
    "olmo": ("Olmo", {"clip_qkv": 1.5}),
    "cohere2": ("Cohere2", {"sliding_window": 6, "logit_scale": 1.0, "head_dim": 16}),
    "starcoder2": ("Starcoder2", {"sliding_window": 7}),
    "mixtral": ("Mixtral", {"sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2Moe", {"num_experts": 4, "shared_expert_intermediate_size": 32, **MOE}),
    "glm": ("Glm", {"head_dim": 24, "attention_bias": True}),
    "llama": CASES["llama"],
    "gemma2": CASES["gemma2"],
    "gemma3_text": CASES["gemma3_text"],
}

# What can't be served: (family, config keys, what the one line says).
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "alibi": ("Bloom", {"n_layer": 2, "n_head": 4}, "BloomForCausalLM doesn't use transformers' AttentionInterface"),
    "alibi too": ("Mpt", {"d_model": 64, "n_layers": 2, "n_heads": 4}, "MptForCausalLM doesn't use transformers'"),
    "own attention": ("StableLm", {}, "StableLmForCausalLM doesn't use transformers' AttentionInterface"),
    "sinks": (
        "GptOss",
        {"head_dim": 16, "num_local_experts": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        "GptOssAttention gives attention 's_aux', which the paged cache doesn't have",
    ),
    "chunks": (
        "Llama4Text",
        {"head_dim": 16, "intermediate_size_mlp": 96, "num_local_experts": 4, "attention_chunk_size": 40},
        "layer 0's mask isn't causal for the token at position 40; --max-model-len 40 can be served",
    ),
    "window in the mask alone": (
        "Phimoe",
        {"num_local_experts": 4, "sliding_window": 40},
        "layer 0's mask isn't causal for the token at position 40; --max-model-len 40 can be served",
    ),
    "own mask": ("Doge", {}, r"DogeForCausalLM fails without its own attention \(AttributeError: 'MaskRule' object"),
    "convolution": ("Lfm2", HYBRID, "Lfm2ForCausalLM: no attention is called in layer 0, 2, so something else mixes"),
    "two attentions": ("DiffLlama", {}, r"layer 0 calls attention twice \(DiffLlamaAttention\)"),
    "MLA": (
        "DeepseekV3",
        {"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, **MLA, **MOE},
        r"DeepseekV3Attention has values of another size .* keys \[1, 4, 16, 24\], values \[1, 4, 16, 16\]",
    ),
    "no keywords": ("Nemotron", {"head_dim": 16}, "NemotronAttention doesn't pass its keyword arguments on"),
    "bidirectional": (
        "Electra",
        {"is_decoder": False},
        "layer 0's mask isn't causal for the token at position 0$",
    ),
}


def make(family: str, overrides: dict[str, Any]) -> Any:
    """A float32 model of an architecture, every parameter random."""
    name = {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config")
    config = getattr(transformers, name)(**{**SIZES, **overrides})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    randomize(model.eval(), seed=0)
    return model


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 96, (length,), generator=generator).tolist() for length in lengths]


@torch.inference_mode()
def hf_logits(model: Any, token_ids: list[list[int]]) -> list[Tensor]:
    return [model(torch.tensor([ids]), use_cache=False).logits[0] for ids in token_ids]


def worst(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def bound(theirs: list[Tensor]) -> float:
    """What float32 rounding can do to a logit; derived in test_decoder.py, whose chain of operators this is too."""
    return 3e-4 * float(torch.cat(theirs).abs().max())


def load(directory: Path, **fields: Any) -> Model:
    return load_model(EngineConfig(**({"model": str(directory), "dtype": "float32", "model_impl": "hf"} | fields)))


Oracle = Callable[[str], tuple[Path, Any]]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, which wait for each other when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """A case's checkpoint and transformers' own model of it, made when first asked for."""
    known: dict[str, tuple[Path, Any]] = {}

    def get(name: str) -> tuple[Path, Any]:
        if name not in known:
            model = make(*SERVED[name])
            known[name] = save(model, tmp_path_factory.mktemp(name)), model
        return known[name]

    return get


@pytest.mark.parametrize("name", SERVED)
def test_logits_in_mixed_batches_equal_transformers_own(name: str, oracle: Oracle) -> None:
    directory, model = oracle(name)
    ids = prompts(37, 21, 30)
    theirs = hf_logits(model, ids)
    assert float(torch.cat(theirs).std()) > 0.3, "trivially small logits prove nothing"
    served = load(directory)
    assert isinstance(served, HFModel)
    assert worst(scattered_logits(served, ids), theirs) < bound(theirs)


@pytest.mark.parametrize("name", ["gpt_neox", "cohere2"])
def test_greedy_text_of_an_engine_equals_transformers_own(name: str, oracle: Oracle) -> None:
    """Chunked prefill in a full batch, a pool that preempts, and a second round that hits the prefix cache."""
    directory, model = oracle(name)
    num_blocks = {"gpt_neox": 14, "cohere2": 44}[name]  # cohere2 has windows: a block is one layer's of four
    limits = {"num_blocks": num_blocks, "block_size": 4, "max_num_batched_tokens": 11, "max_model_len": 48}
    config = EngineConfig(model=str(directory), dtype="float32", num_threads=1, **limits)
    engine, ready = load_engine(config, time.time())
    assert any("runs in transformers' own code" in note for note in ready.report.notes)
    stem, *tails = prompts(18, 9, 5, 2, 7)
    requests = [make_request(str(i), stem + tail, max_tokens=12) for i, tail in enumerate(tails)]
    expected = [greedy(model, request.token_ids, 12) for request in requests]
    for _ in range(2):
        outputs = run_to_end(engine, requests)
        chosen = [[token for output in outputs[r.request_id] for token in output.token_ids] for r in requests]
        assert chosen == expected
    stats = engine.scheduler.stats()
    assert stats.prefix_cache_hits > 0
    assert stats.num_preemptions > 0


def greedy(model: Any, token_ids: list[int], count: int) -> list[int]:
    chosen: list[int] = []
    for _ in range(count):
        chosen.append(int(hf_logits(model, [token_ids + chosen])[0][-1].argmax()))
    return chosen


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_pass_the_checks_too(dtype: str, oracle: Oracle) -> None:
    """Each of 4 layers rounds some 12 times by 2^-9 at most (bfloat16), and a router may take another expert."""
    directory, model = oracle("qwen2_moe")
    served = load(directory, dtype=dtype)
    assert str(served.dtype) == f"torch.{dtype}"
    ids = prompts(37, 21)
    ours, theirs = torch.cat(scattered_logits(served, ids)), torch.cat(hf_logits(model, ids))
    assert float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).median()) < 48 * 2**-9


@pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3"])
def test_a_quantized_cache_is_the_decoders(dtype: str, oracle: Oracle) -> None:
    """Numbers that round the other way differ by float32's rounding only: far less than quantizing itself does."""
    directory, model = oracle("llama")
    ids = prompts(37, 21)
    plain = torch.cat(hf_logits(model, ids))
    ours, decoders = (
        torch.cat(logits_over(load(directory, model_impl=impl), ids, kv_cache.DTYPES[dtype]))
        for impl in ("hf", "octavo")
    )
    assert float((ours - decoders).norm()) < 0.1 * float((decoders - plain).norm())
    assert float((ours - plain).norm()) < 0.5 * float(plain.norm())


def logits_over(model: Model, ids: list[list[int]], dtype: torch.dtype) -> list[Tensor]:
    """Logits of all prompts over a cache of that type with measured scales: chunks, then all the rest one by one."""
    sequences = Sequences(model, ids, seed=0)
    scales = kv_cache.choose_scales(model, dtype, [])
    sequences.caches = kv_cache.allocate(model, NUM_BLOCKS, BLOCK_SIZE, dtype, scales)
    rows: list[list[Tensor]] = [[] for _ in ids]
    counts = {0: 20, 1: 3}
    while counts:
        for s, _, logits in sequences.step(counts):
            rows[s].append(logits)
        counts = {s: 1 for s in range(len(ids)) if sequences.done[s] < len(ids[s])}
    return [torch.stack(row) for row in rows]


@pytest.mark.parametrize("takes_index", [True, False])
def test_logits_are_computed_where_they_are_wanted(takes_index: bool, oracle: Oracle) -> None:
    """A model that doesn't take the index of tokens computes all rows; the answer is the same."""
    directory, model = oracle("gpt_neox")
    served = load(directory)
    assert isinstance(served, HFModel)
    assert served._proven.takes_index
    served._proven = dataclasses.replace(served._proven, takes_index=takes_index)
    computed: list[int] = []
    served._model.get_output_embeddings().register_forward_hook(lambda *call: computed.append(call[2].shape[1]))
    ids = prompts(12, 8)
    step = hf_checks.chunks(ids, [0, 0], [12, 8], torch.device("cpu"))
    theirs = torch.cat(hf_logits(model, ids))
    for index in ([11, 19], [4], []):
        wanted = torch.tensor(index, dtype=torch.int64)
        caches = kv_cache.allocate(served, 2, hf_checks.BLOCK_SIZE, torch.float32)
        logits = served.forward(dataclasses.replace(step, logits_index=wanted), caches)
        assert logits.shape == (len(index), 96)
        torch.testing.assert_close(logits, theirs[wanted], rtol=0, atol=bound([theirs]))
    assert computed == ([2, 1, 0] if takes_index else [20, 20, 20])


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_right_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    family, overrides, message = REFUSED[name]
    save(make(family, overrides), tmp_path)
    with pytest.raises(HFModelError, match=f"^--model-impl hf: {message}") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    transformers.PegasusConfig().save_pretrained(tmp_path)
    with pytest.raises(HFModelError, match="pegasus is an encoder-decoder; only decoders are served"):
        load(tmp_path)


def test_a_window_beyond_the_checks_prompts_is_not_forgotten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save(make("Mistral", {"sliding_window": 40}), tmp_path)
    assert load(tmp_path)._proven.shapes[0].window == 40  # type: ignore[attr-defined]
    lose(monkeypatch, "sliding_window")
    with pytest.raises(
        HFModelError,
        match=r"layer 0's mask isn't causal for the token at position 40; --max-model-len 40 can be served",
    ):
        load(tmp_path)


@pytest.mark.parametrize(("keyword", "overrides"), [("softcap", {"attn_logit_softcapping": 50.0}), ("scaling", {})])
def test_a_formula_that_differs_is_seen(
    keyword: str, overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A cap of 50 over the small scores of a small prompt would pass for none."""
    save(make("Gemma2", SERVED["gemma2"][1] | overrides), tmp_path)
    lose(monkeypatch, keyword)
    with pytest.raises(
        HFModelError, match=r"layer 0's formula of attention \(Gemma2Attention\) isn't that of the paged"
    ):
        load(tmp_path)


def lose(monkeypatch: pytest.MonkeyPatch, keyword: str) -> None:
    """Let octavo overlook a keyword of the attention call."""
    read = hf_attention._shape_of

    def overlook(name: str, query: Tensor, key: Tensor, keywords: dict[str, Any]) -> Any:
        return read(name, query, key, {k: v for k, v in keywords.items() if k != keyword})

    monkeypatch.setattr(hf_attention, "_shape_of", overlook)


ROPES = {
    "longrope": ("Phi3", {"rope_scaling": LONGROPE | {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}}, 16),
    "dynamic": ("Llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16}, 16),
}


@pytest.mark.parametrize("name", ROPES)
def test_a_rope_that_turns_with_the_length_is_served_until_it_does(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    family, overrides, longest = ROPES[name]
    save(model := make(family, {"original_max_position_embeddings": 16, **overrides}), tmp_path)
    served = load(tmp_path)
    assert served.max_position == longest
    assert any(f"rope type {name}: sequences end at {longest} tokens" in note for note in served.notes)
    ids = prompts(longest, 9)
    theirs = hf_logits(model, ids)
    assert worst(scattered_logits(served, ids), theirs) < bound(theirs)
    with pytest.raises(
        HFModelError, match=f"--max-model-len 17: {longest} positions can be served: its rope, of type {name}"
    ):
        load(tmp_path, max_model_len=17)
    monkeypatch.setattr(hf, "choose_max_position", lambda *_: 64)
    with pytest.raises(HFModelError, match=f"{family}ForCausalLM lets tokens meet outside of attention"):
        load(tmp_path)


def test_tokens_that_meet_outside_of_attention_are_seen(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXMLP

    plain = GPTNeoXMLP.forward
    monkeypatch.setattr(GPTNeoXMLP, "forward", lambda self, x: plain(self, x + 0.1 * x.roll(1, dims=1)))
    with pytest.raises(HFModelError, match="GPTNeoXForCausalLM lets tokens meet outside of attention"):
        load(oracle("gpt_neox")[0])


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2"])
def test_positions_that_are_ignored_are_seen(name: str, oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(model: Any, token_ids: Tensor, positions: Tensor, step: Any, **keywords: Any) -> Tensor:
        return hf_attention.call(model, token_ids, torch.arange(len(positions)), step, **keywords)

    monkeypatch.setattr(hf_checks, "call", call)
    with pytest.raises(HFModelError, match="or counts places in the batch instead of positions"):
        load(oracle(name)[0])


def test_a_model_that_asks_for_no_mask_is_refused(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.gpt_neox import modeling_gpt_neox

    monkeypatch.setattr(modeling_gpt_neox, "create_causal_mask", lambda *_, **__: None)
    with pytest.raises(HFModelError, match="GPTNeoXAttention makes its own mask, or none, instead of asking"):
        load(oracle("gpt_neox")[0])


def test_a_scale_that_changes_with_the_batch_is_seen(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    read = hf_attention._shape_of

    def shape_of(name: str, query: Tensor, key: Tensor, keywords: dict[str, Any]) -> Any:
        usual = query.shape[2] == hf_checks.BLOCK_SIZE
        return read(name, query, key, keywords if usual else keywords | {"scaling": 0.1})

    monkeypatch.setattr(hf_attention, "_shape_of", shape_of)
    with pytest.raises(HFModelError, match="gives attention a scale, window or cap that changes with the batch"):
        load(oracle("gpt_neox")[0])


def test_layers_that_share_a_cache_are_seen(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = hf_attention.attend
    monkeypatch.setattr(hf_attention, "attend", lambda *args: attend(*args[:4], 0))
    with pytest.raises(HFModelError, match="over the paged cache doesn't give what it gives by itself"):
        load(oracle("gpt_neox")[0])


def test_auto_takes_an_unknown_architecture_to_transformers_and_says_so(oracle: Oracle) -> None:
    directory, _ = oracle("gpt2")
    served = load(directory, model_impl="auto")
    assert (
        "model_type 'gpt2' has no decoder here: GPT2LMHeadModel runs in transformers' own code, which is slower"
        in (served.notes[-1])
    )
    assert ("attention", "float32", "cpu") in served.report_layers()
    with pytest.raises(UnsupportedModelError, match=r"'gpt2' has no decoder here; .*--model-impl hf serves it through"):
        load(directory, model_impl="octavo")
    assert load(oracle("llama")[0], model_impl="auto").report_layers() != served.report_layers()


def test_auto_refuses_an_unknown_feature_of_a_known_architecture(tmp_path: Path) -> None:
    """It must not move to other code by itself; asked for, transformers serves it."""
    save(model := make("Llama", {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}), tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"llama: partial_rotary_factor = 0.5; --model-impl hf serves it"):
        load(tmp_path, model_impl="auto")
    served, ids = load(tmp_path), prompts(20, 9)
    assert served.notes == [
        "--model-impl hf: LlamaForCausalLM runs in transformers' own code, which is slower than a decoder here"
    ]
    theirs = hf_logits(model, ids)
    assert worst(scattered_logits(served, ids), theirs) < bound(theirs)


def test_auto_tells_both_reasons_of_what_neither_can(tmp_path: Path) -> None:
    save(make("Bloom", {"n_layer": 1, "n_head": 4}), tmp_path)
    with pytest.raises(LoadError, match=r"^model_type 'bloom' has no decoder here; --model-impl hf: BloomForCausalLM"):
        load(tmp_path, model_impl="auto")
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch", "auto_map": {"AutoConfig": "a.B"}}')
    with pytest.raises(
        LoadError, match=r"^model_type 'nonesuch' has no .*its code is in the checkpoint: --trust-remote"
    ):
        load(tmp_path, model_impl="auto")


REMOTE = """
from transformers import PhiConfig, PhiForCausalLM

class OwnConfig(PhiConfig):
    model_type = "own"

class OwnForCausalLM(PhiForCausalLM):
    config_class = OwnConfig
"""


def test_code_in_the_checkpoint_runs_when_it_is_trusted(
    oracle: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path, str(tmp_path / "modules")])
    directory, model = oracle("phi")
    shutil.copytree(directory, tmp_path / "own")
    config = json.loads((directory / "config.json").read_text())
    classes = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": classes}
    (tmp_path / "own/config.json").write_text(json.dumps(config))
    (tmp_path / "own/modeling_own.py").write_text(REMOTE)
    with pytest.raises(LoadError, match="--trust-remote-code runs it"):
        load(tmp_path / "own", model_impl="auto")
    served = load(tmp_path / "own", model_impl="auto", trust_remote_code=True)
    assert served.architecture == "OwnForCausalLM"
    ids = prompts(20, 9)
    theirs = hf_logits(model, ids)
    assert worst(scattered_logits(served, ids), theirs) < bound(theirs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "int8"}, "only dense checkpoints"),
        ({"load_format": "dummy"}, "there is no --load-format dummy"),
        ({"lm_head_dtype": "int8"}, "no --lm-head-dtype"),
        ({"max_model_len": 65}, "--max-model-len 65: 64 positions can be served"),
    ],
)
def test_settings_that_it_does_not_have_are_refused(fields: dict[str, Any], message: str, oracle: Oracle) -> None:
    with pytest.raises(HFModelError, match=f"^--model-impl hf: .*{message}"):
        load(oracle("gpt_neox")[0], **fields)


def test_a_quantized_checkpoint_is_refused(fixtures: Path) -> None:
    with pytest.raises(HFModelError, match="only dense checkpoints"):
        load(fixtures / "tiny--llmc-w8a8")


def test_a_checkpoint_is_complete_or_refused(tmp_path: Path) -> None:
    save(make("GPTNeoX", {"num_hidden_layers": 1}), tmp_path)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors, keys = load_file(file), json.loads(config.read_text())
    name = "gpt_neox.layers.0.mlp.dense_4h_to_h.weight"
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file, {"format": "pt"})
    with pytest.raises(HFModelError, match=f"don't fit together: missing keys {name}"):
        load(tmp_path)
    save_file(tensors | {"extra.weight": torch.zeros(2)}, file, {"format": "pt"})
    with pytest.raises(HFModelError, match=r"don't fit together: unexpected keys extra.weight"):
        load(tmp_path)
    save_file(tensors | {name: torch.zeros(3, 3)}, file, {"format": "pt"})
    with pytest.raises(HFModelError, match=r"transformers can't load the checkpoint"):
        load(tmp_path)
    config.write_text(json.dumps(keys | {"architectures": ["GPTNeoXForQuestionAnswering"]}))
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(HFModelError, match=r"config.json names GPTNeoXForQuestionAnswering, which transformers has no"):
        load(tmp_path)
    file.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        load(tmp_path)
