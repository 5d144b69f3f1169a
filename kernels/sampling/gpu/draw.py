"""Drawing tokens without a sort: thresholds on the bits of the weights, then a walk in the order of the vocabulary.

weight = exp((logit - peak) / temperature), 0 where that is under e^-87 (as the CPU's body has it); min-p, top-k, top-p
and the draw as `sampling.reference.draw` defines them: what equals the smallest weight kept is kept. Three launches:

peaks   the largest logit of each chunk of 256 tokens, all SMs at work
masses  the sum of each chunk's weights that min-p leaves, in float64
choose  a program for each row. The chunks alone give a lower bound of the smallest weight to keep: for top-k the k-th
        largest of their largest weights, for top-p the weight at which their largest weights have the wanted mass.
        Weights that reach the bound are copied aside, in order; these are mostly some hundred tokens. A search by bits
        over them finds the threshold, and one walk over them draws the token. A row without top-k, top-p and min-p
        walks over the chunks' sums instead.

For the same weights, the kept set is the reference's. Weights differ from exp's by at most 2 units in the last place.
The k largest logits are kept whatever the rounding; but two logits so close that their weights round to one number may
be a tie here and none in the reference, or the other way round. top-p's sums are float64 in another order than the
reference's, which matters where a sum meets the target to 1e-12. A greedy row (temperature under 1e-5) takes the first
of the largest logits. A row with a NaN, with +inf, or with nothing but -inf has no token: -1.
Limit: bytes; each of the first two launches reads the logits, 4 bytes a token (2 in bf16), over 3.0 TB/s on an H100 or
L2's rate where they fit; `choose` reads again the tiles that have something to keep.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.launching import tuning
from octavo.kernels.launching.checks import expect
from octavo.kernels.launching.dependent_launch import await_previous
from octavo.kernels.launching.launch import Launch, cdiv, power_of_two
from octavo.kernels.launching.numerics import divided

CHUNK = 256  # tokens that share an entry of `peaks` and `masses`
_CHUNK = tl.constexpr(CHUNK)
_GREEDY_BELOW = tl.constexpr(1e-5)  # as in runtime/worker/sampling_ops.py
_ONE = tl.constexpr(0x3F800000)  # the bits of 1.0, the largest weight


@triton.jit
def _exp(x):
    """exp(x) for x in [-87, 0], to 2 units of the last place; 1 for 0. exp2.approx is off by up to 100 at -87."""
    n = (x * 1.44269504088896 + 12582912.0) - 12582912.0  # to the nearest integer
    r = tl.fma(n, -0.693145751953125, x)  # ln 2 in two parts; the first has few enough bits that n * it is exact
    r = tl.fma(n, -1.428606820309417e-06, r)
    p = tl.fma(r, 1.9875691500e-4, 1.3981999507e-3)
    p = tl.fma(p, r, 8.3334519073e-3)
    p = tl.fma(p, r, 4.1665795894e-2)
    p = tl.fma(p, r, 1.6666665459e-1)
    p = tl.fma(p, r, 5.0000001201e-1)
    p = tl.fma(p, r * r, r) + 1.0
    return p * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _weigh(logit, peak, temperature):
    """A greedy row has weight 1 for its largest logits and 0 for the others."""
    greedy = temperature < _GREEDY_BELOW
    t = tl.where(greedy, 1.0, tl.minimum(temperature, 1.0e30))
    half = tl.maximum(logit * 0.5, -1.7e38) - peak * 0.5  # halves don't overflow, and halving is exact
    x = divided(tl.maximum(half, -50.0 * t), 0.5 * t)
    weight = tl.where(x > -87.0, _exp(tl.maximum(x, -87.0)), 0.0)
    return tl.where(greedy, (logit == peak).to(tl.float32), weight)


@triton.jit
def _peaks(logits, peaks, vocab, chunks, ROWS: tl.constexpr, OVERLAPS: tl.constexpr):
    await_previous(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    at = c[:, None] * _CHUNK + tl.arange(0, _CHUNK)[None, :]
    x = tl.load(logits + row * vocab + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
    x = tl.where(x == x, x, float("inf"))  # so that a NaN is seen in the row's peak
    tl.store(peaks + row * chunks + c, tl.max(x, axis=1), mask=c < chunks)


@triton.jit
def _peak(peaks, row, chunks, CHUNKS: tl.constexpr):
    c = tl.arange(0, CHUNKS)
    highest = tl.load(peaks + row * chunks + c, mask=c < chunks, other=float("-inf"))
    peak = tl.max(highest)
    return highest, peak, (peak > float("-inf")) & (peak < float("inf"))


@triton.jit(do_not_specialize=["temperature", "min_p"])
def _masses(
    logits,
    peaks,
    temperature,
    min_p,
    masses,
    vocab,
    chunks,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    await_previous(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    _, peak, fine = _peak(peaks, row, chunks, CHUNKS)
    if fine:
        at = c[:, None] * _CHUNK + tl.arange(0, _CHUNK)[None, :]
        x = tl.load(logits + row * vocab + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        weight = _weigh(x, peak, tl.load(temperature + row))
        weight = tl.where(weight >= tl.minimum(tl.load(min_p + row), 1.0), weight, 0.0)
        tl.store(masses + row * chunks + c, tl.sum(weight.to(tl.float64), axis=1), mask=c < chunks)


@triton.jit
def _least_of(weight, worth, target):
    """The largest w such that the worth of the weights >= w reaches the target; 0 if none does. All in registers."""
    bits = weight.to(tl.int32, bitcast=True)
    found = tl.zeros((), tl.int32)
    for i in range(30):
        bit = found | (1 << (29 - i))
        found = tl.where(tl.sum(tl.where(bits >= bit, worth, 0.0)) >= target, bit, found)
    return tl.minimum(found, _ONE).to(tl.float32, bitcast=True)


@triton.jit
def _worth_from(kept, held, least, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """How many of the weights that were copied aside are >= least, or their sum."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, held, BLOCK):
        at = start + tl.arange(0, BLOCK)
        weight = tl.load(kept + at, mask=at < held, other=-1.0)
        if BY_MASS:
            total += tl.where(weight >= least, weight, 0.0).to(tl.float64)
        else:
            total += (weight >= least).to(tl.float64)
    return tl.sum(total)


