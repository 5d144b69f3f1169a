"""Attention that rounds a token's whole row: bit for bit what one launch more makes of its plain output."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from attention_steps import make_cache, make_step
from backwards import backwards
from slow_cases import slow_if
from torch import Tensor

from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.gpu.arguments import Output
from octavo.kernels.attention.gpu.decode import decode, quantized_rows, split_count
from octavo.kernels.attention.gpu.rope_decode import rope_and_attention, rope_decode
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.fp8 import reference as fp8
from octavo.kernels.fp8.gpu.quantize import quantize
from octavo.kernels.int8 import reference as int8
from octavo.kernels.launching.last_block import counters_for
from octavo.kernels.launching.launch import Launch
from octavo.kernels.quantized_activation import ActivationQuant, QuantizedActivation

BF16, E4M3, INT8 = torch.bfloat16, torch.float8_e4m3fn, torch.int8
UNWRITTEN = 0x55
LENGTHS = [1, 90, 0, 37]  # a share, three, a graph's padding, two
HEADS = (9, 3, 64)  # query heads, KV heads, dimension
KERNELS = ("decode", "rope and decode")
CASES = [
    *((HEADS, form) for form in ("fp8", "int8", "fp8 groups", "moved")),
    *(((3, 1, 80), form) for form in ("fp8", "int8", "fp8 groups", "fp8 static")),
    *(((10, 2, 128), form) for form in ("fp8", "int8 static")),
    ((4, 2, 256), "fp8 moved"),
]
SECOND = {
    (HEADS, "fp8", "rope and decode"), (HEADS, "int8", "decode"), (HEADS, "fp8 groups", "rope and decode"),
    ((3, 1, 80), "fp8", "decode"), ((3, 1, 80), "fp8", "rope and decode"), ((3, 1, 80), "int8", "rope and decode"),
    ((3, 1, 80), "fp8 groups", "decode"), ((10, 2, 128), "fp8", "decode"),
}  # fmt: skip
"""Slow: the kernel rounds in that form with other heads, and these heads in another form."""
SPLITS = [
    {"block_n": 16, "min_split_tokens": 32, "max_splits": 3, "programs": 1 << 20},
    {"block_n": 16, "min_split_tokens": 32, "max_splits": 3, "programs": 4},  # listed
    {"block_n": 16, "min_split_tokens": 96, "max_splits": 3, "programs": 1 << 20},  # one for each
]
FORMS = {
    "fp8": ActivationQuant(E4M3),
    "int8": ActivationQuant(INT8),
    "fp8 groups": ActivationQuant(E4M3, 128),
    "fp8 static": ActivationQuant(E4M3, static_scale=torch.tensor([0.0037])),
    "int8 static": ActivationQuant(INT8, static_scale=torch.tensor([0.0037])),
    "fp8 moved": ActivationQuant(E4M3, column_permutation=torch.empty(0)),
    "moved": ActivationQuant(None, column_permutation=torch.empty(0)),
}


def wanted(name: str, columns: int, device: torch.device) -> ActivationQuant:
    """A form for rows of so many columns."""
    form = FORMS[name]
    stored = None if form.static_scale is None else form.static_scale.to(device)
    column_permutation = (
        None if form.column_permutation is None else torch.randperm(columns, dtype=torch.int32).to(device)
    )
    return replace(form, static_scale=stored, column_permutation=column_permutation)


def make(heads: tuple[int, int, int], device: torch.device) -> tuple[Tensor, StepInputs, LayerCache, AttentionShape]:
    """qkv of a decode step whose third sequence only fills it up."""
    torch.manual_seed(0)
    inputs = make_step([1] * len(LENGTHS), LENGTHS, 8, device)
    positions = (inputs.seq_lens.long() - 1).clamp(min=0)
    slots = inputs.block_tables.gather(1, (positions // 8)[:, None])[:, 0].long() * 8 + positions % 8
    inputs = replace(inputs, positions=positions, slot_mapping=slots.where(inputs.seq_lens > 0, -1))
    cache = make_cache(sum(-(-n // 8) for n in LENGTHS), heads[1], 8, heads[2], BF16, BF16, device)
    qkv = torch.randn(len(LENGTHS), (heads[0] + 2 * heads[1]) * heads[2]).to(device, BF16)
    return qkv, inputs, cache, AttentionShape(*heads, heads[2] ** -0.5)


def prepared(
    kernel: str,
    qkv: Tensor,
    inputs: StepInputs,
    cache: LayerCache,
    shape: AttentionShape,
    input_quant: ActivationQuant | None,
    **sizes: int,
) -> tuple[Launch, Tensor, QuantizedActivation]:
    """A launch, its plain rows [T, Hq D], and room for rounded ones; what isn't written can be told from what is.

    The room has a row more than is shown.
    """
    sequences, tokens, device = len(inputs.seq_lens), len(qkv), qkv.device
    heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    parts = split_count(
        inputs.max_seq_len, shape, min_split_tokens=sizes["min_split_tokens"], max_splits=sizes["max_splits"]
    )
    lse = torch.full((sequences, kv_heads, parts, heads // kv_heads), torch.nan, device=device)
    partial = torch.full((*lse.shape, dim), torch.nan, device=device)
    out = torch.full((tokens, heads, dim), torch.nan, dtype=BF16, device=device)
    into = QuantizedActivation.empty(tokens + 1, heads * dim, input_quant or ActivationQuant(None), device, BF16)
    into.codes.view(torch.uint8).fill_(UNWRITTEN)
    into = QuantizedActivation(into.codes[:tokens], into.scale.fill_(-1)[:tokens])
    output = Output(out, partial, lse, counters_for(sequences * (kv_heads + 1), device))
    more = {} if input_quant is None else {"into": into, "input_quant": input_quant}
    sizes["num_warps"] = 1  # 512 columns at a time: some of these rows are longer
    if kernel == "decode":
        q = qkv[:, : heads * dim].reshape(-1, heads, dim)
        return decode(q.contiguous(), inputs, cache, shape, output, **more, **sizes), out.flatten(1), into
    launch = rope_decode(qkv, inputs, cache, shape, None, None, None, 0.0, output, **more, **sizes)
    return launch, out.flatten(1), into


def run(
    kernel: str,
    qkv: Tensor,
    inputs: StepInputs,
    cache: LayerCache,
    shape: AttentionShape,
    input_quant: ActivationQuant | None,
    **sizes: int,
) -> tuple[Tensor, QuantizedActivation]:
    launch, out, into = prepared(kernel, qkv, inputs, cache, shape, input_quant, **sizes)
    launch()
    assert not bool(launch.arguments["output"].counters.any())
    return out, into


@cache
def not_rounded(kernel: str, heads: tuple[int, int, int], kv_splits: int, device: torch.device) -> Tensor:
    """What a launch that doesn't round gives, in some of `SPLITS`."""
    return run(kernel, *make(heads, device), None, **SPLITS[kv_splits])[0]


