"""One step as a value: the tensors that a forward pass over a batch needs, and how they are made of lengths and tables.

Steps are put together in numpy, in the host's memory, and moved to a device with `to`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.kernels.lora.rows import AdapterRows

Integers = Sequence[int] | NDArray[np.integer[Any]] | Tensor

QUERY_CLASSES = (1, 2, 8)
"""On a CPU, steps of equally many sequences and tokens launch the same kernels where none of these lies between their
max_query_len; beyond the last one, it depends on how the tokens are divided."""


class GroupTables(NamedTuple):
    """Where a group of layers has its keys and values; see StepInputs."""

    slot_mapping: Tensor
    block_tables: Tensor


class ImageRows(NamedTuple):
    """Embeddings of images' tokens: which of a step's tokens they are, [N] int64, and the embeddings, [N, H].

    Where they are [N, (1 + L) * H], what is behind the first H is added to the residual stream behind each of the first
    L layers (DeepStack).
    """

    rows: Tensor
    values: Tensor

    def behind(self, layer: int, hidden_size: int) -> Tensor | None:
        """[N, H] that are added behind a layer; None: nothing is."""
        begin = (1 + layer) * hidden_size
        return self.values[:, begin : begin + hidden_size] if begin < self.values.shape[1] else None


class NewSource(NamedTuple):
    """What sequences that begin in a step bring: the places of its keys and values, and the encoder's input."""

    places: tuple[int, ...]
    given: Tensor


class SourceRows(NamedTuple):
    """Of a model whose tokens attend to an encoder's output too (attention/cross.py): where that is.

    slots    of each sequence, the place of its source's keys and values
    lengths  of each, how many of these there are
    new      what is to be encoded first
    """

    slots: tuple[int, ...]
    lengths: tuple[int, ...]
    new: tuple[NewSource, ...]


class Ahead(NamedTuple):
    """Tokens that see some behind them: rows begin .. end of a step are of this sequence, and see its first `length`
    tokens, of which all are in the cache. in_windows: in layers with a window alone. past_windows: no window hides any
    of these from them.
    """

    sequence: int
    begin: int
    end: int
    length: int
    in_windows: bool = False
    past_windows: bool = False


@dataclass(frozen=True)
class StateRows:
    """Which rows of the state caches (linear_attention/states.py) a step's sequences have.

    rows     [S] int64   where the state of each is, once the step has written it
    sources  [S] int64   where it is before that; -1: a sequence begins, and its state is zeros
    saves    [N, 2] int64  a token of the batch, ascending, and a row that the state behind it is copied to. No row of
                         these is a source of the same step
    """

    rows: Tensor
    sources: Tensor
    saves: Tensor = field(default_factory=lambda: torch.empty((0, 2), dtype=torch.int64))

    @property
    def goes_on(self) -> bool:
        """Whether every sequence has its state where it stays, and none is copied."""
        return self.sources is self.rows and not len(self.saves)


