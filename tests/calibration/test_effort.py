"""Algorithm auto: what it is for each scheme and effort, and what rtn would have cost beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hf_oracle import CASES, make_hf, save

import octavo
from octavo.calibration.choices import Algorithm, Effort
from octavo.calibration.layers import QuantizeError
from octavo.calibration.recipe import Recipe, RecipeError
from octavo.calibration.report.report import read_report
from octavo.calibration.text.documents import DataError
from octavo.cli import main

pytestmark = pytest.mark.long

LICENSE = Path(__file__).parent.parent.parent / "LICENSE"  # of the kind of text that the tiny models were trained on


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copy(LICENSE, tmp_path_factory.mktemp("text") / "license.txt"))


@pytest.mark.parametrize(
    ("scheme", "effort", "algorithm"),
    [
        ("W4A16", "auto", "awq+gptq"),
        ("W4A16_ASYM", "best", "tune"),
        ("W2A16", "best", "tune"),
        ("W4A8", "auto", "awq+gptq"),
        ("W4A8", "best", "tune"),
        ("W4AFP8", "auto", "awq+gptq"),
        ("W8A8", "auto", "smoothquant"),
        ("W8A8", "best", "tune"),
        ("W8A16", "best", "rtn"),
        ("FP8_DYNAMIC", "best", "awq+gptq"),
        ("FP8_BLOCK", "best", "awq+gptq"),
        ("FP8", "auto", "rtn"),
        ("NVFP4", "auto", "awq+gptq"),
        ("NVFP4", "best", "tune"),
        ("MXFP4A16", "best", "tune"),
        ("MXFP8", "auto", "rtn"),
        ("MXFP8A16", "best", "rtn"),
        ("W4A16", "fast", "rtn"),
        ("W8A8", "fast", "rtn"),
    ],
)
def test_auto_is_an_algorithm_of_the_scheme(scheme: str, effort: Effort, algorithm: Algorithm) -> None:
    recipe = Recipe(scheme)
    assert recipe.resolved(effort) == Recipe(scheme, algorithm=algorithm)
    assert recipe.resolved(effort, calibrates=False).algorithm == "rtn"
    assert Recipe(scheme, algorithm="gptq").resolved(effort).algorithm == "gptq"


def test_settings_of_another_algorithm_are_refused_once_it_is_known() -> None:
    recipe = Recipe("FP8_DYNAMIC", algorithm="auto", dampening=0.2)
    with pytest.raises(RecipeError, match="dampening is GPTQ's, and the algorithm is rtn"):
        recipe.resolved()
    assert Recipe("W4A16", algorithm="auto", dampening=0.2).resolved().dampening == 0.2


def test_it_says_what_rtn_would_have_cost(
    fixtures: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The KL that a run with rtn measures; the recipe says which algorithm it was, and nothing else is left."""
    words = ["quantize", str(fixtures / "tiny"), "--scheme", "W3A16", "--group-size", "32", "--eval-tokens", "500"]
    limits = ["--max-kl", "100"]
    data = ["--dataset", str(text), "--num-calibration-samples", "16", "--max-seq-length", "64"]
    assert main([*words, *limits, "-o", str(tmp_path / "rtn"), "--algorithm", "rtn"]) == 0
    plain = read_report(tmp_path / "rtn" / "quantization_report.json")
    assert plain.rtn_kl is None
    assert plain.quality is not None
    capsys.readouterr()
    assert main([*words, *limits, "-o", str(tmp_path / "out"), *data]) == 0
    report = read_report(tmp_path / "out" / "quantization_report.json")
    assert report.quality is not None
    assert report.algorithm == json.loads((tmp_path / "out" / "recipe.json").read_text())["algorithm"] == "awq+gptq"
    assert report.rtn_kl == plain.quality.mean_kl
    assert report.quality.mean_kl < report.rtn_kl
    printed = capsys.readouterr().out
    assert f"KL mean: awq+gptq {report.quality.mean_kl:.4f}, rtn {report.rtn_kl:.4f}" in printed
    assert "calibration text: license.txt: 16 samples of 64 tokens" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rtn"]


