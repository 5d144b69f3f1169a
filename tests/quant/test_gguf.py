"""GGUF files: numbers are the gguf package's, logits transformers', and what isn't known is refused by name."""

from __future__ import annotations

import json
import random
import shutil
import struct
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from gguf_oracle import logits_of_numbers, write_gguf
from hf_oracle import make_hf
from safetensors.torch import save_file
from served import logits_of

from octavo.calibration.recipe import parse_scheme
from octavo.cli import main
from octavo.demo_models import DEMO_MODELS, _download, _join_pieces
from octavo.quant.checkpoint import Checkpoint
from octavo.quant.dequantized import open_dequantized
from octavo.quant.gguf.blocks import BLOCK_TYPES
from octavo.quant.gguf.file import GGUFFile
from octavo.quant.gguf.header import read_header
from octavo.quant.gguf.tokenizer import SPACE, end_tokens, tokenizer_of
from octavo.quant.hub import model_name, resolve_model
from octavo.quant.model_files import CheckpointError
from octavo.quant.qparams import QuantizedWeight, quantize_weight
from octavo.text.tokenizer import Tokenizer

Q = "model.layers.0.self_attn.q_proj"
TEXTS = (
    "Hello world! It's 12345 o'clock.\n\n  def f(x):\n\treturn x",
    "  ünïcödé 你好",
    "<|im_start|>user\nhi<|im_end|>",
)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directories of GGUF files are made in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_blocks_stand_for_the_numbers_that_the_gguf_package_says(name: str) -> None:
    """Of random bytes: every pattern of bits in every place, infinite scales among them."""
    block, kind = BLOCK_TYPES[name], Kind[name]
    assert (block.columns, block.nbytes) == gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (300, block.nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        theirs = gguf.quants.dequantize(raw, kind)
    ours = block.decode(torch.from_numpy(raw).clone()).numpy()
    assert np.array_equal(ours.reshape(theirs.shape), theirs, equal_nan=True)


def random_model(directory: Path, kind: str) -> Path:
    """A model of another architecture, with norms that matter."""
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 32}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64, "num_hidden_layers": 6}
    if kind.startswith("gemma"):
        sizes |= {"sliding_window": 8, "query_pre_attn_scalar": 32}
    config = {
        "qwen3": transformers.Qwen3Config,
        "gemma2": transformers.Gemma2Config,
        "gemma3": transformers.Gemma3TextConfig,
    }[kind](**sizes)
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.add_(torch.randn(parameter.shape) * 0.2)
    model.bfloat16().save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("name", "arch", "kind"),
    [
        ("tiny", "llama", Kind.Q8_0),
        ("tiny", "llama", Kind.Q4_0),
        ("tiny-qwen2", "qwen2", Kind.Q5_1),
        ("qwen3", "qwen3", Kind.Q5_0),
        ("gemma2", "gemma2", Kind.Q4_1),
        ("gemma3", "gemma3", Kind.F16),
    ],
)
def test_logits_are_transformers_of_the_very_numbers(
    fixtures: Path, tmp_path: Path, name: str, arch: str, kind: Kind
) -> None:
    """Rows of llama's q and k, and Gemma's norms, are as the original has them; integers are served as integers."""
    source = fixtures / name if (fixtures / name).is_dir() else random_model(tmp_path / "source", name)
    file = tmp_path / f"{name}.gguf"
    meaning = write_gguf(source, file, arch, kind)
    directory = resolve_model(str(file))
    assert resolve_model(str(file)) == directory
    assert model_name(str(file)) == name
    checkpoint = Checkpoint.open(directory)
    for tensor, expected in meaning.items():
        module = tensor.removesuffix(".weight")
        found = (
            checkpoint.linear(module)
            if tensor.endswith(("_proj.weight", "lm_head.weight"))
            else checkpoint.tensor(tensor)
        )
        numbers = found.dequantize() if isinstance(found, QuantizedWeight) else found.float()
        assert torch.equal(numbers, expected), tensor
    assert isinstance(checkpoint.linear(Q), QuantizedWeight) == (kind != Kind.F16)
    ids = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = logits_of_numbers(source, meaning, tmp_path / "plain", ids)
    torch.testing.assert_close(logits_of(directory, ids), expected, rtol=0, atol=1e-4)


