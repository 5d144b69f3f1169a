"""GGUF files that are written: the gguf package reads the very numbers, and what can't be said is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from calibrated import calibration, held_out_tokens
from gguf import GGMLQuantizationType as Kind
from gguf_oracle import interleaved, name_of
from hf_oracle import make_hf
from served import logits_of
from tokenizers import Tokenizer as Backend
from torch import Tensor

from octavo.calibration.algorithms.awq import awq_clip
from octavo.calibration.algorithms.gptq import gptq_loss, gptq_weight
from octavo.calibration.algorithms.input_statistics import InputStats, StatsCollector
from octavo.calibration.algorithms.learned_rounding import LearnedRounding
from octavo.calibration.choices import Algorithm
from octavo.calibration.convert_model import convert_model
from octavo.calibration.layers import QuantizeError
from octavo.calibration.prepare import prepare
from octavo.calibration.quantize_model import quantize_model
from octavo.calibration.recipe import Recipe, RecipeError, parse_scheme
from octavo.quant.checkpoint import Checkpoint
from octavo.quant.formats.format import FormatError
from octavo.quant.formats.gguf import GGUFFormat
from octavo.quant.gguf.tokenizer import tokenizer_of
from octavo.quant.gguf.vocabulary import vocabulary_of
from octavo.quant.hub import resolve_model
from octavo.quant.model_files import CheckpointError
from octavo.quant.qparams import QuantizedWeight, quantize_weight
from octavo.quant.scheme import GGUF, QuantScheme
from octavo.runtime.model.families.registry import LAYOUTS
from octavo.text.tokenizer import Tokenizer

K_BLOCKS = ("Q4_K", "Q5_K", "Q6_K")
IDS = torch.randint(3, 1000, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def meaning(blocks: Tensor, kind: str) -> Tensor:
    """What blocks stand for, as the gguf package has it."""
    return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), Kind[kind]).copy())


def awkward_weight() -> Tensor:
    """Rows of zeros, of one sign, of tiny numbers, with an outlier, and with a super-block of zeros."""
    weight = torch.randn(16, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[3] = 0
    weight[4].abs_()
    weight[5, :256] = 0
    weight[6] *= 1e-6
    weight[7, 100] = 2.0
    return weight


@pytest.mark.parametrize("kind", GGUF)
def test_what_is_rounded_is_what_blocks_hold(kind: str) -> None:
    weight = awkward_weight()
    quantized = quantize_weight(weight, QuantScheme(GGUF[kind]), "mse", torch.float16)
    format_ = GGUFFormat(kind)
    blocks = format_.write(quantized)["blocks"]
    assert torch.equal(meaning(blocks, kind), quantized.dequantize())
    assert torch.equal(format_.read({"blocks": blocks}).dequantize(), quantized.dequantize())
    assert torch.equal(format_.write(format_.read({"blocks": blocks}))["blocks"], blocks)
    usual = slice(8, None)
    error = (quantized.dequantize() - weight)[usual].norm() / weight[usual].norm()
    assert error < 0.36 * 2.0 ** -GGUF[kind].bits * 5  # of normal numbers in so many steps over +-2.5 deviations


@pytest.mark.parametrize("kind", K_BLOCKS)
def test_every_block_that_llama_cpp_may_write_is_written_back(kind: str) -> None:
    """Of random bytes: any scales, minima and codes."""
    columns, nbytes = gguf.GGML_QUANT_SIZES[Kind[kind]]
    raw = torch.randint(0, 256, (64, nbytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    halves = torch.tensor([0.01, 0.003]).half().view(torch.uint8)
    if kind == "Q6_K":
        raw[:, 208:210] = halves[:2]
    else:
        raw[:, :4] = halves
    weight = GGUFFormat(kind).read({"blocks": raw})
    again = GGUFFormat(kind).write(weight)["blocks"]
    assert torch.equal(meaning(again, kind), meaning(raw, kind))
    assert weight.shape == (64, columns)


def test_numbers_that_a_block_does_not_hold_are_refused() -> None:
    scheme = QuantScheme(GGUF["Q4_K"])
    weight = quantize_weight(awkward_weight(), scheme)
    other = QuantizedWeight(scheme, weight.codes, torch.rand(weight.scale.shape), weight.zero_point)
    with pytest.raises(FormatError, match="are no integers up to 63 times one float16"):
        GGUFFormat("Q4_K").write(other)
    with pytest.raises(FormatError, match="100 columns are no whole blocks of Q4_0, 32 each"):
        GGUFFormat("Q4_0").tensors(4, 100)


def statistics(k: int) -> InputStats:
    """Of inputs that move together, some of them large."""
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(600, k, generator=generator) @ torch.randn(k, k, generator=generator) / k**0.5
    collector = StatsCollector(k, torch.device("cpu"), moments=True, num_rows=0)
    collector.add(mixed * torch.rand(k, generator=generator).exp())
    return collector.result()


@pytest.mark.parametrize("kind", GGUF)
def test_algorithms_stay_on_a_block_s_grid(kind: str) -> None:
    """GPTQ and AWQ's clipping lose less than rounding to nearest, and blocks hold all of it exactly."""
    weight = torch.randn(32, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    stats = statistics(512)
    scheme = QuantScheme(GGUF[kind])
    nearest = quantize_weight(weight, scheme, "mse", torch.float16)
    found = {
        "gptq": gptq_weight(weight, stats, scheme, scale_dtype=torch.float16).weight,
        "gptq in order": gptq_weight(weight, stats, scheme, act_order="none", scale_dtype=torch.float16).weight,
        "awq": awq_clip(weight, stats, scheme, scale_dtype=torch.float16),
    }
    for name, quantized in found.items():
        blocks = GGUFFormat(kind).write(quantized)["blocks"]
        assert torch.equal(meaning(blocks, kind), quantized.dequantize()), name
        if name != "awq":
            assert gptq_loss(weight, quantized.dequantize(), stats) < 0.8 * gptq_loss(
                weight, nearest.dequantize(), stats
            )
    learned = LearnedRounding(weight, found["gptq"])
    meant = torch.empty_like(weight)
    learned.write(meant)
    torch.testing.assert_close(meant, found["gptq"].dequantize(), rtol=0, atol=1e-7)
    for _ in range(3):
        learned.step(torch.randn(weight.shape), 0.3, 0.01)
    moved = learned.result()
    assert not torch.equal(moved.codes, found["gptq"].codes)
    assert torch.equal(meaning(GGUFFormat(kind).write(moved)["blocks"], kind), moved.dequantize()) or kind in (
        "Q4_0",
        "Q5_0",
        "Q8_0",
    )


def wide_model(directory: Path, fixtures: Path, family: str = "Llama", **overrides: Any) -> Path:
    """A model whose columns are whole super-blocks, with the tokenizer of `tiny`."""
    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "vocab_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    }
    sizes |= {} if family in ("Qwen2", "Granite") else {"head_dim": 32}
    make_hf(family, sizes | overrides).bfloat16().save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(fixtures / "tiny" / name, directory)
    return directory


def quantized(source: Path, out: Path, scheme: str, algorithm: Algorithm = "rtn", **options: Any) -> Any:
    text = None
    if algorithm != "rtn":
        text = calibration(source, held_out_tokens(source, num_samples=4, seq_len=32))
    recipe = Recipe(scheme, algorithm, "gguf", **options)
    return quantize_model(prepare(source, out, recipe, calibration=text, layouts=LAYOUTS))


def test_a_mix_lies_where_llama_cpp_has_it(fixtures: Path, tmp_path: Path) -> None:
    """Q4_K_M of eight layers, read by the gguf package; the directory and the file alone are the same model."""
    source = wide_model(tmp_path / "source", fixtures)
    done = quantized(
        source, tmp_path / "out", "Q4_K_M", layers={"*.3.mlp.up_proj": "Q8_0"}, ignore=("*.4.mlp.up_proj",)
    )
    assert not done.warnings
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    more = [0, 3, 6, 7]  # the first and last eighth, and every third between
    for i in range(8):
        for name in ("attn_v", "ffn_down"):
            assert tensors[f"blk.{i}.{name}.weight"].tensor_type == (Kind.Q6_K if i in more else Kind.Q4_K)
        up = {3: Kind.Q8_0, 4: Kind.BF16}.get(i, Kind.Q4_K)
        assert tensors[f"blk.{i}.ffn_up.weight"].tensor_type == up
        assert tensors[f"blk.{i}.attn_norm.weight"].tensor_type == Kind.F32
    assert tensors["token_embd.weight"].tensor_type == Kind.Q4_K
    assert tensors["output.weight"].tensor_type == Kind.Q6_K
    checkpoint = Checkpoint.open(tmp_path / "out")
    config = checkpoint.config
    for name in Checkpoint.open(source).names:
        theirs = tensors[name_of(name, "llama")]
        expected = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
        module = name.removesuffix(".weight")
        found = checkpoint.linear(module) if "_proj" in name or "lm_head" in name else checkpoint.tensor(name)
        numbers = (found.dequantize() if isinstance(found, QuantizedWeight) else found.float()).numpy()
        if "q_proj" in name or "k_proj" in name:
            numbers = interleaved(numbers, config["num_attention_heads" if "q_" in name else "num_key_value_heads"])
        assert np.array_equal(numbers, expected.reshape(numbers.shape)), name
    alone = resolve_model(str(tmp_path / "out" / "model.gguf"))
    assert torch.equal(logits_of(tmp_path / "out", IDS), logits_of(alone, IDS))
    ours, original = Tokenizer.open(alone), Tokenizer.open(source)
    for text in ("Hello world! It's 12345 o'clock.", "  def f(x):\n\treturn x<|im_end|>"):
        assert ours.encode(text) == original.encode(text)
    assert ours.special_ids == original.special_ids


def test_columns_that_are_no_super_blocks_are_named(fixtures: Path, tmp_path: Path) -> None:
    done = quantized(fixtures / "tiny", tmp_path / "out", "Q4_K_M")
    assert any("11 layers of 128 columns are in blocks of Q5_0, as llama.cpp has it" in line for line in done.warnings)
    kinds = {tensor.tensor_type for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert kinds == {Kind.Q5_0, Kind.Q8_0, Kind.F32}


@pytest.mark.parametrize("algorithm", ["awq+gptq", "tune"])
def test_calibrated_files_are_whole(fixtures: Path, tmp_path: Path, algorithm: Algorithm) -> None:
    """Folded scales go into norms, and what is served is what the report measured."""
    source = wide_model(tmp_path / "source", fixtures, num_hidden_layers=2)
    done = quantized(source, tmp_path / "out", "Q4_K", algorithm)
    plain = quantized(source, tmp_path / "plain", "Q4_K")
    assert {row.scheme for row in done.layers} == {str(parse_scheme("Q4_K"))} == {row.scheme for row in plain.layers}
    truth = logits_of(source, IDS)
    errors = [float((logits_of(tmp_path / name, IDS) - truth).norm()) for name in ("out", "plain")]
    assert errors[0] < 1.5 * errors[1]
    alone = resolve_model(str(tmp_path / "out" / "model.gguf"))
    assert torch.equal(logits_of(tmp_path / "out", IDS), logits_of(alone, IDS))


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("Llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 8192}}),
    "gemma3": ("Gemma3", {"query_pre_attn_scalar": 32, "sliding_window": 8, "num_hidden_layers": 6}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True},
    ),
    "qwen2": ("Qwen2", {}),
    "granite": (
        "Granite",
        {"embedding_multiplier": 12.0, "logits_scaling": 0.25, "residual_multiplier": 0.25}
        | {"attention_multiplier": 0.5},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_metadata_says_the_whole_config(fixtures: Path, tmp_path: Path, name: str) -> None:
    """The file alone computes what the directory with the original's config.json does."""
    family, overrides = MODELS[name]
    sizes = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 4}
    source = wide_model(tmp_path / "source", fixtures, family, **(sizes | overrides))
    quantized(source, tmp_path / "out", "Q8_0")
    alone = resolve_model(str(tmp_path / "out" / "model.gguf"))
    assert torch.equal(logits_of(tmp_path / "out", IDS), logits_of(alone, IDS))


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("Mistral", {"sliding_window": 7}, "config.json has sliding_window 7, which a GGUF file can't say"),
        ("Gemma3", {"query_pre_attn_scalar": 10}, "query_pre_attn_scalar 10, and a GGUF file of it means 32"),
        ("Llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic', which a GGUF"),
    ],
)
def test_what_a_file_can_not_say_is_refused(
    fixtures: Path, tmp_path: Path, family: str, overrides: dict[str, Any], message: str
) -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 4}
    source = wide_model(tmp_path / "source", fixtures, family, **(sizes | overrides))
    with pytest.raises(QuantizeError, match=f"format gguf: .*{message}"):
        quantized(source, tmp_path / "out", "Q8_0")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("used", [False, True])
