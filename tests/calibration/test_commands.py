"""`octavo quantize` and `octavo inspect` as a user runs them."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

import octavo.calibration.quantize_model
from octavo.calibration.report.file_names import REPORT
from octavo.cli import main


@pytest.fixture
def model(tmp_path: Path, fixtures: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(fixtures / "tiny", copy, ignore=shutil.ignore_patterns("expected.safetensors"))
    return copy


def quantize(model: Path, out: Path, *options: str) -> int:
    return main(["quantize", str(model), "-o", str(out), *options])


def test_quantize_measures_quality_through_the_serving_path(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny model's weights in int8 lose less than a percent of perplexity (its README: 29.35 to 29.36)."""
    out = tmp_path / "out"
    assert quantize(model, out, "--scheme", "w8a16", "--group-size", "32", "--eval-tokens", "600") == 0
    printed = capsys.readouterr().out
    report = json.loads((out / REPORT).read_text())
    assert report["scheme"] == "W8A16@32"
    assert report["verdict"]["passed"]
    assert str(tmp_path) not in json.dumps(report)
    assert report["sizes"]["saved"] == report["sizes"]["before"] - report["sizes"]["after"]
    assert len(report["layers"]) == sum(row["count"] for row in report["kinds"]) == 14
    assert len(quality_blocks := report["quality"]["blocks"]) == 2
    assert all(block["snr_db"] > 20 for block in quality_blocks)
    assert (out / "quantization_report.html").is_file()
    assert (out / "README.md").read_text().startswith("---\n")
    quality = report["quality"]
    assert quality["perplexity_after"] == pytest.approx(quality["perplexity_before"], rel=0.01)
    assert quality["num_tokens"] == 600 - 3  # three windows, the first token of each not predicted
    assert 0 <= quality["mean_kl"] <= quality["p99_kl"] < 0.1
    assert quality["top1_agreement"] > 0.9
    assert f"{quality['perplexity_after']:.3f}" in printed
    assert "mlp.down_proj" in printed


