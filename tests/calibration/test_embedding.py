"""A quantized embedding: its numbers by compressed-tensors' code, its text by transformers', all else as without it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from quantize_runs import config_of, written
from safetensors.torch import load_file, save_file

import octavo
from octavo import LLM, SamplingParams
from octavo.calibration.layers import QuantizeError
from octavo.calibration.prepare import prepare
from octavo.calibration.recipe import Recipe, RecipeError
from octavo.cli import main
from octavo.offline.errors import EngineError
from octavo.quant.checkpoint import Checkpoint
from octavo.quant.dequantized import open_dequantized
from octavo.quant.model_files import CheckpointError
from octavo.quant.qparams import quantize_weight
from octavo.quant.scheme import PRESETS
from octavo.runtime.model.families.registry import LAYOUTS

NAME = "model.embed_tokens"
WEIGHT = f"{NAME}.weight"
UNTIED = "tiny"
TIED = "tiny-qwen2"


@pytest.fixture
def quantized(fixtures: Path, tmp_path: Path) -> Path:
    written(fixtures / UNTIED, tmp_path / "out", embedding="W8A16@32")
    return tmp_path / "out"


@pytest.mark.parametrize("bits", ["2", "3", "4", "8"])
def test_it_is_rounded_and_all_else_is_as_without(fixtures: Path, tmp_path: Path, bits: str) -> None:
    model = fixtures / UNTIED
    weight = load_file(model / "model.safetensors")[WEIGHT]
    plain = written(model, tmp_path / "plain")
    found = written(model, tmp_path / "out", embedding=f"W{bits}A16@32")
    others = {name: tensor for name, tensor in found.items() if not name.startswith(NAME)}
    assert others.keys() == plain.keys() - {WEIGHT}
    assert all(torch.equal(tensor, plain[name]) for name, tensor in others.items())
    scheme = prepare(model, tmp_path / "x", Recipe(f"W{bits}A16@32"), layouts=LAYOUTS).recipe.default
    search = "absmax" if bits == "8" else "mse"
    wanted = quantize_weight(weight, scheme, search, scale_dtype=weight.dtype).dequantize(weight.dtype)
    assert torch.equal(Checkpoint.open(tmp_path / "out").tensor(WEIGHT), wanted)


@pytest.mark.parametrize("scheme", ["W8A16@32", "W4A16@64", "W3A16@32", "W8A16@-1"])
def test_compressed_tensors_reads_the_same_table(fixtures: Path, tmp_path: Path, scheme: str) -> None:
    found = written(fixtures / UNTIED, tmp_path / "out", embedding=scheme)
    config = QuantizationConfig.model_validate(config_of(tmp_path / "out")["quantization_config"])
    theirs = next(group for group in config.config_groups.values() if group.targets == ["Embedding"])
    packer = BaseCompressor.get_value_from_registry("pack-quantized")
    stored = {name.removeprefix(f"{NAME}."): t for name, t in found.items() if name.startswith(NAME)}
    read = packer.decompress(stored, theirs)["weight"]
    assert torch.equal(read, Checkpoint.open(tmp_path / "out").tensor(WEIGHT))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize(("name", "how"), [(UNTIED, {}), (TIED, {}), (TIED, {"lm_head": "W4A16@32"})], ids=str)
def test_transformers_writes_the_same_text(fixtures: Path, tmp_path: Path, name: str, how: dict[str, Any]) -> None:
    """Of one scheme for all: 5.24 asks an embedding that isn't dense for its weight, and makes all layers dense by the
    scheme of the first ones.
    """
    out = tmp_path / "out"
    written(fixtures / name, out, embedding="W4A16@32", **how)
    prompt = list(range(5, 25))
    dense = transformers.CompressedTensorsConfig(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, quantization_config=dense)
    ids = theirs.generate(torch.tensor([prompt]), max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=0)
    llm = LLM(str(out), dtype="float32")
    sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    (answer,) = llm.generate([{"prompt_token_ids": prompt}], sampling)
    assert list(answer.outputs[0].token_ids) == ids[0, len(prompt) :].tolist()


def test_a_tied_head_keeps_its_numbers(fixtures: Path, tmp_path: Path) -> None:
    found = written(fixtures / TIED, tmp_path / "out", embedding="W4A16@32")
    assert torch.equal(found["lm_head.weight"], load_file(fixtures / TIED / "model.safetensors")[WEIGHT])
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    assert config_of(tmp_path / "out")["quantization_config"]["ignore"] == ["lm_head"]


@pytest.mark.parametrize("target", [NAME, "re:.*embed_tokens$", "Embedding"])
def test_a_config_may_name_it_in_any_way(quantized: Path, target: str) -> None:
    config = config_of(quantized)
    groups = config["quantization_config"]["config_groups"]
    group = next(group for group in groups.values() if group["targets"] == ["Embedding"])
    wanted = Checkpoint.open(quantized).tensor(WEIGHT)
    group["targets"] = [target]
    (quantized / "config.json").write_text(json.dumps(config))
    assert torch.equal(Checkpoint.open(quantized).tensor(WEIGHT), wanted)
    assert NAME in Checkpoint.open(quantized).notes[0]


def test_a_config_that_does_not_name_it_is_refused(quantized: Path) -> None:
    """Its linear layers' scheme isn't its own, even where that would fit."""
    config = config_of(quantized)
    groups = config["quantization_config"]["config_groups"]
    config["quantization_config"]["config_groups"] = {"group_0": groups["group_0"] | {"targets": ["Linear"]}}
    (quantized / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"weight_packed.*doesn't say that model\.embed_tokens is quantized"):
        Checkpoint.open(quantized).tensor(WEIGHT)
    with pytest.raises(EngineError, match=r"doesn't say that model\.embed_tokens is quantized"):
        LLM(str(quantized))


def test_a_table_of_another_shape_is_refused(quantized: Path) -> None:
    tensors = load_file(quantized / "model.safetensors")
    tensors[f"{NAME}.weight_packed"] = tensors[f"{NAME}.weight_packed"][:, :-1].contiguous()
    save_file(tensors, quantized / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens: weight_packed"):
        Checkpoint.open(quantized).tensor(WEIGHT)


def test_as_a_source_it_is_the_table_that_it_stands_for(quantized: Path) -> None:
    wanted = Checkpoint.open(quantized).tensor(WEIGHT)
    source = open_dequantized(quantized, LAYOUTS)
    assert source.quantization is None
    assert torch.equal(source.tensor(WEIGHT), wanted)


def test_blocks_are_calibrated_on_what_it_gives(fixtures: Path, tmp_path: Path) -> None:
    """Rounded to four bits, it gives the first block other inputs, and so GPTQ other codes."""
    ids = [torch.arange(5, 69)] * 2
    how = {"scheme": "W4A16@32", "algorithm": "gptq", "data": ids, "evaluate": False}
    octavo.quantize(fixtures / UNTIED, tmp_path / "plain", **how)
    octavo.quantize(fixtures / UNTIED, tmp_path / "out", embedding="W2A16@32", **how)
    rounded = tmp_path / "rounded"
    shutil.copytree(fixtures / UNTIED, rounded)
    tensors = load_file(rounded / "model.safetensors")
    tensors[WEIGHT] = Checkpoint.open(tmp_path / "out").tensor(WEIGHT).clone()
    save_file(tensors, rounded / "model.safetensors", metadata={"format": "pt"})
    octavo.quantize(rounded, tmp_path / "wanted", **how)
    found, plain, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain", "wanted"))
    codes = [name for name in plain if name.endswith("weight_packed")]
    assert all(torch.equal(found[name], wanted[name]) for name in codes)
    assert not all(torch.equal(found[name], plain[name]) for name in codes)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"embedding": "W8A8"}, "embedding: .* is not of symmetric integers alone, .*; W8A16 works"),
        ({"embedding": "FP8_DYNAMIC"}, "embedding: .* is not of symmetric integers alone"),
        ({"embedding": "NVFP4A16"}, "embedding: .* is not of symmetric integers alone"),
        ({"embedding": "W4A16_ASYM"}, "embedding: .* is not of symmetric integers alone"),
        ({"embedding": "W4A16", "format": "gptq"}, "embedding: octavo writes none in format gptq"),
        (
            {"embedding": "W4A16@32", "ignore": ("re:.*(o_proj|embed_tokens)",)},
            "--embedding quantizes model.embed_tokens, and --ignore",
        ),
    ],
    ids=str,
)
def test_what_can_t_be_done_is_refused(fixtures: Path, tmp_path: Path, how: dict[str, Any], says: str) -> None:
    with pytest.raises((QuantizeError, RecipeError), match=says):
        prepare(fixtures / UNTIED, tmp_path / "out", Recipe("W4A16@32", **how), layouts=LAYOUTS)
    assert not (tmp_path / "out").exists()


def test_presets_are_of_the_engines_that_look_them_up() -> None:
    """vLLM's CompressedTensorsEmbeddingWNA16Int: integers of 2 to 8 bits, symmetric, in groups or a row."""
    taken = {name for name, scheme in PRESETS.items() if _is_taken(Recipe, name) and scheme.activation is None}
    assert taken == {"W2A16", "W3A16", "W4A16", "W8A16"}


def _is_taken(make: Any, name: str) -> bool:
    try:
        make("W4A16", embedding=name)
    except RecipeError:
        return False
    return True


def test_inspect_tells_what_is_decoded(quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(quantized)]) == 0
    assert f"{NAME} is stored as int8/g32, and decoded when it is loaded" in capsys.readouterr().out
