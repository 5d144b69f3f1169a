"""Blocks of GGUF files in a CPU's kernels, and blocks of codebooks served and converted."""

from __future__ import annotations

import math
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_oracle import logits_of_numbers, random_blocks, write_gguf
from hf_oracle import make_hf
from safetensors.torch import load_file
from served import logits_of

from octavo.cli import main
from octavo.kernels.native import cpu_features
from octavo.quant.checkpoint import Checkpoint
from octavo.quant.formats.gguf import GGUFFormat
from octavo.quant.gguf.blocks import BLOCK_TYPES
from octavo.quant.hub import resolve_model
from octavo.quant.linear import make_linear
from octavo.quant.qparams import QuantizedWeight
from octavo.quant.super_blocks import factored
from octavo.quant.target import Target

INTEGERS = [name for name, block in BLOCK_TYPES.items() if block.integers is not None]
IN_BYTES = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M")
IN_FOUR_BITS = ("Q2_K", "Q3_K", "TQ1_0", "TQ2_0")
IN_MORE = {"IQ3_S": 5.5, "IQ3_XXS": 6.5, "IQ1_S": 5.5}
CPU = Target.of(torch.device("cpu"), torch.bfloat16)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", INTEGERS)
def test_a_cpu_holds_the_numbers_of_a_file_in_about_its_bytes(kind: str) -> None:
    """Exactly these numbers; integers that no layout has lie in the next wider one."""
    if not cpu_features.has_dot_products():
        pytest.skip("needs AVX-512 with BF16 and VNNI")
    block = BLOCK_TYPES[kind]
    raw = random_blocks(16 * 512 // block.columns, Kind[kind], np.random.default_rng(0))
    meaning = torch.from_numpy(gguf.quants.dequantize(raw, Kind[kind]).copy()).reshape(16, 512)
    linear = make_linear([GGUFFormat(kind).read({"blocks": torch.from_numpy(raw).reshape(16, -1)})], [None], CPU)
    (part,) = linear.parts
    assert not part.choice.kernel.dequantizes
    assert torch.equal(part.weight.unpack(), meaning)
    bits = {**dict.fromkeys(IN_BYTES, 9.2), **dict.fromkeys(IN_FOUR_BITS, 5.2), **IN_MORE}
    most = 16 * 512 * bits[kind] / 8 if kind in bits else 1.05 * raw.nbytes
    assert linear.weight_bytes <= most


def test_blocks_of_real_files(fixtures: Path) -> None:
    """Of each kind that llama-quantize made of SmolLM2 by importances: the gguf package's numbers, bit for bit."""
    held = load_file(fixtures / "gguf-blocks-of-llama-quantize.safetensors")
    assert held.keys() >= {"IQ4_XS", "IQ4_NL", "IQ3_S", "IQ2_XS"}
    for name, blocks in held.items():
        expected = torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), Kind[name]).copy())
        found = BLOCK_TYPES[name].decode(blocks)
        assert torch.equal(found.view(expected.shape).view(torch.int32), expected.view(torch.int32)), name


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("others", [0.0, 0.5])
def test_scales_that_are_no_numbers_are_no_products(value: float, others: float) -> None:
    values = torch.full((3, 8), others)
    values[1, 5] = value
    with pytest.raises(ValueError, match="no integers up to 127 times one float16"):
        factored(values, 127, 128, likely=(63, -128, 127))


def small_llama(directory: Path) -> Path:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 96, "num_hidden_layers": 1}
    make_hf("Llama", sizes).bfloat16().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", [Kind.IQ3_XXS, Kind.IQ1_M, Kind.TQ2_0])
def test_codebooks_are_served_and_converted(tmp_path: Path, kind: Kind) -> None:
    """Logits are transformers' of the very numbers; compressed-tensors holds them, too."""
    source = small_llama(tmp_path / "source")
    file = tmp_path / "x.gguf"
    meaning = write_gguf(source, file, "llama", kind)
    directory = resolve_model(str(file))
    ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    expected = logits_of_numbers(source, meaning, tmp_path / "plain", ids)
    torch.testing.assert_close(logits_of(directory, ids), expected, rtol=0, atol=1e-4)
    assert main(["convert", str(file), str(tmp_path / "ct"), "--format", "compressed-tensors"]) == 0
    converted = Checkpoint.open(tmp_path / "ct").linear("model.layers.0.mlp.down_proj")
    assert isinstance(converted, QuantizedWeight)
    assert torch.equal(converted.dequantize(), meaning["model.layers.0.mlp.down_proj.weight"])
