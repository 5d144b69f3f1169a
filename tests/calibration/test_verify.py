"""The quality measure, on models whose answer is known."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from octavo.calibration.verify import held_out_text, measure, windows

VOCAB = 11


def fixed(logits: list[float]) -> Tensor:
    return torch.tensor(logits, dtype=torch.float32)


def test_windows_cover_the_text_once() -> None:
    ids = list(range(10))
    cut = windows(ids, 5, prefix=[99])
    assert [w.tolist() for w in cut] == [[99, 0, 1, 2, 3], [99, 4, 5, 6, 7], [99, 8, 9]]
    assert [w.tolist() for w in windows([1, 2, 3], 2)] == [[1, 2]]  # one token predicts nothing


def test_a_model_agrees_with_itself() -> None:
    def logits(ids: Tensor) -> Tensor:
        return torch.randn(len(ids), VOCAB, generator=torch.Generator().manual_seed(int(ids.sum())))

    quality = measure(logits, logits, windows(list(range(VOCAB)) * 20, 100))
    assert quality.num_tokens == 217
    assert quality.mean_kl == quality.p99_kl == 0
    assert quality.top1_agreement == 1
    assert quality.perplexity_before == quality.perplexity_after


def test_known_distributions_give_known_numbers() -> None:
    """Always 1/2, 1/4, 1/4 against always 1/4, 1/2, 1/4: KL = ln(2) / 2 - ln(2) / 4, and never the same top token."""
    p, q = fixed([math.log(x) for x in (0.5, 0.25, 0.25)]), fixed([math.log(x) for x in (0.25, 0.5, 0.25)])
    quality = measure(lambda ids: p.expand(len(ids), 3), lambda ids: q.expand(len(ids), 3), [torch.zeros(150).long()])
    assert quality.num_tokens == 149
    assert quality.perplexity_before == pytest.approx(2, rel=1e-6)
    assert quality.perplexity_after == pytest.approx(4, rel=1e-6)
    assert quality.mean_kl == pytest.approx(math.log(2) / 4, rel=1e-6)
    assert quality.top1_agreement == 0


def test_impossible_tokens_do_not_make_nan() -> None:
    """Padded vocabularies have logits of -inf on both sides."""
    row = fixed([0.0, 1.0, -math.inf])
    quality = measure(lambda ids: row.expand(len(ids), 3), lambda ids: row.expand(len(ids), 3), [torch.ones(9).long()])
    assert quality.mean_kl == 0


def test_nan_is_an_error() -> None:
    nan = torch.full((4, 3), math.nan)
    with pytest.raises(ValueError, match="NaN"):
        measure(lambda _: nan, lambda _: nan, [torch.zeros(4).long()])
    with pytest.raises(ValueError, match="no window"):
        measure(lambda _: nan, lambda _: nan, [])


def test_the_held_out_text_is_prose_of_a_useful_length() -> None:
    text = held_out_text()
    assert 12_000 < len(text) < 20_000
    assert text.isascii()


def test_calibration_does_not_import_the_runtime() -> None:
    code = "import sys, octavo.calibration.verify, octavo.calibration.quantize_model, octavo.calibration.report\n"
    code += "assert not [m for m in sys.modules if m.startswith('octavo.runtime')]"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
