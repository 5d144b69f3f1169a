"""Bit packing: the inverse of itself, and the layouts that other tools write."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from octavo.quant.packing import pack, packed_columns, unpack


def random_codes(rows: int, columns: int, bits: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    return torch.randint(low, high, (rows, columns), generator=generator, dtype=torch.int8)


def words_of_bit_string(codes: Tensor, bits: int) -> Tensor:
    """The definition, in Python's integers: element i at bits [i * b, i * b + b)."""
    rows = []
    for row in codes.tolist():
        stream = sum((code + (1 << (bits - 1))) << (i * bits) for i, code in enumerate(row))
        raw = stream.to_bytes(4 * packed_columns(len(row), bits), "little")
        rows.append([int.from_bytes(raw[i : i + 4], "little", signed=True) for i in range(0, len(raw), 4)])
    return torch.tensor(rows, dtype=torch.int32)


@given(
    rows=st.integers(1, 5), columns=st.integers(1, 100), bits=st.sampled_from([2, 3, 4, 8]), seed=st.integers(0, 2**32)
)
def test_pack_is_the_bit_stream_and_unpack_undoes_it(rows: int, columns: int, bits: int, seed: int) -> None:
    codes = random_codes(rows, columns, bits, seed)
    packed = pack(codes, bits)
    assert torch.equal(packed, words_of_bit_string(codes, bits))
    assert torch.equal(unpack(packed, bits, columns, padded=False), codes)


def test_padded_three_bit_words_are_read() -> None:
    """Before 0.18 compressed-tensors put ten 3-bit values into a word."""
    codes = random_codes(4, 64, 3, seed=0)
    fields = torch.nn.functional.pad(codes.int() + 4, (0, 6)).view(4, 7, 10)
    words = (fields << (torch.arange(10, dtype=torch.int32) * 3)).sum(-1, dtype=torch.int32)
    assert torch.equal(unpack(words, 3, 64), codes)


def test_a_width_of_neither_layout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"64 values of 4 bits take 8 words .* not 9"):
        unpack(torch.zeros(2, 9, dtype=torch.int32), 4, 64)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_column_turned_into_a_row(bits: int) -> None:
    """Its stride is 1 and not the row's length, and torch calls it contiguous all the same."""
    column = random_codes(64, 1, bits, seed=0)
    assert torch.equal(unpack(pack(column.t(), bits), bits, 64), column.t())