def separately(x: Tensor, input_quant: ActivationQuant) -> QuantizedActivation:
    """Plain rows [T, K] as `quantize` rounds them, then moved."""
    made = QuantizedActivation.empty(*x.shape, input_quant, x.device, x.dtype)
    if input_quant.dtype is None:
        made.codes.copy_(x)
    else:
        quantize(x, made.codes, made.scale, group_size=input_quant.group_size, static_scale=input_quant.static_scale)()
    codes = made.codes.view(torch.uint8 if input_quant.dtype else x.dtype)
    moved = codes if input_quant.column_permutation is None else codes[:, input_quant.column_permutation.argsort()]
    return QuantizedActivation(moved.view(made.codes.dtype), made.scale)


def check(got: QuantizedActivation, x: Tensor, input_quant: ActivationQuant) -> None:
    """That it is what a launch more makes of plain rows, to the last bit."""
    expected = separately(x, input_quant)
    assert torch.equal(got.codes.view(torch.uint8), expected.codes.view(torch.uint8))
    assert torch.equal(got.scale.view(torch.int32), expected.scale.view(torch.int32))


def values_of(rounded: QuantizedActivation, input_quant: ActivationQuant) -> Tensor:
    """What codes stand for, columns where they were."""
    codes = (
        rounded.codes.float()
        if input_quant.column_permutation is None
        else rounded.codes.float()[:, input_quant.column_permutation.long()]
    )
    if input_quant.dtype is None:
        return codes
    scale = (
        rounded.scale.repeat_interleave(input_quant.group_size, 1)[:, : codes.shape[1]]
        if input_quant.group_size
        else None
    )
    return codes * (rounded.scale if scale is None else scale)


def reference(x: Tensor, input_quant: ActivationQuant) -> Tensor:
    """What the codes of rows [T, K] should stand for."""
    if input_quant.dtype is None:
        return x.float()
    if input_quant.group_size:
        return fp8.fake_quantize_per_group(x, input_quant.group_size)
    of = fp8 if input_quant.dtype == E4M3 else int8
    if input_quant.static_scale is None:
        return of.fake_quantize_per_token(x)
    return of.fake_quantize_static(x, input_quant.static_scale[0])


@pytest.mark.parametrize(
    ("heads", "form", "kernel"),
    slow_if(
        ((*case, kernel) for case in CASES for kernel in KERNELS),
        lambda *case: case in SECOND or case[-1] == KERNELS[0],
    ),
    ids=str,
)
def test_a_row_is_rounded_as_in_a_launch_of_its_own(
    heads: tuple[int, int, int], form: str, kernel: str, device: torch.device
) -> None:
    step = make(heads, device)
    input_quant = wanted(form, heads[0] * heads[2], device)
    for i, sizes in enumerate(SPLITS):
        plain, got = run(kernel, *step, input_quant, **sizes)
        assert torch.equal(plain, not_rounded(kernel, heads, i, device))
        assert torch.equal(values_of(got, input_quant), reference(plain, input_quant))
        check(got, plain, input_quant)
    with backwards():  # on the same counters, and another program is the last
        again, got = run(kernel, *step, input_quant, **SPLITS[0])
    assert torch.equal(again, not_rounded(kernel, heads, 0, device))
    check(got, again, input_quant)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("form", [form for form in FORMS if FORMS[form].dtype is not None])