TURNS = [1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
COUNTS = {"expert_count": 4, "expert_used_count": 2}
FAMILIES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llama3": (
        "Llama",
        "llama",
        {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 8192, "rope_theta": 5e5}},
        {"rope.freq_base": 5e5, "factors": {"rope_freqs.weight": [1.0, 1.0, 1.0, 1.0, 1.2386, 8.0, 8.0, 8.0]}},
    ),
    "mixtral": (
        "Mixtral",
        "llama",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
        COUNTS,
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        "qwen2moe",
        MOE | {"shared_expert_intermediate_size": 64, "norm_topk_prob": False},
        COUNTS | {"expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 64},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        "qwen3moe",
        MOE | {"norm_topk_prob": True, "head_dim": 32},
        COUNTS | {"expert_feed_forward_length": 32},
    ),
    "olmoe": ("Olmoe", "olmoe", {"num_experts": 4, "num_experts_per_tok": 2}, COUNTS),
    "olmo2": ("Olmo2", "olmo2", {}, {}),
    "granite": (
        "Granite",
        "granite",
        {"embedding_multiplier": 12.0, "logits_scaling": 0.25, "residual_multiplier": 0.25}
        | {"attention_multiplier": 0.5},
        {"embedding_scale": 12.0, "logit_scale": 0.25, "residual_scale": 0.25, "attention.scale": 0.5},
    ),
    "smollm3": ("SmolLM3", "smollm3", {"rope_theta": 2e6}, {"rope.freq_base": 2e6}),
    "phi3": (
        "Phi3",
        "phi3",
        {"original_max_position_embeddings": 16, "sliding_window": 9}
        | {
            "rope_parameters": {"rope_type": "longrope", "short_factor": TURNS, "long_factor": TURNS[::-1]}
            | {"rope_theta": 1e4, "original_max_position_embeddings": 16, "attention_factor": 1.25}
        },
        {"rope.scaling.original_context_length": 16, "rope.scaling.attn_factor": 1.25, "attention.sliding_window": 9}
        | {"factors": {"rope_factors_short.weight": TURNS, "rope_factors_long.weight": TURNS[::-1]}},
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_further_architectures_give_transformers_logits(tmp_path: Path, name: str) -> None:
    """Experts, fused layers, multipliers, and rotations that a tensor scales."""
    family, arch, overrides, keys = FAMILIES[name]
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 96}
    source = tmp_path / "source"
    make_hf(family, sizes | overrides).bfloat16().save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    if (config.get("rope_parameters") or {}).get("rope_type") == "llama3":
        keys = keys | {"factors": {"rope_freqs.weight": llama3_factors(config)}}
    changes = {key if key == "factors" else f"{arch}.{key}": value for key, value in keys.items()}
    meaning = write_gguf(source, tmp_path / "x.gguf", arch, Kind.Q8_0, **changes)
    directory = resolve_model(str(tmp_path / "x.gguf"))
    ids = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = logits_of_numbers(source, meaning, tmp_path / "plain", ids)
    torch.testing.assert_close(logits_of(directory, ids), expected, rtol=0, atol=1e-4)
    read = json.loads((directory / "config.json").read_text())
    assert read["model_type"] == config["model_type"]
    if name == "llama3":
        assert read["rope_parameters"] == config["rope_parameters"]


def llama3_factors(config: dict[str, Any]) -> list[float]:
    """What divides each pair's frequency, by transformers' own rule for Llama 3."""
    scaled = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"]
    given = transformers.LlamaConfig(**config)
    dim = given.hidden_size // given.num_attention_heads
    plain = given.rope_parameters["rope_theta"] ** -(torch.arange(0, dim, 2).float() / dim)
    return (plain / scaled(given, torch.device("cpu"))[0]).tolist()


def test_factors_that_are_no_llama_3_s_are_longrope_s(fixtures: Path, tmp_path: Path) -> None:
    config = json.loads((fixtures / "tiny" / "config.json").read_text())
    pairs = (config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]) // 2
    factors = [1.0 + i / 4 for i in range(pairs)]
    write_gguf(fixtures / "tiny", tmp_path / "t.gguf", "llama", Kind.Q8_0, factors={"rope_freqs.weight": factors})
    rope = json.loads((resolve_model(str(tmp_path / "t.gguf")) / "config.json").read_text())["rope_parameters"]
    assert (rope["rope_type"], rope["short_factor"], rope["long_factor"]) == ("longrope", factors, factors)
    assert rope["attention_factor"] == 1.0
    for wrong, message in (
        ([1.0], f"has 1 factors for the {pairs} pairs"),
        ([-1.0] * pairs, "no finite number above 0"),
    ):
        write_gguf(fixtures / "tiny", tmp_path / "w.gguf", "llama", Kind.Q8_0, factors={"rope_freqs.weight": wrong})
        with pytest.raises(CheckpointError, match=message):
            resolve_model(str(tmp_path / "w.gguf"))


