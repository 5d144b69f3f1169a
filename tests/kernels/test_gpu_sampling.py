"""The sampling kernels against the reference: which tokens are kept, which one is drawn, and what changes logits."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.sampling import reference
from octavo.kernels.sampling.gpu.change import add_biases, forbid, punish
from octavo.kernels.sampling.gpu.draw import _exp, _weigh, draw

INF = float("inf")
OFF = (1.0, 0, 1.0, 0.0)  # temperature, top_k, top_p, min_p
CASES = [
    OFF,
    (0.7, 0, 0.9, 0.0),
    (1.3, 20, 1.0, 0.0),
    (1.0, 700, 0.8, 0.0),
    (1.0, 0, 1.0, 0.05),
    (2.0, 100, 0.95, 0.01),
    (1.0, 1, 1.0, 0.0),
    (1.0, 0, 0.0, 0.0),
    (5.0, 0, 0.999, 0.0),
    (1.0, 10_000, 0.5, 1.0),
    (3.0, 0, 1 - 2**-24, 0.0),
]


@triton.jit
def exponentials(x, out, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, _exp(tl.load(x + at)))


@triton.jit
def weights(logits, row, out, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, _weigh(tl.load(logits + at), tl.load(row), tl.load(row + 1)))


def parameters(cases: list[tuple[float, int, float, float]], device: torch.device) -> list[Tensor]:
    temperature, top_k, top_p, min_p = zip(*cases, strict=True)
    floats = [torch.tensor(column, dtype=torch.float32, device=device) for column in (temperature, top_p, min_p)]
    return [floats[0], torch.tensor(top_k, device=device), *floats[1:]]


def adversarial(vocab: int) -> Tensor:
    """Rows [9, vocab] at which a search may stumble."""
    x = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab))
    lonely = torch.full((vocab,), -INF)
    lonely[vocab // 2] = -1e30
    return torch.stack(
        [
            x * 3,
            (x * 2).bfloat16().float(),  # many ties
            torch.full((vocab,), 2.5),
            torch.where(x > 0, x, -INF),
            x * 1e30,
            lonely,  # one token
            torch.where(torch.arange(vocab) % 2 == 0, 3.0, 1.0),  # two values
            x * 1e-6 + 40,  # a few float32 steps apart
            torch.linspace(-120, 0, vocab),  # weights down to nothing
        ]
    )


def unit_of(x: Tensor) -> Tensor:
    """Of float32's last place, at normal numbers."""
    return torch.exp2(x.log2().floor() - 23)


def test_the_exponential_is_off_by_two_units_of_the_last_place(device: torch.device) -> None:
    """It was by 1.01 at the most, and by 0.97 where an fma rounds twice, as in some interpreters of Triton."""
    x = torch.cat([torch.linspace(-87, 0, 3 << 16), -torch.logspace(-30, 6, 1 << 16, base=2)]).to(device)
    got = torch.full_like(x, torch.nan)
    exponentials[(64,)](x, got, BLOCK=1 << 12)
    truth = x.double().exp()
    assert bool(((got.double() - truth).abs() <= 2 * unit_of(truth)).all())
    assert bool((got[x == 0] == 1).all())


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7, 1e3])
def test_weights_are_exponentials_of_what_lies_under_the_peak(temperature: float, device: torch.device) -> None:
    """A difference and a quotient are rounded: 2^-24 of the exponent each. Below -87 there is nothing."""
    row = torch.tensor([3.7, temperature], device=device)
    logits = row[0] + row[1] * torch.linspace(-100, 0, 1 << 15, device=device)
    logits[0] = -INF
    got = torch.full_like(logits, torch.nan)
    weights[(8,)](logits, row, got, BLOCK=1 << 12)
    x = (logits.double() - row[0].double()) / row[1].double()
    truth = x.exp()
    limit = 2 * unit_of(truth) + truth * (-x * 2.0**-23).expm1()
    assert bool(torch.where(x > -87, (got.double() - truth).abs() <= limit, got == 0).all())
    assert got[-1] == 1


def kept_by_reference(logits: Tensor, case: tuple[float, int, float, float]) -> Tensor:
    """Which tokens of rows [R, vocab] the reference keeps."""
    temperature, *cuts = parameters([case] * len(logits), logits.device)
    exponents = (logits - logits.amax(dim=-1, keepdim=True)) / temperature.unsqueeze(1)
    weights = torch.where(exponents > -87, exponents.exp(), 0)  # where the kernel and the CPU's body stop
    return (weights >= reference.least_weight(weights, *cuts).unsqueeze(1)) & (weights > 0)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("vocab", [5, 5000])