def test_a_window_that_is_off_is_no_matter(fixtures: Path, tmp_path: Path, used: bool) -> None:
    """As in the configs of Qwen 2.5."""
    source = shutil.copytree(fixtures / "tiny-qwen2", tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"sliding_window": 32768, "use_sliding_window": used}
    (source / "config.json").write_text(json.dumps(config))
    if used:
        with pytest.raises(
            QuantizeError, match=r"config\.json has use_sliding_window True, which a GGUF file can't say"
        ):
            quantized(source, tmp_path / "out", "Q8_0")
    else:
        quantized(source, tmp_path / "out", "Q8_0")
        assert (tmp_path / "out" / "model.gguf").is_file()


@pytest.mark.parametrize(
    "recipe", [{"layers": {"re:.*experts\\.0\\.down_proj": "Q8_0"}}, {"ignore": ("re:.*experts\\.1\\.gate_proj",)}]
)
def test_experts_of_several_kinds_are_refused(fixtures: Path, tmp_path: Path, recipe: dict[str, Any]) -> None:
    """One tensor holds them, whose parts would lie over each other."""
    with pytest.raises(
        QuantizeError, match=r"experts are one tensor in a GGUF file, blk\.0\.ffn_\w+_exps\.weight, which"
    ):
        quantized(fixtures / "tiny-moe", tmp_path / "out", "Q4_0", **recipe)
    assert not (tmp_path / "out").exists()