def test_a_tied_head_is_served_in_the_embedding_s_blocks(tmp_path: Path) -> None:
    """The rows that are looked up and the head's are the same numbers, and the head's stay integers."""
    source = tmp_path / "source"
    make_hf("Llama", {"tie_word_embeddings": True}).bfloat16().save_pretrained(source)
    write_gguf(source, tmp_path / "t.gguf", "llama", Kind.Q8_0, embedding=Kind.Q8_0)
    directory = resolve_model(str(tmp_path / "t.gguf"))
    assert json.loads((directory / "config.json").read_text())["tie_word_embeddings"]
    head = Checkpoint.open(directory).linear("lm_head")
    assert isinstance(head, QuantizedWeight)
    assert torch.equal(head.dequantize(), Checkpoint.open(directory).tensor("model.embed_tokens.weight"))
    assert logits_of(directory, torch.tensor([[3, 5, 8]])).isfinite().all()


def test_tokenizer_and_chat_template_come_out_of_the_file(fixtures: Path, tmp_path: Path) -> None:
    write_gguf(fixtures / "tiny", tmp_path / "tiny.gguf", "llama", Kind.Q8_0)
    directory = resolve_model(str(tmp_path / "tiny.gguf"))
    ours, theirs = Tokenizer.open(directory), Tokenizer.open(fixtures / "tiny")
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
    assert ours.special_ids == theirs.special_ids
    assert ours.config["chat_template"] == "{{ messages[0].content }}"
    assert ours.special_tokens["eos_token"] == "<|im_end|>"
    assert json.loads((directory / "generation_config.json").read_text()) == {
        "eos_token_id": [2, 0],  # <|endoftext|> ends an answer, too
        "bos_token_id": 1,
    }


