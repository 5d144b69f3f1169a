"""A quantized head: its numbers by compressed-tensors' own code, its text by transformers', all else as without it."""

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
from octavo.quant.checkpoint import Checkpoint
from octavo.quant.qparams import QuantizedWeight, quantize_weight
from octavo.runtime.model.families.registry import LAYOUTS

SCHEMES = ["W8A16@64", "W4A16@32", "W8A8", "FP8_DYNAMIC", "NVFP4A16"]
EMBEDDING = "model.embed_tokens.weight"
TIED = "tiny-qwen2"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["tiny", TIED])
def test_the_head_is_rounded_and_all_else_is_as_without(fixtures: Path, tmp_path: Path, name: str, scheme: str) -> None:
    """A tied one is the embedding rounded, which is bit for bit what it was."""
    model = fixtures / name
    source = load_file(model / "model.safetensors")
    weight = source["lm_head.weight" if name == "tiny" else EMBEDDING]
    plain = written(model, tmp_path / "plain")
    found = written(model, tmp_path / "out", lm_head=scheme)
    others = {name: tensor for name, tensor in found.items() if not name.startswith("lm_head.")}
    assert others.keys() == plain.keys() - {"lm_head.weight"}
    assert all(torch.equal(tensor, plain[name]) for name, tensor in others.items())
    own = Checkpoint.open(tmp_path / "out").linear("lm_head")
    assert isinstance(own, QuantizedWeight)
    search = "mse" if own.scheme.weight.bits < 8 else "absmax"
    wanted = quantize_weight(weight, own.scheme, search, scale_dtype=weight.dtype).dequantize()
    assert torch.equal(own.dequantize(), wanted)
    config = config_of(tmp_path / "out")
    assert config["tie_word_embeddings"] is False
    assert config["quantization_config"]["ignore"] == []


@pytest.mark.parametrize("scheme", ["W8A16@64", "W4A16@32"])
def test_compressed_tensors_reads_the_same_weight(fixtures: Path, tmp_path: Path, scheme: str) -> None:
    found = written(fixtures / TIED, tmp_path / "out", lm_head=scheme)
    config = QuantizationConfig.model_validate(config_of(tmp_path / "out")["quantization_config"])
    theirs = next(group for group in config.config_groups.values() if group.targets in (["lm_head"], ["Linear"]))
    packer = BaseCompressor.get_value_from_registry("pack-quantized")
    stored = {name.removeprefix("lm_head."): t for name, t in found.items() if name.startswith("lm_head.")}
    own = Checkpoint.open(tmp_path / "out").linear("lm_head")
    assert isinstance(own, QuantizedWeight)
    read = packer.decompress(stored, theirs)["weight"]
    torch.testing.assert_close(read.float(), own.dequantize(read.dtype).float(), rtol=0, atol=0)


@pytest.mark.parametrize("scheme", ["W4A16@32", "W8A8"])
def test_transformers_writes_the_same_text(fixtures: Path, tmp_path: Path, scheme: str) -> None:
    out = tmp_path / "out"
    written(fixtures / TIED, out, lm_head=scheme)
    prompt = list(range(5, 25))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = theirs.generate(torch.tensor([prompt]), max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=0)
    llm = LLM(str(out), dtype="float32")
    sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    (answer,) = llm.generate([{"prompt_token_ids": prompt}], sampling)
    assert list(answer.outputs[0].token_ids) == ids[0, len(prompt) :].tolist()


def test_a_head_beside_a_text_model_has_its_name(fixtures: Path, tmp_path: Path) -> None:
    """Of models that see, which keep their decoder below language_model."""
    model = tmp_path / "model"
    shutil.copytree(fixtures / TIED, model)
    tensors = {f"language_model.{name}": t for name, t in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    config = config_of(model)
    (model / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": config}))
    found = written(model, tmp_path / "out", lm_head="W8A8")
    assert "language_model.lm_head.weight_scale" in found
    config = config_of(tmp_path / "out")
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False


def test_a_tied_head_that_is_stored_too_is_the_embedding(fixtures: Path, tmp_path: Path) -> None:
    """As transformers takes it, whatever is stored."""
    model = tmp_path / "model"
    shutil.copytree(fixtures / TIED, model)
    tensors = load_file(model / "model.safetensors")
    other = torch.ones_like(tensors[EMBEDDING])
    save_file(tensors | {"lm_head.weight": other}, model / "model.safetensors", metadata={"format": "pt"})
    found = written(model, tmp_path / "out", lm_head="W8A8")
    plain = written(fixtures / TIED, tmp_path / "plain", lm_head="W8A8")
    assert torch.equal(found["lm_head.weight"], plain["lm_head.weight"])


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"lm_head": "FP8"}, "lm_head: .* has scales of inputs, for which measured inputs would be needed"),
        (
            {"lm_head": "W4A16", "format": "gptq"},
            "lm_head: octavo writes none in format gptq; compressed-tensors works",
        ),
        ({"lm_head": "W9A16"}, "scheme 'W9A16' is unknown"),
        ({"lm_head": "W4A16@128", "ignore": ("lm_head",)}, "--lm-head quantizes lm_head, and --ignore lm_head leaves"),
        ({"lm_head": "W4A16@-1", "ignore": ("re:.*head",)}, "--lm-head quantizes lm_head, and --ignore"),
    ],
    ids=str,
)
def test_what_can_t_be_done_is_refused(fixtures: Path, tmp_path: Path, how: dict[str, Any], says: str) -> None:
    with pytest.raises((QuantizeError, RecipeError), match=says):
        prepare(fixtures / TIED, tmp_path / "out", Recipe("W4A16@32", **how), layouts=LAYOUTS)
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_head_is_refused(fixtures: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(fixtures / TIED, model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.words.weight"] = tensors.pop(EMBEDDING)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QuantizeError, match=r"no lm_head\.weight of its own, and none of what is called embed_tokens"):
        prepare(model, tmp_path / "out", Recipe("W4A16@32", lm_head="W8A8"), layouts=LAYOUTS)


def test_rotations_and_the_head_go_together(fixtures: Path, tmp_path: Path) -> None:
    """R1 gives the head its own weight, in which the last norm's stands; it is that one which is rounded."""
    how = {"scheme": "W8A16@32", "algorithm": "rtn", "rotations": ("R1",), "evaluate": False}
    octavo.quantize(fixtures / TIED, tmp_path / "plain", **how)
    octavo.quantize(fixtures / TIED, tmp_path / "out", lm_head="W8A16@32", **how)
    weight = load_file(tmp_path / "plain" / "model.safetensors")["lm_head.weight"]
    own = Checkpoint.open(tmp_path / "out").linear("lm_head")
    assert isinstance(own, QuantizedWeight)
    wanted = quantize_weight(weight, own.scheme, "absmax", scale_dtype=weight.dtype)
    assert torch.equal(own.dequantize(), wanted.dequantize())