def test_a_model_without_a_decoder_here_is_rounded_to_nearest(fixtures: Path, tmp_path: Path, text: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(fixtures / "tiny", model, ignore=shutil.ignore_patterns("expected.safetensors"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "martian"}))
    report = octavo.quantize(model, tmp_path / "out", scheme="W4A16@32", evaluate=False)
    assert report.algorithm == "rtn"
    assert "octavo doesn't have this model's code" in report.warnings[0]
    with pytest.raises(RecipeError, match="algorithm rtn with scheme W4A16@32 uses no calibration text"):
        octavo.quantize(model, tmp_path / "more", scheme="W4A16@32", data=str(text))


def test_a_model_whose_layers_read_the_cache_of_others_is_rounded_to_nearest(tmp_path: Path) -> None:
    """Its blocks can't be run one by one. What asks for that by name is refused with what would work."""
    model = save(make_hf(*CASES["gemma3n_text"]), tmp_path / "model")
    why = "gemma3n_text has layers that read the cache of others, and calibration runs its blocks one by one"
    report = octavo.quantize(model, tmp_path / "out", scheme="W8A8", evaluate=False)
    assert report.algorithm == "rtn"
    assert f"algorithm rtn, which needs no calibration: {why}" in report.warnings
    asked = octavo.quantize(model, tmp_path / "asked", scheme="W8A8", algorithm="rtn", evaluate=False)
    assert not any(why in warning for warning in asked.warnings)
    for options in ({"scheme": "W8A8", "algorithm": "gptq"}, {"scheme": "NVFP4"}):
        with pytest.raises(QuantizeError, match=f"{why}; algorithm rtn with a scheme whose activations are dynamic"):
            octavo.quantize(model, tmp_path / "more", evaluate=False, **options)


def test_a_model_that_can_write_no_text_is_rounded_to_nearest(fixtures: Path, tmp_path: Path) -> None:
    """Where none is given, and the scheme needs none: any other algorithm is refused."""
    model = tmp_path / "model"
    shutil.copytree(fixtures / "tiny", model, ignore=shutil.ignore_patterns("expected.safetensors", "tokenizer.json"))
    report = octavo.quantize(model, tmp_path / "out", scheme="W4A16@32", evaluate=False)
    assert report.algorithm == json.loads((tmp_path / "out" / "recipe.json").read_text())["algorithm"] == "rtn"
    assert report.calibration is None
    assert "algorithm rtn, which needs no calibration text: " in report.warnings[0]
    assert "tokenizer.json" in report.warnings[0]
    for options in ({"scheme": "W4A16@32", "algorithm": "gptq"}, {"scheme": "FP8"}):
        with pytest.raises(DataError, match="calibration text can't be tokenized"):
            octavo.quantize(model, tmp_path / "more", evaluate=False, **options)


def test_an_effort_and_an_algorithm_are_one_too_many(fixtures: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--effort best chooses an algorithm, and gptq is one"):
        octavo.quantize(fixtures / "tiny", tmp_path / "out", scheme="W4A16@32", algorithm="gptq", effort="best")


@pytest.mark.parametrize("given", [True, False])
def test_windows_are_no_longer_than_the_model_reads(fixtures: Path, tmp_path: Path, text: Path, given: bool) -> None:
    """512 tokens by default, or as many positions as there are, and the report says so. As asked, more are refused."""
    model = tmp_path / "model"
    shutil.copytree(fixtures / "tiny", model, ignore=shutil.ignore_patterns("expected.safetensors"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    options = {"scheme": "W4A16@32", "algorithm": "gptq", "evaluate": False, "num_calibration_samples": 16}
    options["data"] = str(text) if given else None
    report = octavo.quantize(model, tmp_path / "out", **options)
    assert report.calibration is not None
    assert "16 samples of 64 tokens" in report.calibration.source
    assert report.warnings == ("windows of calibration text have 64 tokens, not 512: the model has no more positions",)
    asked = octavo.quantize(model, tmp_path / "asked", max_seq_length=64, **options)
    assert asked.warnings == ()
    assert asked.calibration == report.calibration
    with pytest.raises(QuantizeError, match="--max-seq-length 65: the model has 64 positions; 64 works"):
        octavo.quantize(model, tmp_path / "more", max_seq_length=65, **options)