def joined_by_score(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's BPE as it is defined: the two neighbors whose joint piece has the highest score, the first of
    equal ones, become one, until no two can.
    """
    pieces = list(text)
    while True:
        pairs = [(-scores[a + b], i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in scores]
        if not pairs:
            return pieces
        _, at = min(pairs)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


@pytest.mark.parametrize("prefixed", [False, True])
def test_sentencepiece_joins_by_scores(prefixed: bool) -> None:
    rng = random.Random(0)
    pieces = dict.fromkeys("abcd" + SPACE)
    while len(pieces) < 60:
        pieces[rng.choice(list(pieces)) + rng.choice(list(pieces))] = None
    ranked = [piece for piece in pieces if len(piece) > 1] + [piece for piece in pieces if len(piece) == 1]
    scores = {piece: -float(i) for i, piece in enumerate(ranked)}
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*special, *ranked, "\n\n"],
        "tokenizer.ggml.scores": [0.0] * len(special) + list(scores.values()) + [-1000.0],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(ranked), 4],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.add_space_prefix": prefixed,
    }
    state, config = tokenizer_of(metadata)
    assert (config["add_bos_token"], config["bos_token"]) == (True, "<s>")
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(state)
    for _ in range(200):
        text = "".join(rng.choices("abcd ", k=rng.randint(1, 30))).strip() or "a"
        whole = (SPACE if prefixed else "") + text.replace(" ", SPACE)
        assert backend.encode(text, add_special_tokens=False).tokens == joined_by_score(whole, scores)
        assert backend.decode(backend.encode(text).ids) == text
    assert backend.encode("é", add_special_tokens=False).tokens[-2:] == ["<0xC3>", "<0xA9>"]
    assert "\n\n" in backend.encode("a\n\nb", add_special_tokens=False).tokens


def test_commands_take_the_file(fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """inspect, quantize and convert: the second takes the numbers for the original, the third keeps the integers."""
    file = tmp_path / "tiny.gguf"
    write_gguf(fixtures / "tiny", file, "llama", Kind.Q8_0)
    assert main(["inspect", str(file), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["architecture"], shown["format"]) == ("LlamaForCausalLM", "gguf")
    assert main(["convert", str(file), str(tmp_path / "ct"), "--format", "compressed-tensors"]) == 0
    original, converted = Checkpoint.open(resolve_model(str(file))), Checkpoint.open(tmp_path / "ct")
    before, after = original.linear(Q), converted.linear(Q)
    assert isinstance(before, QuantizedWeight)
    assert isinstance(after, QuantizedWeight)
    assert torch.equal(before.dequantize(), after.dequantize())
    out = tmp_path / "w4"
    options = ["--scheme", "W4A16", "--group-size", "32", "--algorithm", "rtn", "--no-eval"]
    assert main(["quantize", str(file), "-o", str(out), *options]) == 0
    written = Checkpoint.open(out)
    assert written.tensor("model.norm.weight").dtype == torch.bfloat16
    error = (written.linear(Q).dequantize() - before.dequantize()).norm() / before.dequantize().norm()  # type: ignore[union-attr]
    assert 0.05 < float(error) < 0.12
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= {p.name for p in out.iterdir()}
    assert not (out / "model.gguf").exists()
    assert json.loads((out / "quantization_report.json").read_text())["base_model"] is None
    assert str(tmp_path) not in (out / "README.md").read_text()


def test_numbers_of_16_bits_are_not_rounded_to_bf16(fixtures: Path, tmp_path: Path) -> None:
    """What is quantized is what the file says, in its own type."""
    file = tmp_path / "tiny.gguf"
    weight = write_gguf(fixtures / "tiny", file, "llama", Kind.F16)[f"{Q}.weight"]
    assert json.loads((resolve_model(str(file)) / "config.json").read_text())["dtype"] == "float16"
    out = tmp_path / "w8"
    assert main(["quantize", str(file), "-o", str(out), "--scheme", "W8A16", "--group-size", "32", "--no-eval"]) == 0
    expected = quantize_weight(weight.half(), parse_scheme("W8A16@32"), "absmax")
    found = Checkpoint.open(out).linear(Q)
    assert isinstance(found, QuantizedWeight)
    assert torch.equal(found.dequantize(), expected.dequantize())


def test_norms_are_rounded_once_1_is_taken_off(tmp_path: Path) -> None:
    """Gemma's, which a quantizer takes in bf16: as 1 + w they would lose most of w."""
    meaning = write_gguf(random_model(tmp_path / "source", "gemma2"), tmp_path / "x.gguf", "gemma2", Kind.Q4_1)
    source = open_dequantized(resolve_model(str(tmp_path / "x.gguf")))
    norms = [name for name in source.names if name.endswith("norm.weight")]
    assert norms
    for name in norms:
        assert torch.equal(source.tensor(name), (meaning[name] + 1 - 1).bfloat16()), name


def test_a_directory_of_two_models_is_refused(fixtures: Path, tmp_path: Path) -> None:
    shutil.copytree(fixtures / "tiny", tmp_path / "both")
    write_gguf(fixtures / "tiny", tmp_path / "both" / "model.gguf", "llama", Kind.Q8_0)
    with pytest.raises(CheckpointError, match=r"model\.gguf and .*model\.safetensors: two models; name .*model\.gguf"):
        Checkpoint.open(tmp_path / "both")
    assert Checkpoint.open(resolve_model(str(tmp_path / "both" / "model.gguf"))).names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "mamba"}, "GGUF architecture 'mamba' is not read; llama, .*qwen2"),
        ({"llama.expert_count": 8}, "llama.expert_used_count is None; a number"),
        ({"llama.attention.causal": True}, "llama.attention.causal, which is not known here"),
        ({"llama.rope.dimension_count": 16}, "llama.rope.dimension_count is 16, and heads have 32"),
        ({"llama.rope.scaling.type": "longrope"}, "no tensor rope_factors_long.weight, which longrope needs"),
        ({"llama.rope.scaling.type": "dynamic"}, "rope.scaling.type is 'dynamic'; none, linear, yarn and longrope are"),
        ({"llama.attention.head_count_kv": [2, 1]}, r"head_count_kv is \[2, 1\]; a number, the same for all"),
        ({"split.count": 3}, "it is part 1 of 3, and tiny-00002-of-00003.gguf is not beside it"),
        ({"split.count": 3, "split.no": 3}, "split.no is 3 and split.count 3"),
        ({"tokenizer.ggml.pre": "bloom"}, "tokenizer.ggml.pre is 'bloom'; gpt-2, olmo, smollm, .*tekken are read"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model is 'bert'; gpt2 and llama are read"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type is not one number for each token"),
        ({"tokenizer.ggml.token_type": 1}, "token_type is not one number for each token"),
        ({"tokenizer.ggml.pre": ["gpt-2"]}, r"tokenizer.ggml.pre is \['gpt-2'\]; a string is needed"),
        ({"tokenizer.ggml.model": 3}, "tokenizer.ggml.model is 3; a string is needed"),
        ({"tokenizer.ggml.merges": 5}, "tokenizer.ggml.merges is 5; an array of strings is needed"),
        ({"tokenizer.ggml.tokens": [1, 2]}, r"tokenizer.ggml.tokens is \[1, 2\]; an array of strings is needed"),
        ({"tokenizer.ggml.eot_token_id": 10**9}, "eot_token_id is 1000000000, and there are"),
        ({"tokenizer.ggml.add_bos_token": "no"}, "add_bos_token is 'no'; true or false is needed"),
        ({"tokenizer.chat_template": 1}, "tokenizer.chat_template is 1; a string is needed"),
        ({"llama.rope.freq_base": [1.0]}, r"llama.rope.freq_base is \[1.0\]; a finite number above 0 is needed"),
        ({"llama.rope.freq_base": "much"}, "llama.rope.freq_base is 'much'; a finite number above 0"),
        ({"llama.attention.layer_norm_rms_epsilon": "1e-5"}, "rms_epsilon is '1e-5'; a finite number above 0"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "rms_epsilon is nan; a finite number above 0"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "rms_epsilon is None; a finite number above 0"),
        ({"llama.rope.scaling.factor": 0.0}, "rope.scaling.factor is 0.0; a finite number above 0"),
        (
            {"llama.rope.scaling.factor": 4.0, "llama.rope.scaling.type": "none"},
            "rope.scaling.factor is 4.0; rope.scaling.type is none: 1 or no factor",
        ),
    ],
)
def test_what_is_not_known_is_refused_by_name(
    fixtures: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    file = tmp_path / "tiny.gguf"
    arch = changes.pop("general.architecture", "llama")
    write_gguf(fixtures / "tiny", file, "llama", Kind.Q8_0, **changes)
    if arch != "llama":
        file.write_bytes(file.read_bytes().replace(b"llama", arch.encode()))
    with pytest.raises(CheckpointError, match=f"tiny.gguf: .*{message}"):
        resolve_model(str(file))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"llama.rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"llama.rope.scaling.factor": 4.0, "llama.rope.scaling.type": "linear"},
            {"rope_type": "linear", "factor": 4.0},
        ),
        ({"llama.rope.scaling.factor": 1.0, "llama.rope.scaling.type": "none"}, {"rope_type": "default"}),
        ({}, {"rope_type": "default"}),
    ],
)
def test_a_factor_alone_scales_rotations_linearly(
    fixtures: Path, tmp_path: Path, changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    write_gguf(fixtures / "tiny", tmp_path / "tiny.gguf", "llama", Kind.Q8_0, **changes)
    rope = json.loads((resolve_model(str(tmp_path / "tiny.gguf")) / "config.json").read_text())["rope_parameters"]
    del rope["rope_theta"]
    assert rope == expected


def test_gemma2_has_llama_cpp_s_soft_caps_where_the_file_names_none(tmp_path: Path) -> None:
    source = random_model(tmp_path / "source", "gemma2")
    caps = {"gemma2.attn_logit_softcapping": None, "gemma2.final_logit_softcapping": None}
    write_gguf(source, tmp_path / "g.gguf", "gemma2", Kind.Q8_0, **caps)
    config = json.loads((resolve_model(str(tmp_path / "g.gguf")) / "config.json").read_text())
    assert (config["attn_logit_softcapping"], config["final_logit_softcapping"]) == (50.0, 30.0)


@pytest.mark.parametrize("text", ["<|eot_id|>", "<end_of_turn>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "_<EOT>"])
def test_control_tokens_that_end_an_answer_by_their_texts(text: str) -> None:
    metadata = {
        "tokenizer.ggml.tokens": ["</s>", text, "<|im_end|>", "<s>"],
        "tokenizer.ggml.token_type": [3, 3, 1, 3],
        "tokenizer.ggml.eos_token_id": 0,
    }
    assert end_tokens(metadata) == [0, 1]  # the third is a word like any other


def test_damaged_files_are_refused(fixtures: Path, tmp_path: Path) -> None:
    """Cut anywhere, or with any byte of the header's beginning changed: refused or read, no crash."""
    file, other = tmp_path / "tiny.gguf", tmp_path / "other.gguf"
    write_gguf(fixtures / "tiny", file, "llama", Kind.Q8_0)
    whole = file.read_bytes()
    assert read_header(file).tensors
    for length in (0, 3, 11, 30, 200, 5000, len(whole) - 1):
        other.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"other\.gguf"):
            read_header(other)
    rng = random.Random(0)
    for _ in range(200):
        changed = bytearray(whole)
        changed[rng.randrange(400)] = rng.randrange(256)
        other.write_bytes(changed)
        with suppress(CheckpointError):
            GGUFFile(other)
    other.write_bytes(whole.replace(b"blk.0.attn_q.weight", b"blk.0.attn_z.weight"))
    with pytest.raises(CheckpointError, match=r"the tensor blk\.0\.attn_z\.weight, which llama is not known to have"):
        GGUFFile(other)


def test_tensors_lie_aligned_and_apart(fixtures: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(fixtures / "tiny", file, "llama", Kind.Q8_0)
    whole = file.read_bytes()
    one, two = (whole.index(name) + len(name) + 24 for name in (b"blk.0.attn_q.weight", b"blk.1.attn_q.weight"))
    offset = int.from_bytes(whole[two : two + 8], "little")
    assert offset % 32 == 0
    for changed, message in (
        (offset + 16, rf"blk\.0\.attn_q\.weight begins at byte {offset + 16} of the tensors, no multiple of 32"),
        (offset, r"blk\.[01]\.attn_q\.weight and blk\.[01]\.attn_q\.weight overlap"),
    ):
        file.write_bytes(whole[:one] + changed.to_bytes(8, "little") + whole[one + 8 :])
        with pytest.raises(CheckpointError, match=message):
            read_header(file)


def with_value(file: Path, value: bytes, size: int) -> None:
    """A file of zeros, as many as `size`, behind a header with one key."""
    with file.open("wb") as out:
        out.write(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 3) + b"key" + value)
        out.truncate(size)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (struct.pack("<IIQ", 9, 0, 5_000_000), "arrays of its metadata have 5,000,000 values; 4,194,304 are the most"),
        (struct.pack("<IIQ", 9, 8, 5_000_000), "arrays of its metadata have 5,000,000 values; 4,194,304 are the most"),
        (struct.pack("<IIQQ", 9, 8, 1, 70_000), "a string of its header has 70,000 bytes; 65,536 are the most here"),
        (struct.pack("<IQ", 8, 5_000_000), "a string of its header has 5,000,000 bytes; 4,194,304 are the most here"),
    ],
)
def test_a_file_of_zeros_is_not_unpacked(tmp_path: Path, value: bytes, message: str) -> None:
    with_value(tmp_path / "sparse.gguf", value, 100_000_000)
    with pytest.raises(CheckpointError, match=message):
        read_header(tmp_path / "sparse.gguf")


