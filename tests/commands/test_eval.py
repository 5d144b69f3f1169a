"""`octavo eval` as a user runs it: alone, against an original, and with what can't be."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from gguf_oracle import write_gguf
from hf_oracle import CASES, make_hf, save
from safetensors.torch import load_file, save_file
from slow_cases import slow
from tiny_encoders import SentenceModel
from tiny_whisper import make_whisper
from torch import Tensor
from trimmed import whole

from octavo.calibration.prepare import prepare
from octavo.calibration.quantize_model import quantize_model
from octavo.calibration.recipe import Recipe
from octavo.calibration.report.compare_checkpoints import compare_checkpoints
from octavo.calibration.report.report import read_report
from octavo.cli import main
from octavo.quant.checkpoint import Checkpoint
from octavo.runtime.model.families.registry import LAYOUTS

pytestmark = pytest.mark.long

W4 = "tiny--llmc-w4a16-g32"
FEW = ("--max-tokens", "300")


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def changed(source: Path, out: Path, **tensors: Tensor) -> Path:
    """A copy of a checkpoint with some tensors replaced; '__' in a name stands for '.'."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("expected.safetensors"))
    content = load_file(source / "model.safetensors")
    new = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    assert new.keys() <= content.keys()
    save_file(content | new, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_alone_it_tells_the_perplexity(fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(fixtures / W4), *FEW, "--json", str(tmp_path / "out.json")]) == 0
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["model"] == W4
    assert content["num_tokens"] == 298
    printed = capsys.readouterr().out
    assert printed == f"perplexity {content['perplexity']:.3f} over 298 tokens of octavo's held-out text\n"


def test_against_the_original_it_tells_all(fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = ("--json", str(tmp_path / "out.json"), "--html", str(tmp_path / "out.html"))
    assert main(["eval", str(fixtures / W4), "--against", str(fixtures / "tiny"), *FEW, *outputs]) == 0
    printed = capsys.readouterr().out
    report = read_report(tmp_path / "out.json")
    assert report.task == "eval"
    assert report.quality is not None
    assert report.verdict is not None
    assert report.verdict.why == "the default for int4/g32"
    assert f"KL mean {report.quality.mean_kl:.4f}" in printed
    assert "passed" in printed
    assert len(report.quality.blocks) == 2
    assert len(report.layers) == 14
    assert report.sizes.bits_per_weight == pytest.approx(4 + 16 / 32, rel=0.01)  # and 16 bytes of weight_shape a layer
    assert str(fixtures) not in (tmp_path / "out.json").read_text()
    assert (tmp_path / "out.html").read_text().count("<svg") == 3


def test_no_path_of_a_gguf_original_is_in_the_report(
    fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    original, out = tmp_path / "tiny.gguf", tmp_path / "out.json"
    write_gguf(fixtures / "tiny", original, "llama", Kind.F16)
    assert main(["eval", str(fixtures / W4), "--against", str(original), *FEW, "--json", str(out)]) == 0
    assert read_report(out).base_model is None
    assert str(tmp_path) not in out.read_text()


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("tiny--llmc-w4a16-g32", "int4/g32"),
        ("tiny--llmc-w4a8-g32", "int4/g32 x int8/token"),
        ("tiny--llmc-nvfp4a16", "fp4_e2m1/g16/e4m3"),
        ("tiny--llmc-fp8-static", "fp8_e4m3/tensor x fp8_e4m3/static tensor"),
        ("tiny--autogptq-w4g32", "int4/g32"),
        ("tiny--gptqmodel-w3g32", "int3/g32"),
        ("tiny--gptqmodel-w4g32-act", "int4/g32"),
        ("tiny--gptqmodel-w4g32-asym", "int4/g32/asym"),
        ("tiny--autoround-awq-w4g32", "int4/g32/asym"),
    ],
)
def test_every_tools_format_is_measured(fixtures: Path, tmp_path: Path, name: str, scheme: str) -> None:
    out = tmp_path / "out.json"
    model = whole(fixtures / name, tmp_path)
    assert main(["eval", str(model), "--against", str(fixtures / "tiny"), *FEW, "--json", str(out)]) == 0
    report = read_report(out)
    assert report.scheme == scheme
    assert report.quality is not None
    assert 0 < report.quality.mean_kl < 0.2  # the worst of them has 0.07
    assert len(report.layers) == 14
    assert all(10 < row.snr_db < 50 for row in report.layers if row.snr_db is not None)