def test_the_tokens_kept_are_the_reference_s(
    case: tuple[float, int, float, float], vocab: int, device: torch.device
) -> None:
    """A uniform number of 0 draws the first token that is kept: the least of those, put first; not the best other."""
    logits = adversarial(vocab)[CASES.index(case) % 3 :: 3]  # the interpreter is slow; all pairs were right once
    kept = kept_by_reference(logits, case)
    rows, expected = [], []
    for row, keep in zip(logits, kept, strict=True):
        for place in (torch.where(keep, row, INF).argmin(), torch.where(keep, -INF, row).argmax()):
            probe, mask = row.clone(), keep.clone()
            probe[0], probe[place] = row[place], row[0]
            mask[0], mask[place] = keep[place], keep[0]
            rows.append(probe)
            expected.append(int(mask.int().argmax()))
    uniforms = torch.zeros(len(rows), dtype=torch.float64, device=device)
    tokens = draw(torch.stack(rows).to(device), *parameters([case] * len(rows), device), uniforms)
    assert tokens.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [300, 9000])
def test_it_draws_what_the_specification_draws(vocab: int, dtype: torch.dtype, device: torch.device) -> None:
    """The same token, unless a uniform number falls between the two roundings of a boundary: none of these does."""
    generator = torch.Generator().manual_seed(vocab)
    cases = CASES
    logits = (torch.randn(len(cases), vocab, generator=generator) * 3).to(dtype)
    uniforms = torch.rand(len(cases), dtype=torch.float64, generator=generator).to(device)
    own = parameters(cases, device)
    expected = reference.draw(logits.float().to(device), *own, uniforms)
    assert torch.equal(draw(logits.to(device), *own, uniforms), expected)
    one = slice(3, 4)  # alone in a batch
    alone = draw(logits[one].to(device), *(p[one] for p in own), uniforms[one])
    assert torch.equal(alone, expected[one])


@pytest.mark.parametrize("value", [0.0, 1 - 2**-53, 1.0])
@pytest.mark.parametrize("case", [OFF, (1.0, 5, 0.99, 0.0)], ids=str)
def test_the_ends_of_the_unit_interval(
    value: float, case: tuple[float, int, float, float], device: torch.device
) -> None:
    logits = torch.full((3, 700), -INF, device=device)
    logits[0, 300] = logits[0, 301] = logits[1, 0] = logits[2, 699] = 1.5
    uniforms = torch.full((3,), value, dtype=torch.float64, device=device)
    tokens = draw(logits, *parameters([case] * 3, device), uniforms)
    assert tokens.tolist() == [300 if value == 0 else 301, 0, 699]


def test_greedy_rows_and_rows_without_a_token(device: torch.device) -> None:
    logits = torch.randn(6, 600, generator=torch.Generator().manual_seed(3)).to(device)
    logits[0, 77] = logits[0, 78] = 9.0
    logits[1, 5], logits[2, 5] = torch.nan, INF
    logits[3] = -INF
    logits[4, 500] = 1e-9 + logits[4].max()
    uniforms = torch.full((6,), 0.9, dtype=torch.float64, device=device)
    greedy = draw(logits, *parameters([(0.0, 50, 0.5, 0.0)] * 6, device), uniforms)
    best = logits.argmax(dim=-1).tolist()
    assert greedy.tolist() == [77, -1, -1, -1, best[4], best[5]]
    assert draw(logits, *parameters([OFF] * 6, device), uniforms).tolist()[1:4] == [-1, -1, -1]


def test_no_rows_are_no_launch(device: torch.device) -> None:
    none = torch.ones(0, device=device)
    assert draw(torch.ones(0, 50, device=device), none, none.long(), none, none, none.double()).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [1, 31, 32, 1000])
def test_what_a_grammar_forbids(vocab: int, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(5, vocab, generator=generator).to(dtype).to(device)
    rows = torch.tensor([3, 0, 4], device=device)
    bits = torch.randint(-(2**31), 2**31, (3, -(-vocab // 32)), generator=generator).int().to(device)
    bits[1] = 0
    bits[2] = -1
    expected = logits.clone()
    reference.forbid(expected, rows, bits)
    forbid(logits, rows, bits)()
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_biases_and_penalties(dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(4)
    rows, vocab, count = 3, 1000, 300
    logits = (torch.randn(rows, vocab, generator=generator) * 3).to(dtype).to(device)
    flat = torch.randperm(rows * vocab, generator=generator)[:count].to(device)
    row, token = flat // vocab, flat % vocab
    counts = torch.randint(0, 4, (count,), generator=generator).to(device)
    biases = torch.randn(count, generator=generator).to(device)
    biases[::7] = -INF
    repetition, frequency, presence = (torch.rand(rows, generator=generator).to(device) + 0.5 for _ in range(3))

    expected = logits.float()
    reference.add_biases(expected, row, token, biases)
    expected = expected.to(dtype).float()
    reference.punish(expected, row, token, counts, repetition, frequency, presence)
    add_biases(logits, row, token, biases)()
    punish(logits, row, token, counts, repetition, frequency, presence)()
    # Four float32 roundings of numbers up to 16 (a GPU fuses one away), then one to the logits' type.
    torch.testing.assert_close(logits.float(), expected, rtol=torch.finfo(dtype).eps, atol=4 * 16 * 2**-24)