@pytest.mark.slow
@pytest.mark.parametrize("name", DEMO_MODELS)
def test_real_files(name: str, tmp_path: Path) -> None:
    """Every tensor equals the gguf package's; text that is generated equals transformers' on these numbers."""
    for package in DEMO_MODELS[name].packages:
        _download(package, tmp_path)
    file = tmp_path / "model.gguf"
    _join_pieces(tmp_path, file)
    directory = resolve_model(str(file))

    kinds = set()
    reader = gguf.GGUFReader(file)
    as_float = GGUFFile(file, torch.float32)
    stored = {theirs: name for name, (theirs, _) in as_float._stored.items()}
    for tensor in reader.tensors:
        kinds.add(tensor.tensor_type.name)
        expected = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        found = as_float.view(stored[tensor.name])
        if name == "smollm2" and ("attn_q" in tensor.name or "attn_k" in tensor.name):
            found = found.unflatten(0, (-1, 2, 32)).transpose(1, 2).flatten(0, 2)
        if name == "gemma3" and "norm" in tensor.name:
            expected = expected - 1
        assert torch.equal(found, expected), tensor.name
    assert kinds >= {"F32", "Q8_0"}
    plain = tmp_path / "plain"
    plain.mkdir()
    numbers = {tensor: as_float.view(tensor) for tensor in as_float.specs}
    save_file(numbers, plain / "model.safetensors", {"format": "pt"})
    shutil.copy(directory / "config.json", plain)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    ids = torch.tensor([Tokenizer.open(directory).encode("A short history of the printing press:")])
    with torch.inference_mode():
        expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(logits_of(directory, ids), expected, rtol=0, atol=1e-3)
