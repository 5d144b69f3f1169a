"""`octavo quantize` of Whisper: the linear layers of both stacks are rounded, reloaded, and served."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_whisper
import torch
from forked_commands import forked_commands

from octavo.calibration.layers import QuantizeError
from octavo.jobs.quantize import quantize
from octavo.kernels.attention.step import NewSource, SourceRows, StepInputs
from octavo.quant.checkpoint import Checkpoint
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.weights import load_model
from octavo.runtime.worker import kv_cache

TOKENS = [tiny_whisper.IDS["startoftranscript"], 5, 77, 140, 9]
LEAST = {
    "W8A16@32": 0.9999,
    "W8A8": 0.998,
    "FP8_DYNAMIC": 0.99,
    "W4A16@32": 0.97,
    "NVFP4A16": 0.97,
    "MXFP8": 0.99,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("whisper")
    tiny_whisper.make_whisper(made)
    return made


def logits_of(directory: Path, dtype: str = "float32") -> torch.Tensor:
    model = load_model(EngineConfig(model=str(directory), dtype=dtype, max_num_seqs=1))  # type: ignore[arg-type]
    caches = kv_cache.allocate(model, 1, 16, model.dtype)
    step = StepInputs.prefill([len(TOKENS)], 16, token_ids=TOKENS, logits_index=torch.arange(len(TOKENS)))
    heard = torch.randn(tiny_whisper.NUM_MELS, 2 * tiny_whisper.POSITIONS, generator=torch.Generator().manual_seed(0))
    return model.forward(
        replace(step, sources=SourceRows((0,), (tiny_whisper.POSITIONS,), (NewSource((0,), heard),))), caches
    )


@pytest.mark.parametrize("scheme", LEAST)
def test_whisper_is_quantized_and_served(scheme: str, directory: Path, tmp_path: Path) -> None:
    """Its logits are the original's, as far as the scheme's bits go."""
    out = tmp_path / "out"
    report = quantize(str(directory), out, scheme=scheme, algorithm="rtn")
    assert any("quality was not measured" in line for line in report.warnings)
    checkpoint = Checkpoint.open(out)
    rounded = [name.removesuffix(".weight_scale") for name in checkpoint.names if name.endswith(".weight_scale")]
    assert len(rounded) == 2 * 6 + 3 * 10  # of each layer, encoder and decoder
    assert not any("embed" in name or "conv" in name for name in rounded)
    assert "proj_out" in json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    truth = logits_of(directory)
    found = logits_of(out)
    assert torch.cosine_similarity(found.flatten(), truth.flatten(), dim=0) > LEAST[scheme]
    assert not torch.equal(found, truth)


def test_what_learns_from_text_is_refused_by_name(directory: Path, tmp_path: Path) -> None:
    for algorithm in ("gptq", "awq"):
        with pytest.raises(QuantizeError, match="hears, and is calibrated on no text; algorithm rtn"):
            quantize(str(directory), tmp_path / "out", scheme="W8A16", algorithm=algorithm)


def test_inspect_says_what_it_is(directory: Path) -> None:
    done = forked_commands().run("inspect", str(directory), seconds=100)
    assert done.code == 0, done.stderr
    assert "whisper writes down what it hears" in done.stdout
