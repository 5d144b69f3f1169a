"""Quality through the serving path against transformers' own logits of the same two checkpoints."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from octavo.calibration.verify import held_out_text
from octavo.jobs.measured_text import QualityError
from octavo.jobs.quality import WINDOW, measure_quality, perplexity_of
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.device import Device

TOKENS = 700

# float32 logits of two implementations differ by 1e-5 at most here (tests/fixtures/README.md). KL's derivative by the
# logits is p (log(p / q) - KL) and q - p, whose absolute sums are below 1 and 2 where q is near p.
KL_ERROR = 3e-5


class Twin:
    """A checkpoint in transformers, float32: logits and the hidden states behind each block."""

    def __init__(self, directory: Path) -> None:
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self._hidden: list[Tensor] = []
        for block in self._model.model.layers:
            block.register_forward_hook(lambda *call: self._hidden.append(call[-1]))

    @torch.inference_mode()
    def run(self, token_ids: list[int]) -> tuple[np.ndarray, list[np.ndarray]]:
        self._hidden.clear()
        logits = self._model(torch.tensor([token_ids])).logits[0]
        return logits.double().numpy(), [(h[0] if h.dim() == 3 else h).double().numpy() for h in self._hidden]


def dequantized(directory: Path, out: Path) -> Path:
    """The W4A16 fixture as a dense checkpoint: eight nibbles to a word, low ones first, 8 added; groups of 32."""
    shutil.copytree(directory.parent / "tiny", out)
    tensors = load_file(directory / "model.safetensors")
    dense = {name: t.float() for name, t in tensors.items() if not name.endswith(("_packed", "_scale", "_shape"))}
    for name, words in tensors.items():
        if name.endswith(".weight_packed"):
            nibbles = torch.stack([(words >> shift) & 15 for shift in range(0, 32, 4)], dim=-1).flatten(1)
            scale = tensors[name.replace("_packed", "_scale")].float().repeat_interleave(32, dim=1)
            dense[name.removesuffix("_packed")] = (nibbles - 8).float() * scale
    save_file(dense, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_all_figures_equal_those_of_transformers_logits(fixtures: Path, tmp_path: Path) -> None:
    original, quantized = fixtures / "tiny", fixtures / "tiny--llmc-w4a16-g32"
    told: list[tuple[int, int, str]] = []
    quality = measure_quality(
        original, quantized, max_tokens=TOKENS, dtype="float32", progress=lambda *step: told.append(step)
    )
    tokenizer: Any = transformers.PreTrainedTokenizerFast.from_pretrained(original, model_max_length=10_000)
    ids = tokenizer(held_out_text())["input_ids"][:TOKENS]
    twins = Twin(original), Twin(dequantized(quantized, tmp_path / "dense"))
    kl, nll, same, noise = [], [], [], [[], []]
    for begin in range(0, TOKENS, WINDOW):
        window = ids[begin : begin + WINDOW]
        (one, states), (other, changed) = (twin.run(window) for twin in twins)
        log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (one, other))
        kl += list((np.exp(log_p) * (log_p - log_q)).sum(-1)[:-1])
        nll += [(-log_p[t, token], -log_q[t, token]) for t, token in enumerate(window[1:])]
        same += list(one.argmax(-1)[:-1] == other.argmax(-1)[:-1])
        for block, (h, g) in enumerate(zip(states, changed, strict=True)):
            noise[block] += list(((g - h) ** 2).sum(-1) / (h**2).sum(-1))
    assert quality.num_tokens == len(kl) == TOKENS - 3
    assert quality.mean_kl == pytest.approx(np.mean(kl), abs=KL_ERROR)
    assert quality.mean_kl > 100 * KL_ERROR  # so that the comparison says something
    assert quality.p99_kl == pytest.approx(np.quantile(kl, 0.99), abs=KL_ERROR * 3)  # where q is farther from p
    assert quality.top1_agreement == np.mean(same)
    expected = tuple(np.exp(np.mean(nll, axis=0)))
    assert (quality.perplexity_before, quality.perplexity_after) == pytest.approx(expected, rel=1e-5)
    # A relative error e of a state's difference moves its SNR by 8.7 e dB; 1e-5 of a state is 1e-4 of a difference.
    assert [block.snr_db for block in quality.blocks] == pytest.approx(
        [-10 * math.log10(np.mean(ratios)) for ratios in noise], abs=1e-2
    )
    assert told == [
        step
        for which in ("original", "quantized")
        for step in (*((n, 2, f"loading the {which}") for n in (0, 1, 2)), *((n, 3, which) for n in (1, 2, 3)))
    ]
    alone = perplexity_of(EngineConfig(model=str(quantized), dtype="float32"), max_tokens=TOKENS)
    assert alone.perplexity == quality.perplexity_after
    assert alone.num_tokens == quality.num_tokens


def test_layers_with_a_window_shorter_than_the_model_are_measured(fixtures: Path, tmp_path: Path) -> None:
    """A server gives such layers block tables of their own; here one sequence has all of its tokens in one table."""
    shutil.copytree(fixtures / "tiny", tmp_path / "gemma3")
    (tmp_path / "gemma3" / "model.safetensors").unlink()
    vocab_size = json.loads((fixtures / "tiny" / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.Gemma3TextConfig(
        **shape,
        vocab_size=vocab_size,
        head_dim=32,
        num_hidden_layers=2,
        sliding_window=24,
        max_position_embeddings=512,
        layer_types=["sliding_attention", "full_attention"],
    )
    transformers.Gemma3ForCausalLM(config).save_pretrained(tmp_path / "gemma3")
    measured = perplexity_of(EngineConfig(model=str(tmp_path / "gemma3"), dtype="float32"), max_tokens=WINDOW)
    tokenizer: Any = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "gemma3", model_max_length=10_000)
    ids = tokenizer(held_out_text())["input_ids"][:WINDOW]
    logits = Twin(tmp_path / "gemma3").run(ids)[0]
    expected = torch.nn.functional.cross_entropy(torch.from_numpy(logits[:-1]), torch.tensor(ids[1:])).exp()
    assert measured.perplexity == pytest.approx(float(expected), rel=1e-5)


def test_a_model_against_itself_loses_nothing(fixtures: Path) -> None:
    quality = measure_quality(fixtures / "tiny-qwen2", fixtures / "tiny-qwen2", max_tokens=300)
    assert quality.mean_kl == 0
    assert [block.snr_db for block in quality.blocks] == [None, None]


def test_a_cache_that_the_checkpoint_asks_for_is_measured_too(fixtures: Path, tmp_path: Path) -> None:
    """Without its KV scales the same FP8 checkpoint is closer to the original."""
    shutil.copytree(fixtures / "tiny--llmc-fp8-kv", tmp_path / "plain")
    plain = tmp_path / "plain"
    config = (plain / "config.json").read_text()
    assert '"kv_cache_scheme"' in config
    content = json.loads(config)
    content["quantization_config"]["kv_cache_scheme"] = None
    (plain / "config.json").write_text(json.dumps(content))
    tensors = load_file(plain / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if not name.endswith((".k_scale", ".v_scale"))}
    assert len(kept) < len(tensors)
    save_file(kept, plain / "model.safetensors", metadata={"format": "pt"})
    with_kv, without = (
        measure_quality(fixtures / "tiny", model, max_tokens=600) for model in (fixtures / "tiny--llmc-fp8-kv", plain)
    )
    assert with_kv.mean_kl > without.mean_kl
    assert with_kv.perplexity_before == without.perplexity_before


def test_inputs_are_rounded_as_the_checkpoint_says_whatever_the_gpu(fixtures: Path) -> None:
    """An A100 leaves them as they are when it serves fp8; measured is what other GPUs serve, and a CPU."""
    models = fixtures / "tiny", fixtures / "tiny--llmc-fp8-dynamic"
    on_cpu = measure_quality(*models, dtype="bfloat16", max_tokens=300)
    a100 = replace(Device.choose("cpu"), capability=80)
    assert measure_quality(*models, dtype="bfloat16", max_tokens=300, device=a100) == on_cpu


def test_a_file_is_the_text(fixtures: Path, tmp_path: Path) -> None:
    tiny, text = EngineConfig(model=str(fixtures / "tiny")), tmp_path / "text.txt"
    text.write_text(held_out_text())
    one, other = (perplexity_of(tiny, max_tokens=500, text=source) for source in (None, text))
    assert one.perplexity == other.perplexity
    assert (one.text, other.text) == ("octavo's held-out text", "text.txt")
    text.write_text(held_out_text()[::-1])
    assert perplexity_of(tiny, max_tokens=500, text=text).perplexity > 2 * one.perplexity


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "can't be read: No such file"), (b"", "has 0 tokens"), (b"ab\xff", "not UTF-8: byte 2 is 0xff")],
)
def test_a_text_that_is_none_is_refused(fixtures: Path, tmp_path: Path, content: bytes | None, message: str) -> None:
    tiny, text = EngineConfig(model=str(fixtures / "tiny")), tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    with pytest.raises(QualityError, match=message):
        perplexity_of(tiny, max_tokens=500, text=text)


def test_models_that_do_not_go_together_are_refused(fixtures: Path, tmp_path: Path) -> None:
    shutil.copytree(fixtures / "tiny", tmp_path / "shallow")
    config = json.loads((tmp_path / "shallow/config.json").read_text())
    (tmp_path / "shallow/config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    tensors = load_file(fixtures / "tiny/model.safetensors")
    kept = {name: t for name, t in tensors.items() if ".layers.1." not in name}
    save_file(kept, tmp_path / "shallow/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        QualityError, match=r"shallow \(llama, 1 layers of 128.*\) is no quantization of tiny \(llama, 2 layers"
    ):
        measure_quality(fixtures / "tiny", tmp_path / "shallow", max_tokens=300)


def test_a_disk_that_can_not_hold_the_logits_is_told_before(fixtures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte less than 300 tokens of 1,024 logits and 2 x 128 hidden numbers take."""
    needed = 4 * 300 * (1024 + 2 * 128)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(QualityError, match=r"over 300 tokens take 0\.00 GB and .* fewer tokens need less"):
        measure_quality(fixtures / "tiny", fixtures / "tiny", max_tokens=300)