def test_a_really_bad_one_is_written_and_the_exit_code_is_3(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two bits for a whole row move a third of a nat, even of a model that is as unsure as the tiny one."""
    (model / "README.md").write_text("---\nlicense: mit\n---\nThe original's own words.\n")
    out = tmp_path / "out"
    options = ("--scheme", "W2A16", "--group-size", "-1", "--algorithm", "rtn", "--eval-tokens", "600", "--overwrite")
    assert quantize(model, out, *options, "--max-kl", "0.1") == 3
    printed = capsys.readouterr().out
    report = json.loads((out / REPORT).read_text())
    assert not report["verdict"]["passed"]
    assert "FAILED: mean KL" in printed
    assert report["verdict"]["worst_layers"][0] in printed
    for remedy in ("--algorithm gptq", "--group-size 32", "--scheme W3A16", "--ignore"):
        assert remedy in printed
    card = (out / "README.md").read_text()
    assert "license: mit" in card
    assert "The original's own words." in card
    assert quantize(model, out, *options, "--max-kl", "2") == 0


def test_quantize_refuses_in_one_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert quantize(model, out, "--scheme", "W4A16") == 1
    assert "32 is the largest that fits all: --group-size 32" in capsys.readouterr().err
    assert quantize(model, out, "--scheme", "W8A8", "--group-size", "32") == 1
    assert "group_size 32: W8A8 scales per channel; a group size is for W4A16, W4A16_ASYM," in capsys.readouterr().err
    assert quantize(tmp_path / "nowhere", out, "--scheme", "W8A8") == 1
    error = capsys.readouterr().err
    assert "no such directory" in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_quantize_overwrites_only_when_told(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = ("--scheme", "FP8_BLOCK", "--no-eval", "--max-shard-size", "0.5MB")
    assert quantize(model, out, *options) == 0
    assert "vLLM and transformers don't load such a model" in " ".join(capsys.readouterr().out.split())
    assert len(list(out.glob("*.safetensors"))) > 1
    assert quantize(model, out, *options) == 1
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert quantize(model, out, *options, "--overwrite") == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_in_one_line_with_nothing_left(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
) -> None:
    monkeypatch.setattr(octavo.calibration.quantize_model, "squared_error", lambda *_: os.kill(os.getpid(), number))
    try:
        ended: object = quantize(model, tmp_path / "out", "--scheme", "FP8_DYNAMIC")
    except SystemExit as end:
        ended = end.code
    assert ended == code
    assert capsys.readouterr().err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("size", ["5", "5 GB", "0.5gib"])
def test_sizes_are_read(model: Path, tmp_path: Path, size: str) -> None:
    code = quantize(model, tmp_path / "out", "--scheme", "FP8_DYNAMIC", "--no-eval", "--max-shard-size", size)
    assert code == 0


@pytest.mark.parametrize(
    "option",
    [
        *(f"--max-shard-size={size}" for size in ("", "GB", "-1GB", "0", "5XB")),
        *(f"--eval-tokens={count}" for count in ("", "1", "-5", "many")),
        *(f"--bits-budget={bits}" for bits in ("", "0", "-1", "nan", "many")),
        *(f"--max-kl={nats}" for nats in ("", "-1", "inf", "nan", "much")),
    ],
)
def test_sizes_that_are_none_are_refused(model: Path, tmp_path: Path, option: str) -> None:
    with pytest.raises(SystemExit):
        quantize(model, tmp_path / "out", "--scheme", "W8A8", option)


def test_inspect_counts_what_is_there(fixtures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(fixtures / "tiny--llmc-w4a16-g32"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["architecture"] == "LlamaForCausalLM"
    assert facts["format"] == "compressed-tensors"
    rows = {row["kind"]: row for row in facts["layers"]}
    down = rows["model.layers.*.mlp.down_proj"]
    assert (down["scheme"], down["count"], down["parameters"]) == ("int4/g32", 2, 2 * 128 * 352)
    assert down["bytes"] == 2 * (128 * 352 // 2 + 128 * 11 * 2 + 16)  # nibbles, bf16 scales, weight_shape
    assert rows["lm_head"]["scheme"] == "bfloat16"
    # Two layers, two KV heads of 32, keys and values, two bytes.
    assert facts["to_serve"]["kv_bytes_per_1k_tokens"]["auto"] == 1000 * 2 * 2 * 32 * 2 * 2
    stored = (fixtures / "tiny--llmc-w4a16-g32" / "model.safetensors").stat().st_size
    assert stored - 10_000 < facts["to_serve"]["weight_bytes"] < stored


def test_inspect_tells_what_a_kv_cache_was_calibrated_for(fixtures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(fixtures / "tiny--llmc-fp8-kv"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kv_cache"] == {"dtype": "fp8_e4m3", "scales": 4}
    assert facts["layers"][3]["scheme"] == "fp8_e4m3/tensor x fp8_e4m3/static tensor"
    sizes = facts["to_serve"]["kv_bytes_per_1k_tokens"]
    assert sizes["auto"] == sizes["fp8_e4m3"] == sizes["bfloat16"] // 2
    assert main(["inspect", str(fixtures / "tiny--llmc-fp8-kv")]) == 0
    assert "KV cache: 4 scales for fp8_e4m3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "decoder: the checkpoint has no weights for model.layers.2.self_attn.q_proj, model"),
        ({"hidden_act": "relu"}, "decoder: config.json: hidden_act 'relu' is unknown"),
        ({"vocab_size": "1024"}, "decoder: config.json: Expected `int | null`, got `str` - at `vocab_size`"),
        ({"model_type": "gpt_neox"}, "gpt_neox is served in transformers' own code"),
    ],
)
def test_inspect_tells_what_can_not_be_served(
    model: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], message: str
) -> None:
    config = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps(config))
    assert main(["inspect", str(model)]) == 0
    assert message in " ".join(capsys.readouterr().out.split())


def test_inspect_prints_tables_and_refuses_in_one_line(
    fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(fixtures / "tiny")]) == 0
    printed = capsys.readouterr().out
    assert "LlamaForCausalLM" in printed
    assert "per 1,000 tokens" in printed
    assert main(["inspect", str(tmp_path)]) == 1
    assert "no config.json" in capsys.readouterr().err
