"""The quality measure, on models whose answer is known and against a second, straightforward calculation."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.calibration.verify import (
    KL_EDGES,
    BlockNoise,
    BlockSnr,
    Comparison,
    Likelihood,
    NotFiniteError,
    Quality,
    added_noise,
    held_out_text,
    windows,
)

VOCAB = 11


def rows(probabilities: list[float], count: int) -> Tensor:
    """The same distribution everywhere: logits [count, vocab]."""
    return torch.tensor([math.log(p) if p else -math.inf for p in probabilities]).expand(count, -1)


def compare(token_windows: list[Tensor], before: list[Tensor], after: list[Tensor]) -> Quality:
    comparison = Comparison()
    for token_ids, one, other in zip(token_windows, before, after, strict=True):
        comparison.add(token_ids, one, other)
    return comparison.result("text", 100)


def test_windows_cover_the_text_once() -> None:
    ids = list(range(10))
    cut = windows(ids, 5, prefix=[99])
    assert [w.tolist() for w in cut] == [[99, 0, 1, 2, 3], [99, 4, 5, 6, 7], [99, 8, 9]]
    assert [w.tolist() for w in windows([1, 2, 3], 2)] == [[1, 2]]  # one token predicts nothing


def test_a_model_agrees_with_itself() -> None:
    token_windows = windows(list(range(VOCAB)) * 20, 100)
    logits = [torch.randn(len(ids), VOCAB, generator=torch.Generator().manual_seed(1)) for ids in token_windows]
    quality = compare(token_windows, logits, logits)
    assert quality.num_tokens == 217
    assert quality.mean_kl == quality.p99_kl == 0
    assert quality.top1_agreement == 1
    assert quality.perplexity_change == 0
    assert quality.kl_histogram == (217,) + (0,) * len(KL_EDGES)


def test_known_distributions_give_known_numbers() -> None:
    """Always 1/2, 1/4, 1/4 against always 1/4, 1/2, 1/4: KL = ln(2) / 2 - ln(2) / 4, and never the same top token."""
    ids = [torch.zeros(150).long()]
    quality = compare(ids, [rows([0.5, 0.25, 0.25], 150)], [rows([0.25, 0.5, 0.25], 150)])
    assert quality.num_tokens == 149
    assert quality.perplexity_before == pytest.approx(2, rel=1e-6)
    assert quality.perplexity_after == pytest.approx(4, rel=1e-6)
    assert quality.mean_kl == pytest.approx(math.log(2) / 4, rel=1e-6)
    assert quality.top1_agreement == 0
    place = next(i for i, edge in enumerate(KL_EDGES) if edge > math.log(2) / 4)
    assert quality.kl_histogram[place] == 149


def test_a_straightforward_calculation_finds_the_same() -> None:
    """One position after the other, in numpy's float64, over windows longer and shorter than what is done at a time."""
    rng = np.random.default_rng(0)
    token_windows = [torch.from_numpy(rng.integers(0, VOCAB, n)) for n in (150, 65, 2)]
    before = [rng.normal(size=(len(ids), VOCAB)).astype(np.float32) * 3 for ids in token_windows]
    after = [logits + rng.normal(size=logits.shape).astype(np.float32) * 0.3 for logits in before]
    kl, nll, same = [], [], []
    for ids, one, other in zip(token_windows, before, after, strict=True):
        for t in range(len(ids) - 1):
            p, q = (np.exp(x[t].astype(np.float64)) / np.exp(x[t].astype(np.float64)).sum() for x in (one, other))
            kl.append(sum(p[v] * (np.log(p[v]) - np.log(q[v])) for v in range(VOCAB)))
            nll.append((-np.log(p[ids[t + 1]]), -np.log(q[ids[t + 1]])))
            same.append(np.argmax(one[t]) == np.argmax(other[t]))
    quality = compare(token_windows, [torch.from_numpy(x) for x in before], [torch.from_numpy(x) for x in after])
    assert quality.num_tokens == len(kl) == 149 + 64 + 1
    assert quality.mean_kl == pytest.approx(np.mean(kl), rel=1e-12)
    ordered = sorted(kl)  # the 99th percentile lies between two of them, in proportion
    rank = 0.99 * (len(kl) - 1)
    below = ordered[int(rank)] + (rank % 1) * (ordered[int(rank) + 1] - ordered[int(rank)])
    assert quality.p99_kl == pytest.approx(below, rel=1e-12)
    assert quality.top1_agreement == np.mean(same)
    perplexities = np.exp(np.mean(nll, axis=0))
    assert (quality.perplexity_before, quality.perplexity_after) == pytest.approx(tuple(perplexities), rel=1e-12)
    assert sum(quality.kl_histogram) == len(kl)
    assert quality.kl_histogram[0] == sum(x < KL_EDGES[0] for x in kl)
    ends = (149, 149 + 64, 149 + 64 + 1)
    for window, begin, end in zip(quality.by_window, (0, *ends), ends, strict=False):
        assert window.num_tokens == end - begin
        assert window.kl == pytest.approx(sum(kl[begin:end]), rel=1e-12)
        both = (window.nll_before, window.nll_after)
        assert both == pytest.approx(tuple(np.sum(nll[begin:end], axis=0)), rel=1e-9)
        assert window.agreeing == sum(same[begin:end])
    assert len(quality.by_window) == 3