def test_the_weights_error_is_that_of_the_tools_own_dequantized_weights(fixtures: Path) -> None:
    sides = compare_checkpoints(Checkpoint.open(fixtures / "tiny"), Checkpoint.open(fixtures / W4))
    rows = {row.module: row for row in sides.rows}
    expected = load_file(fixtures / W4 / "expected.safetensors")
    original = load_file(fixtures / "tiny" / "model.safetensors")
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"):
        weight = original[f"{module}.weight"].double()
        noise = (expected[f"dequantized.{module}"].double() - weight).square().sum()
        assert rows[module].snr_db == pytest.approx(10 * math.log10(weight.square().sum() / noise), abs=1e-4)


@pytest.mark.parametrize("name", ["mamba2", *map(slow, ("lfm2", "falcon_h1", "granitemoehybrid", "qwen3_next"))])
def test_convolutions_are_no_quantized_layers(name: str, tmp_path: Path) -> None:
    """No config ignores a mixer's convolution by name, whose weight is no linear layer's."""
    source = save(make_hf(*CASES[name]), tmp_path / "source")
    done = quantize_model(prepare(source, tmp_path / "out", Recipe("FP8_DYNAMIC"), layouts=LAYOUTS))
    original = Checkpoint.open(source, LAYOUTS)
    sides = compare_checkpoints(original, Checkpoint.open(tmp_path / "out", LAYOUTS))
    noises = {row.module: row.noise for row in done.layers if original.has(f"{row.module}.weight")}
    assert {row.module: row.noise for row in sides.rows} == pytest.approx(noises)


def test_a_broken_layer_is_found_and_the_exit_code_is_3(
    fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One layer's scales are four times too large, as by a wrong constant somewhere."""
    name = "model.layers.1.mlp.down_proj"
    scale = load_file(fixtures / "tiny--llmc-w8a8" / "model.safetensors")[f"{name}.weight_scale"]
    broken = changed(
        fixtures / "tiny--llmc-w8a8", tmp_path / "bad", **{f"{name}.weight_scale".replace(".", "__"): scale * 4}
    )
    assert main(["eval", str(broken), "--against", str(fixtures / "tiny"), *FEW]) == 3
    printed = capsys.readouterr().out
    assert "FAILED: mean KL" in printed
    assert "(the default for int8/channel x int8/token)" in printed
    assert "most of the noise comes from the blocks 1" in printed
    assert f"worst layers: {name}" in printed
    good = ["eval", str(fixtures / "tiny--llmc-w8a8"), "--against", str(fixtures / "tiny"), *FEW]
    assert main(good) == 0
    assert main([*good, "--max-kl", "0"]) == 3


def test_nan_is_told_of_the_model_that_has_it(
    fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nan = changed(fixtures / "tiny", tmp_path / "nan", model__norm__weight=torch.full((128,), math.nan).bfloat16())
    tiny = fixtures / "tiny"
    for model, original, code, side in ((nan, tiny, 3, "quantized"), (tiny, nan, 1, "original")):
        assert main(["eval", str(model), "--against", str(original), *FEW]) == code
        assert capsys.readouterr().err == f"octavo eval: the {side} model gave NaN or infinite logits\n"


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--dtype", "int4"), "the default for int4/g128"),
        (("--kv-cache-dtype", "fp8"), "the default for unquantized weights with a KV cache in fp8"),
        (
            ("--kv-cache-dtype", "int4_per_token_head"),
            "the default for unquantized weights with a KV cache in int4_per_token_head",
        ),
        (("--lm-head-dtype", "int8"), "the default for int8/channel"),
    ],
)
def test_what_the_server_rounds_is_measured_too(
    fixtures: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, str], why: str
) -> None:
    tiny = str(fixtures / "tiny")
    assert main(["eval", tiny, "--against", tiny, *FEW, *flags]) == 0
    printed = capsys.readouterr().out
    assert f"({why})" in printed
    assert "KL mean 0.0000 p99 0.0000" not in printed