def test_what_is_not_finite_makes_its_scale_nan(form: str, wrong: float, device: torch.device) -> None:
    """In a value that the second head of the second sequence sees: in one column of each query head of its group."""
    qkv, inputs, cache, shape = make((6, 2, 64), device)
    cache.value[inputs.block_tables[1, 3], 1, 5, 40] = wrong
    input_quant = wanted(form, 6 * 64, device)
    plain, got = run("decode", qkv, inputs, cache, shape, input_quant, **SPLITS[0])
    expected = torch.zeros_like(got.scale, dtype=torch.bool)
    expected[1, 1 if input_quant.group_size else 0 :] = True  # columns 192 + 40, + 64, + 64: in groups 1, 2 and 2
    assert torch.equal(got.scale.isnan(), expected)
    check(got, plain, input_quant)


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_is_rounded_before_all_heads_are_stored(kernel: str, device: torch.device) -> None:
    """Programs of all heads but one: they have counted themselves, and no more."""
    step, input_quant = make(HEADS, device), wanted("fp8", 9 * 64, device)
    launch, _, into = prepared(kernel, *step, input_quant, **SPLITS[0])
    replace(launch, grid=(launch.grid[0], launch.grid[1] - 1, launch.grid[2]))()
    counters = launch.arguments["output"].counters
    counted = counters.tolist()
    counters.zero_()
    assert counted == [0] * (len(counted) - len(LENGTHS)) + [2] * len(LENGTHS)
    assert bool((into.codes.view(torch.uint8) == UNWRITTEN).all())
    assert bool((into.scale == -1).all())


def test_a_sequence_of_no_query_rounds_no_row(device: torch.device) -> None:
    """It has none: the place of its first is behind the last."""
    qkv, inputs, cache, shape = make(HEADS, device)
    starts = torch.tensor([0, 1, 2, 3, 3], dtype=torch.int32, device=device)
    input_quant = wanted("fp8", 9 * 64, device)
    plain, got = run("decode", qkv[:3], replace(inputs, query_starts=starts), cache, shape, input_quant, **SPLITS[0])
    check(got, plain, input_quant)
    behind = got.codes.as_strided((1, 9 * 64), (9 * 64, 1), got.codes.numel()).view(torch.uint8)
    assert bool((behind == UNWRITTEN).all())


@pytest.mark.parametrize("norm", ["head", "all"])
@pytest.mark.parametrize("form", ["fp8", "fp8 groups", "moved"])
def test_a_decode_step_is_rounded_whatever_its_norms(form: str, norm: str, device: torch.device) -> None:
    """Norms over all heads take a launch of their own before attention."""
    qkv, inputs, cache, shape = make(HEADS, device)
    input_quant = wanted(form, 9 * 64, device)
    norms = [torch.rand(64 if norm == "head" else n * 64, device=device) for n in HEADS[:2]]
    plain, got = (
        rope_and_attention(qkv, inputs, cache, shape, None, *norms, 1e-6, input_quant=w) for w in (None, input_quant)
    )
    assert isinstance(plain, Tensor)
    assert isinstance(got, QuantizedActivation)
    check(got, plain, input_quant)


def test_a_step_with_a_prompt_is_left_plain(device: torch.device) -> None:
    qkv, inputs, cache, shape = make(HEADS, device)
    starts, place = torch.tensor([0, 1, 4], dtype=torch.int32, device=device), inputs.positions[:1]
    inputs = replace(
        inputs, query_starts=starts, seq_lens=inputs.seq_lens[:2], block_tables=inputs.block_tables[:2],
        max_query_len=3, positions=place.expand(4).contiguous(), slot_mapping=place.expand(4) - 1,
    )  # fmt: skip
    plain, got = (
        rope_and_attention(qkv, inputs, cache, shape, None, None, None, 1e-6, input_quant=w)
        for w in (None, ActivationQuant(E4M3))
    )
    assert isinstance(plain, Tensor)
    assert isinstance(got, Tensor)
    assert torch.equal(got, plain)


def test_room_without_a_rounding_is_refused(device: torch.device) -> None:
    step = make(HEADS, device)
    into = QuantizedActivation.empty(len(LENGTHS), 9 * 64, ActivationQuant(E4M3), device)
    lse = torch.empty(len(LENGTHS), 3, 1, 3, device=device)
    out, counters = torch.empty(len(LENGTHS), 9, 64, device=device), counters_for(len(LENGTHS) * 4, device)
    with pytest.raises(ValueError, match="come together"):
        decode(out, *step[1:], Output(out, lse, lse, counters), into=into, **SPLITS[2])


def test_no_tokens_have_no_codes(device: torch.device) -> None:
    into = quantized_rows(torch.empty(0, 9, 64, device=device), ActivationQuant(E4M3, 128))
    assert into is not None
    assert (into.codes.shape, into.scale.shape) == ((0, 576), (0, 5))