def test_schemes_go_with_the_format() -> None:
    with pytest.raises(RecipeError, match=r"format gguf holds Q4_K_S, .*not int4/g128; --scheme Q4_K_M is one"):
        Recipe("W4A16", "rtn", "gguf")
    with pytest.raises(RecipeError, match="int4/g32/min/super is what blocks of GGUF files hold; --format gguf"):
        Recipe("q4_k_m", "rtn")
    with pytest.raises(RecipeError, match="group_size 64: Q4_K has groups of 32 only"):
        Recipe("Q4_K@64", "rtn", "gguf")


def test_integers_are_converted_one_by_one(fixtures: Path, tmp_path: Path) -> None:
    """compressed-tensors to Q4_0 and back; super-blocks to super-blocks; others are refused with the reason."""
    source = fixtures / "tiny--llmc-w4a16-g32"
    with pytest.raises(QuantizeError, match="no GGUF block holds int4/g32/asym; Q4_0"):
        convert_model(fixtures / "tiny--llmc-w4a16-asym-g32", tmp_path / "no", "gguf", layouts=LAYOUTS)
    convert_model(source, tmp_path / "q4_0", "gguf", layouts=LAYOUTS)
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "q4_0")
    for module in before.quantized:
        one, other = before.linear(module), after.linear(module)
        assert isinstance(one, QuantizedWeight)
        assert isinstance(other, QuantizedWeight)
        assert torch.equal(one.dequantize(), other.dequantize())
    assert torch.equal(logits_of(source, IDS), logits_of(tmp_path / "q4_0", IDS))
    wide = wide_model(tmp_path / "wide", fixtures, num_hidden_layers=2)
    quantized(wide, tmp_path / "q4_k", "Q4_K_M")
    convert_model(tmp_path / "q4_k", tmp_path / "again", "gguf", layouts=LAYOUTS)
    assert torch.equal(logits_of(tmp_path / "q4_k", IDS), logits_of(tmp_path / "again", IDS))
    with pytest.raises(QuantizeError, match="its integers lie over minima that are no zero points"):
        convert_model(tmp_path / "q4_k", tmp_path / "ct", "compressed-tensors", layouts=LAYOUTS)