def test_one_model_alone_has_the_same_perplexity() -> None:
    logits, ids = torch.randn(90, VOCAB), torch.arange(90) % VOCAB
    likelihood = Likelihood()
    likelihood.add(ids, logits)
    assert likelihood.perplexity == compare([ids], [logits], [logits]).perplexity_before


def test_impossible_tokens_do_not_make_nan() -> None:
    """Padded vocabularies have logits of -inf on both sides."""
    logits = rows([0.5, 0.5, 0], 9)
    assert compare([torch.ones(9).long()], [logits], [logits]).mean_kl == 0


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([math.nan, 1.0], [0.5, 0.5], "original model gave NaN"),
        ([0.5, 0.5], [0.5, math.nan], "quantized model gave NaN"),
        ([0.5, 0.5], [math.inf, 0.5], "quantized model gave NaN or infinite"),
        ([1.0, 0], [0.5, 0.5], "original model gives a token of the text the probability 0"),
        ([0.5, 0.5], [0, 1.0], "quantized model gives the probability 0 to a token that the original may choose"),
    ],
)
def test_what_is_not_finite_is_an_error_with_a_name(before: list[float], after: list[float], message: str) -> None:
    with pytest.raises(NotFiniteError, match=message):
        compare([torch.ones(4).long()], [rows(before, 4)], [rows(after, 4)])


def test_no_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="no window"):
        Comparison().result("text", 100)


def test_snr_is_of_each_token_and_then_of_the_text() -> None:
    """A first token a thousand times as large does not hide what became of the others."""
    before = torch.tensor([[3000.0, 4000.0], [3.0, 4.0], [0.0, 2.0]])
    after = before + torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.0, 0.2]])  # noise / signal: 0, 0.01, 0.01
    noise = BlockNoise(2)
    for part in (slice(0, 2), slice(2, 3)):
        noise.add(0, before[part], before[part])
        noise.add(1, before[part], after[part])
    exact, noisy = noise.result()
    assert exact == BlockSnr(0, None)
    assert noisy.snr_db == pytest.approx(10 * math.log10(3 / 0.02), rel=1e-6)  # 0.2 is rounded to float32
    assert added_noise((exact, noisy)) == [(1, noisy.noise), (0, 0.0)]
    noise.add(0, before, before / 0)
    with pytest.raises(NotFiniteError, match="block 0"):
        noise.result()


def test_the_held_out_text_is_prose_of_a_useful_length() -> None:
    text = held_out_text()
    assert 12_000 < len(text) < 20_000
    assert text.isascii()


def test_calibration_does_not_import_the_runtime() -> None:
    code = (
        "import sys, octavo.calibration.verify, octavo.calibration.quantize_model, octavo.calibration.report.report\n"
    )
    code += "assert not [m for m in sys.modules if m.startswith('octavo.runtime')]"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