@triton.jit
def _search(kept, held, target, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """`_least_of` over the weights that were copied aside."""
    found = tl.zeros((), tl.int32)
    for i in range(30):
        bit = found | (1 << (29 - i))
        reached = _worth_from(kept, held, bit.to(tl.float32, bitcast=True), BY_MASS, BLOCK) >= target
        found = tl.where(reached, bit, found)
    return tl.minimum(found, _ONE).to(tl.float32, bitcast=True)


@triton.jit
def _bound(highest, total, k, p, vocab):
    """A lower bound of the threshold of top-k, or else of top-p, from the chunks' largest weights."""
    bound = 0.0
    if k > 0:
        bound = _least_of(highest, (highest >= 0.0).to(tl.float32), k.to(tl.float32))
    elif p < 1.0:
        bound = _least_of(highest, highest.to(tl.float64), p.to(tl.float64) * total)
        # all weights under (1 - p) total / vocab together are less than the mass that top-p may cut off
        bound = tl.maximum(bound, ((1.0 - p.to(tl.float64)) * total / vocab * 0.999).to(tl.float32))
    return bound


@triton.jit
def _copy_aside(row_logits, row_peaks, peak, temperature, bound, kept, places, vocab, chunks, BLOCK: tl.constexpr):
    """Copy the weights >= bound and their tokens aside, in order; returns how many."""
    held = 0
    for start in range(0, vocab, BLOCK):
        c = start // _CHUNK + tl.arange(0, BLOCK // _CHUNK)
        high = tl.max(tl.load(row_peaks + c, mask=c < chunks, other=float("-inf")))
        if _weigh(high, peak, temperature) >= bound:
            at = start + tl.arange(0, BLOCK)
            x = tl.load(row_logits + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
            weight = _weigh(x, peak, temperature)
            keep = (weight >= bound) & (weight > 0.0)
            # others go to a place that nothing reads: a mask would go through shared memory byte by byte
            to = tl.where(keep, held + tl.cumsum(keep.to(tl.int32), axis=0) - 1, vocab)
            tl.store(kept + to, weight)
            tl.store(places + to, at)
            held += tl.sum(keep.to(tl.int32))
    tl.debug_barrier()  # other threads of the program read it
    return held


@triton.jit
def _walk(weights, held, least, target, BLOCK: tl.constexpr):
    """Index of the first entry where the sum of those >= least is above target; if none is, the last of them."""
    before = tl.zeros((), tl.float64)
    found = -1
    last = 0
    for start in range(0, held, BLOCK):
        at = start + tl.arange(0, BLOCK)
        weight = tl.load(weights + at, mask=at < held, other=0.0).to(tl.float64)
        weight = tl.where(weight >= least, weight, 0.0)
        reached = (before + tl.cumsum(weight, axis=0) > target) & (weight > 0.0)
        first = tl.min(tl.where(reached, at, 2147483647))
        found = tl.where((found < 0) & (first < 2147483647), first, found)
        last = tl.maximum(last, tl.max(tl.where(weight > 0.0, at, 0)))
        before += tl.sum(weight)
    return tl.where(found < 0, last, found)


@triton.jit
def _draw_kept(kept, places, held, k, p, min_p, total, uniform, BLOCK: tl.constexpr):
    """From the weights copied aside: top-k, then top-p of what it left, then the walk."""
    least = tl.minimum(min_p, 1.0)
    if k > 0:
        least = tl.maximum(least, _search(kept, held, k.to(tl.float64), False, BLOCK))
        total = _worth_from(kept, held, least, True, BLOCK)
    if p < 1.0:
        # weights under top-k's threshold don't count for top-p: those above have all of `total`, and come first
        least = tl.maximum(least, _search(kept, held, p.to(tl.float64) * total, True, BLOCK))
    total = _worth_from(kept, held, least, True, BLOCK)
    return tl.load(places + _walk(kept, held, least, uniform * total, BLOCK))


@triton.jit
def _draw_all(row_logits, row_masses, peak, temperature, total, uniform, kept, vocab, chunks, BLOCK: tl.constexpr):
    """Draw from all weights: walk over the chunks' sums to a chunk, then over its weights to a token."""
    target = uniform * total
    chunk = _walk(row_masses, chunks, 0.0, target, BLOCK)
    before = tl.zeros((), tl.float64)
    for start in range(0, chunk, BLOCK):
        c = start + tl.arange(0, BLOCK)
        before += tl.sum(tl.load(row_masses + c, mask=c < chunk, other=0.0))
    at = tl.arange(0, _CHUNK)
    x = tl.load(row_logits + chunk * _CHUNK + at, mask=chunk * _CHUNK + at < vocab, other=float("-inf"))
    tl.store(kept + at, _weigh(x.to(tl.float32), peak, temperature))
    tl.debug_barrier()
    held = tl.minimum(_CHUNK, vocab - chunk * _CHUNK)
    return chunk * _CHUNK + _walk(kept, held, 0.0, tl.maximum(target - before, 0.0), _CHUNK)


@triton.jit(do_not_specialize=["temperature", "top_k", "top_p", "min_p", "uniforms"])
def _choose(
    logits,
    peaks,
    masses,
    temperature,
    top_k,
    top_p,
    min_p,
    uniforms,
    kept,
    places,
    tokens,
    vocab,
    chunks,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    await_previous(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    highest, peak, fine = _peak(peaks, row, chunks, CHUNKS)
    t = tl.load(temperature + row)
    least = tl.load(min_p + row)
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    token = tl.full((), -1, tl.int32)
    if fine:
        greedy = t < _GREEDY_BELOW
        k = tl.where((k >= vocab) | greedy, 0, k)
        p = tl.where(greedy, 1.0, p)
        uniform = tl.where(greedy, 0.0, tl.load(uniforms + row))
        c = tl.arange(0, CHUNKS)
        total = tl.sum(tl.load(masses + row * chunks + c, mask=c < chunks, other=0.0))
        at = row * vocab
        aside = row * (chunks + 1) * _CHUNK
        if (k > 0) | (p < 1.0) | (least > 0.0) | greedy:
            weights = tl.where(c < chunks, _weigh(highest, peak, t), -1.0)
            bound = tl.maximum(tl.minimum(least, 1.0), _bound(weights, total, k, p, vocab))
            held = _copy_aside(
                logits + at, peaks + row * chunks, peak, t, bound, kept + aside, places + aside, vocab, chunks, BLOCK
            )
            token = _draw_kept(kept + aside, places + aside, held, k, p, least, total, uniform, BLOCK)
        else:
            token = _draw_all(
                logits + at, masses + row * chunks, peak, t, total, uniform, kept + aside, vocab, chunks, CHUNKS
            ).to(tl.int32)
    tl.store(tokens + row, token.to(tl.int64))


def launches(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniforms: Tensor,
    tokens: Tensor,
    scratch: tuple[Tensor, Tensor, Tensor, Tensor],
) -> tuple[Launch, Launch, Launch]:
    """A token for each row of logits [R, vocab], contiguous, float32, bf16 or fp16, into tokens [R] int64.

    temperature, top_p, min_p  [R] float32; top_k [R] int64 or int32; uniforms [R] float64; off: 0 for top_k, 1, 0
    scratch                    what `scratch` makes
    """
    rows, vocab = logits.shape
    peaks, masses, kept, places = scratch
    expect(
        logits=(logits, (rows, vocab)),
        temperature=(temperature, rows),
        top_k=(top_k, rows),
        top_p=(top_p, rows),
        min_p=(min_p, rows),
        uniforms=(uniforms, rows),
        tokens=(tokens, rows),
    )
    memory = max(rows, *(t.shape[0] for t in scratch))
    chunks, width = _widths(vocab)
    expect(
        peaks=(peaks, (memory, chunks)),
        masses=(masses, (memory, chunks)),
        kept=(kept, (memory, width)),
        places=(places, (memory, width)),
    )
    sizes = {"vocab": vocab, "chunks": chunks, "logits": logits, "peaks": peaks}
    first = tuning.choose("sampling chunks", rows, vocab, logits.element_size(), logits.device)
    last = tuning.choose("sampling choice", rows, vocab, logits.element_size(), logits.device)
    each = first.pop("rows")
    walked = last.pop("block")
    block = max(power_of_two(chunks), 16)
    grid = rows, cdiv(chunks, each)
    of_rows = {"temperature": temperature, "min_p": min_p, "masses": masses, "CHUNKS": block}
    return (
        Launch(_peaks, grid, {**sizes, "ROWS": each}, **first),
        Launch(_masses, grid, {**sizes, **of_rows, "ROWS": each}, **first),
        Launch(
            _choose,
            (rows,),
            {
                **sizes,
                **of_rows,
                "top_k": top_k,
                "top_p": top_p,
                "uniforms": uniforms,
                "kept": kept,
                "places": places,
                "tokens": tokens,
                "BLOCK": walked,
            },
            **last,
            num_stages=1,
        ),
    )


def scratch(rows: int, vocab: int, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for up to `rows` rows: peaks and masses of chunks, weights copied aside and their tokens.

    8 bytes for each logit, of which a row touches what it keeps; allocated, not initialized.
    """
    chunks, kept = _widths(vocab)
    return (
        torch.empty(rows, chunks, dtype=torch.float32, device=device),
        torch.empty(rows, chunks, dtype=torch.float64, device=device),
        torch.empty(rows, kept, dtype=torch.float32, device=device),
        torch.empty(rows, kept, dtype=torch.int32, device=device),
    )


def _widths(vocab: int) -> tuple[int, int]:
    """Chunks of a row, and what may be copied aside of it."""
    chunks = cdiv(vocab, CHUNK)
    return chunks, (chunks + 1) * CHUNK


def draw(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniforms: Tensor) -> Tensor:
    """`sampling.reference.draw`, for rows that may be greedy or have no token (-1) too."""
    rows, vocab = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    memory = scratch(rows, vocab, logits.device)
    for launch in launches(logits.contiguous(), temperature, top_k, top_p, min_p, uniforms, tokens, memory):
        launch()
    return tokens