def test_merges_over_spaces_become_scores(tmp_path: Path) -> None:
    """As SentencePiece's; the file's tokenizer makes the same tokens of a text."""
    pieces = ["<unk>", "<0x0A>", *"\u2581abc", "ab", "\u2581ab", "bc", "abc", "\u2581abc"]
    merges = [["a", "b"], ["\u2581", "ab"], ["b", "c"], ["ab", "c"], ["a", "bc"], ["\u2581ab", "c"], ["\u2581", "abc"]]
    state = {
        "added_tokens": [{"content": "<unk>", "id": 0, "special": True}],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": {"type": "Split"},
        "post_processor": None,
        "model": {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": merges}
        | {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"unk_token": "<unk>"}))
    metadata = vocabulary_of(tmp_path, {"eos_token_id": 3}, len(pieces))
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.token_type"] == [2, 6, *[1] * 9]
    backend = Backend.from_str(tokenizer_of(metadata)[0])
    for text, expected in ((" abc ab", ["\u2581abc", "\u2581ab"]), ("cbc", ["c", "bc"])):
        assert backend.encode(text, add_special_tokens=False).tokens == expected
    state["model"]["merges"] = [["a", "b"], *merges[2:], ["\u2581", "ab"], ["b", "c"]]  # type: ignore[index]
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="joins pieces in an order that no scores of theirs give"):
        vocabulary_of(tmp_path, {"eos_token_id": 3}, len(pieces))


def test_a_tokenizer_of_another_kind_is_refused(fixtures: Path, tmp_path: Path) -> None:
    state = json.loads((fixtures / "tiny" / "tokenizer.json").read_text())
    for changes, message in (
        ({"model": state["model"] | {"type": "WordPiece"}}, "a model WordPiece; a GGUF file is written of BPE"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "splits text as no tokenizer.ggml.pre does"),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps(state | changes))
        with pytest.raises(CheckpointError, match=message):
            vocabulary_of(tmp_path, {}, 1024)
    with pytest.raises(CheckpointError, match="is beyond the embedding's 100 rows"):
        vocabulary_of(fixtures / "tiny", {}, 100)
