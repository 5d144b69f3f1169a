"""`octavo quantize` of T5 and BART: the linear layers of both stacks are rounded, reloaded, and served."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_encdec
import torch
from forked_commands import forked_commands
from safetensors.torch import save_file
from slow_cases import slow
from tiny_encdec import PAD

from octavo.calibration.layers import QuantizeError
from octavo.jobs.quantize import quantize
from octavo.quant.checkpoint import Checkpoint
from octavo.quant.dequantized import open_dequantized
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.encdec import EncoderDecoder
from octavo.runtime.model.families.registry import LAYOUTS
from octavo.runtime.model.weights import load_model

TOKENS = [PAD, 5, 77, 40, 9]
SCHEMES = ["W8A16@32", "W8A8", "FP8_DYNAMIC", "W4A16@32", "NVFP4A16", "MXFP8"]
SHORT = ("W8A8", "W4A16@32")
ROUNDED_INPUTS = ("W8A8", "FP8_DYNAMIC", "MXFP8")
LINEARS = {"t5, FLAN's": 3 * 7 + 2 * 11, "bart": 2 * 6 + 3 * 10}  # of the encoder's layers, and of the decoder's


@pytest.fixture(scope="module", params=LINEARS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    directory = tmp_path_factory.mktemp("made")
    tiny_encdec.make(request.param, directory)
    return request.param, directory


def logits_of(directory: Path) -> torch.Tensor:
    model = load_model(EngineConfig(model=str(directory), dtype="float32", max_num_seqs=1))
    assert isinstance(model, EncoderDecoder)
    return tiny_encdec.computed(model, tiny_encdec.texts(1)[0], TOKENS)


@pytest.mark.parametrize("scheme", [scheme if scheme in SHORT else slow(scheme) for scheme in SCHEMES])
def test_both_stacks_are_quantized_and_served(scheme: str, made: tuple[str, Path], tmp_path: Path) -> None:
    """Logits are those of a plain checkpoint of what the codes stand for; where inputs are rounded too, near them."""
    name, directory = made
    out = tmp_path / "out"
    report = quantize(str(directory), out, scheme=scheme, algorithm="rtn")
    where = "quality was not measured: an encoder-decoder's shows in its answers"
    assert any(where in line for line in report.warnings)
    checkpoint = Checkpoint.open(out)
    rounded = {tensor.removesuffix(".weight_scale") for tensor in checkpoint.names if tensor.endswith(".weight_scale")}
    assert len(rounded) == LINEARS[name]
    assert not any(word in module for module in rounded for word in ("embed", "shared", "relative", "lm_head"))
    plain = tmp_path / "plain"
    plain.mkdir()
    stands_for = open_dequantized(out, LAYOUTS)
    save_file({tensor: stands_for.tensor(tensor).clone() for tensor in stands_for.names}, plain / "model.safetensors")
    (plain / "config.json").write_text((directory / "config.json").read_text())
    found = logits_of(out)
    expected = logits_of(plain)
    assert not torch.equal(expected, logits_of(directory))
    if scheme in ROUNDED_INPUTS:
        assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.98
    else:
        torch.testing.assert_close(found, expected, atol=3e-4, rtol=3e-4)


def test_what_learns_from_text_is_refused_by_name(made: tuple[str, Path], tmp_path: Path) -> None:
    for algorithm in ("gptq", "awq"):
        with pytest.raises(QuantizeError, match="has an encoder before its decoder; algorithm rtn"):
            quantize(str(made[1]), tmp_path / "out", scheme="W8A16", algorithm=algorithm)


def test_commands_say_what_it_is(made: tuple[str, Path]) -> None:
    _, directory = made
    commands = forked_commands()
    done = commands.run("inspect", str(directory), seconds=100)
    assert done.code == 0, done.stderr
    assert "reads a prompt with its encoder, and its decoder writes" in done.stdout
    measured = commands.run("eval", str(directory), seconds=100)
    assert measured.code != 0
    assert "quality is not measured here: an encoder-decoder's shows in its answers" in measured.stderr