@dataclass(frozen=True)
class StepInputs:
    """Everything that a forward pass over a mixed batch of prefill chunks and decodes needs.

    The tokens of all sequences stand one after another, sequence by sequence. With T tokens, S sequences, B blocks
    in the longest table and L rows of logits wanted:

    token_ids      [T] int64
    positions      [T] int64      position of each token in its sequence
    slot_mapping   [T] int64      where its key and value go: block id * block_size + offset in the block; -1, nowhere:
                                  a token that only fills a batch up (on a GPU; CPUs are given none)
    block_tables   [S, B] int32   block ids of each sequence in order; entries past its length are 0 and never read
    seq_lens       [S] int32      tokens in the cache once this step has written its own
    query_starts   [S + 1] int32  sequence s owns tokens query_starts[s] .. query_starts[s + 1]
    logits_index   [L] int64      tokens whose logits are wanted, ascending
    more_groups    slot_mapping and block_tables of further groups of layers, where layers don't all hold the same
                   tokens; those above are the first group's
    adapters       which of the tokens that are computed use which adapter; None: none of them uses one
    token_types    [T] int64      of an encoder's tokens; None: all are of the first type
    images         what stands in place of the embeddings of some tokens; None: of none
    ahead          tokens that see some behind them; the others are causal
    axes           [3, T] int64   positions in time, height and width, by which tokens are rotated where those of images
                                  are in the step; None: by `positions`
    cos_sin        [T, rotary_dim] float32, in place of the layers' own table, of which `positions` say the rows; a
                                  decoder makes it of axes
    sources        what the sequences attend to beside their tokens; None: nothing
    states         rows of the state caches; None: each sequence begins, with row s for sequence s
    max_query_len  1 when every sequence has one token: a pure decode step
    max_seq_len    largest of seq_lens
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    query_starts: Tensor
    logits_index: Tensor
    max_query_len: int
    max_seq_len: int
    more_groups: tuple[GroupTables, ...] = ()
    adapters: AdapterRows | None = None
    token_types: Tensor | None = None
    images: ImageRows | None = None
    ahead: tuple[Ahead, ...] = ()
    axes: Tensor | None = None
    cos_sin: Tensor | None = None
    sources: SourceRows | None = None
    states: StateRows | None = None

    def of_rows(self, rows: Tensor) -> StepInputs:
        """The step as layers see it that compute some of its tokens, [L] int64, alone."""
        return self if self.adapters is None else replace(self, adapters=self.adapters.among(rows))

    def by_group(self) -> list[StepInputs]:
        """The step as the layers of each group see it."""
        others = [replace(self, **tables._asdict(), more_groups=()) for tables in self.more_groups]
        return [self, *others]

    @classmethod
    def prefill(
        cls,
        lengths: Integers,
        block_size: int,
        *,
        sizes: Integers | None = None,
        token_ids: Integers | None = None,
        tables: Integers | Sequence[Sequence[int]] | None = None,
        more_tables: Sequence[NDArray[np.int32]] = (),
        logits_index: Integers | None = None,
    ) -> StepInputs:
        """A step on the CPU in which sequence s computes the last sizes[s] of its lengths[s] tokens.

        lengths       tokens of each sequence in the cache once the step has written its own
        sizes         new tokens of each sequence, prefill chunks and decodes mixed; None: all of its tokens
        token_ids     of the new tokens, sequence by sequence; None: zeros, for those who only want attention
        tables        block ids [S, B]; None: consecutive blocks, sequence s in blocks s * B .. (s + 1) * B
        more_tables   block ids [S, B] of each further group of layers
        logits_index  tokens whose logits are wanted; None: the last one of each sequence
        """
        seq_lens = _array(lengths, np.int32)
        new = seq_lens if sizes is None else _array(sizes, np.int32)
        max_query_len = int(new.max(initial=0))
        max_seq_len = int(seq_lens.max(initial=0))
        query_starts = np.zeros(len(new) + 1, dtype=np.int64)
        np.cumsum(new, out=query_starts[1:])
        num_tokens = int(query_starts[-1])
        first = seq_lens.astype(np.int64) - new
        if max_query_len == 1 and num_tokens == len(new):  # decode: one token each, as in most steps that are served
            positions = first
            owners = np.arange(num_tokens)
        else:
            positions = np.arange(num_tokens) + np.repeat(first - query_starts[:-1], new)
            owners = np.repeat(np.arange(len(new)), new)
        if tables is None:
            width = -(-max_seq_len // block_size)
            tables = np.arange(len(new) * width, dtype=np.int32).reshape(len(new), width)
        blocks, offsets = np.divmod(positions, block_size)
        groups: list[GroupTables] = []
        for given in (tables, *more_tables):
            table = np.ascontiguousarray(_array(given, np.int32))
            slots = table[owners, blocks] * np.int64(block_size) + offsets
            groups.append(GroupTables(torch.from_numpy(slots), torch.from_numpy(table)))
        ids = np.zeros(num_tokens, dtype=np.int64) if token_ids is None else _array(token_ids, np.int64)
        index = query_starts[1:] - 1 if logits_index is None else _array(logits_index, np.int64)
        return cls(
            token_ids=torch.from_numpy(ids),
            positions=torch.from_numpy(positions),
            slot_mapping=groups[0].slot_mapping,
            block_tables=groups[0].block_tables,
            seq_lens=torch.from_numpy(seq_lens),
            query_starts=torch.from_numpy(query_starts.astype(np.int32)),
            logits_index=torch.from_numpy(index),
            max_query_len=max_query_len,
            max_seq_len=max_seq_len,
            more_groups=tuple(groups[1:]),
        )

    @classmethod
    def decode(
        cls,
        lengths: Integers,
        block_size: int,
        *,
        token_ids: Integers | None = None,
        tables: Integers | Sequence[Sequence[int]] | None = None,
    ) -> StepInputs:
        """A step on the CPU in which each sequence computes its last token; arguments as of `prefill`."""
        return cls.prefill(lengths, block_size, sizes=[1] * len(lengths), token_ids=token_ids, tables=tables)

    @classmethod
    def empty(cls, sizes: Sequence[int], max_seq_len: int, block_size: int, num_groups: int = 1) -> StepInputs:
        """A step on the CPU whose tokens, sizes[s] of each sequence, are written nowhere and attend to nothing.

        max_seq_len  how long the longest is said to be: kernels are given the memory that this takes
        """
        starts = torch.tensor([0, *accumulate(sizes)], dtype=torch.int32)
        tokens = torch.zeros(sum(sizes), dtype=torch.int64)
        tables = torch.zeros(len(sizes), -(-max_seq_len // block_size), dtype=torch.int32)
        return cls(
            token_ids=tokens,
            positions=tokens,
            slot_mapping=tokens - 1,
            block_tables=tables,
            more_groups=(GroupTables(tokens - 1, tables),) * (num_groups - 1),
            seq_lens=torch.zeros(len(sizes), dtype=torch.int32),
            query_starts=starts,
            logits_index=starts[1:].long() - 1,
            max_query_len=max(sizes),
            max_seq_len=max_seq_len,
        )

    def to(self, device: torch.device) -> StepInputs:
        """The same on a device."""
        if self.token_ids.device == device:
            return self
        values: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = value.to(device, non_blocking=True)
        values["more_groups"] = tuple(
            GroupTables(*(x.to(device, non_blocking=True) for x in tables)) for tables in self.more_groups
        )
        if self.adapters is not None:
            values["adapters"] = AdapterRows(*(x.to(device, non_blocking=True) for x in self.adapters))
        if self.images is not None:
            values["images"] = ImageRows(*(x.to(device, non_blocking=True) for x in self.images))
        return StepInputs(**values)


def _array(values: Integers | Sequence[Sequence[int]], dtype: type[np.signedinteger[Any]]) -> NDArray[Any]:
    """Values as a numpy array; of a GPU's tensor a copy."""
    return np.asarray(values.cpu() if isinstance(values, Tensor) else values, dtype=dtype)