def test_norms_that_hold_scales_keep_weights_from_being_compared(fixtures: Path, tmp_path: Path) -> None:
    name = "model.layers.0.input_layernorm.weight"
    weight = load_file(fixtures / W4 / "model.safetensors")[name]
    folded = changed(fixtures / W4, tmp_path / "folded", **{name.replace(".", "__"): weight * 1.5})
    sides = compare_checkpoints(Checkpoint.open(fixtures / "tiny"), Checkpoint.open(folded))
    assert sides.rows == ()
    assert [str(scheme) for scheme in sides.schemes] == ["int4/g32"]
    assert sides.notes[0].startswith(f"{name} differs")


def test_models_in_transformers_own_code_show_no_blocks(
    fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = transformers.GPTNeoXConfig(**sizes, num_attention_heads=4, max_position_embeddings=64, eos_token_id=2)
    torch.manual_seed(0)
    transformers.GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "neox")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(fixtures / "tiny" / name, tmp_path / "neox" / name)
    neox, out = str(tmp_path / "neox"), tmp_path / "out.json"
    assert main(["eval", neox, "--against", neox, *FEW, "--json", str(out)]) == 0
    quality = read_report(out).quality
    assert quality is not None
    assert (quality.mean_kl, quality.blocks, quality.window) == (0.0, (), 64)  # its longest sequence
    assert "KL mean 0.0000" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_data_is_a_text_or_a_data_set(
    fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    parts = [f"Sentence {i} is a sentence about the number {i}." for i in range(40)]
    path = tmp_path / f"text.{suffix}"
    path.write_text("\n\n".join(parts) if suffix == "txt" else "".join(json.dumps({"text": p}) + "\n" for p in parts))
    assert main(["eval", str(fixtures / "tiny"), *FEW, "--data", str(path)]) == 0
    other = tmp_path / "same.txt"
    other.write_text("\n\n".join(parts))
    assert main(["eval", str(fixtures / "tiny"), *FEW, "--data", str(other)]) == 0
    one, two = capsys.readouterr().out.splitlines()
    assert one.partition(" of ")[0] == two.partition(" of ")[0]
    assert one.endswith(path.name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tiny}", "--max-kl", "1"], "--max-kl compares two models: --against names the original"),
        (["{tiny}", "--html", "{tmp}/x.html"], "--html compares two models"),
        (["{tiny}", "--against-revision", "main"], "--against-revision compares two models"),
        (["{tiny}", "--json", "{tmp}"], "is a directory"),
        (["{tiny}", "--json", "{tmp}/none/x.json"], "none is no directory"),
        (["{tmp}/none"], "no such directory"),
        (["{tmp}"], "no config.json"),
        (["{tiny}", "--against", "{tmp}/none"], "no such directory"),
        (["{tiny}", "--data", "{tmp}/none.txt"], "can't be read: No such file"),
        (["{tiny}", "--data", "{tmp}/broken.jsonl"], "broken.jsonl:1"),
        (["{tiny}", "--data", "{tmp}/empty.txt"], "empty.txt has 0 tokens"),
        (["{w4}", "--dtype", "int8"], "tiny--llmc-w4a16-g32 can't be run: "),
        (["{tiny}", "--against", "{qwen}"], "is no quantization of tiny-qwen2"),
    ],
)
def test_what_can_not_be_is_one_clear_line(
    fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "broken.jsonl").write_text("{")
    (tmp_path / "empty.txt").write_text("")
    names = {"tiny": fixtures / "tiny", "w4": fixtures / W4, "qwen": fixtures / "tiny-qwen2", "tmp": tmp_path}
    assert main(["eval", *(argument.format(**names) for argument in arguments)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("octavo eval: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("kind", ["bert", "whisper"])
def test_an_original_that_generates_no_text_is_one_clear_line(
    fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    original = tmp_path / kind
    original.mkdir()
    if kind == "bert":
        SentenceModel(original)
    else:
        make_whisper(original)
    capsys.readouterr()
    assert main(["eval", str(fixtures / "tiny"), "--against", str(original), *FEW]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"octavo eval: {kind} goes on from no text, as models that are compared must")
    assert error.count("\n") == 1
