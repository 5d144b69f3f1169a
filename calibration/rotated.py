"""A checkpoint whose residual stream (R1), heads of values (R2) and inputs of down projections (R4) are rotated.

R1 and R2 make the same model in other numbers; with R4 it is so once its `transforms` are done while serving.

Each tensor is rotated when it is asked for, in float64, so whoever quantizes the checkpoint reads it as any other: one
block is in memory at a time, and a run that is resumed reads the same numbers. Norms over the stream are 1 then, since
their weights stand in the linear layers behind them; a head that was tied to the embedding has a weight of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import gcd

import torch
from torch import Tensor

from octavo.calibration.algorithms.rotation import Rotation, make_rotation
from octavo.calibration.head import untied
from octavo.calibration.layers import QuantizeError
from octavo.calibration.recipe import Recipe
from octavo.kernels.hadamard.reference import hadamard, is_block, largest_block
from octavo.quant.block_map import RotationMap
from octavo.quant.checkpoint import Checkpoint
from octavo.quant.derived_file import Derived, DerivedFile
from octavo.quant.formats.targets import Targets
from octavo.quant.formats.transforms import NO_TRANSFORMS, InputTransform, Transforms
from octavo.quant.mtp_names import mtp_patterns
from octavo.quant.safetensors_file import TensorSpec
from octavo.quant.tensor_file import TensorFile

SLICE = 1 << 22  # numbers that are rotated in float64 at a time
Change = Callable[[Tensor], Tensor]
"""Of rows [R, K] in float64."""


def rotated(checkpoint: Checkpoint, wiring: RotationMap, recipe: Recipe) -> Checkpoint:
    """The same model as another checkpoint, whose notes say what a person should know of the rotations.

    Raises QuantizeError for sizes that the recipe's blocks don't divide.
    """
    folds = _Folds(checkpoint, wiring, recipe)
    derived = {name: tensor for name in checkpoint.names if (tensor := folds.of(name)) is not None}
    head = f"{wiring.head}.weight"
    embedding = f"{wiring.embedding}.weight"
    config = checkpoint.config
    is_untied = bool(wiring.readers) and wiring.tied
    if is_untied:
        derived[head] = folds.head(embedding)
        config = untied(config)
    files: dict[str, TensorFile] = {}
    for shard, file in checkpoint.files.items():
        own = {name: derived[name] for name in file.specs if name in derived}
        if embedding in own and head in derived and not checkpoint.has(head):
            own[head] = derived[head]
        files[shard] = DerivedFile(file, own, own.keys())
    turned = Checkpoint(
        checkpoint.directory,
        config,
        files,
        None,
        checkpoint.layout,
        source=checkpoint.source,
        transforms=folds.transforms,
    )
    if is_untied:
        size = turned.spec(head).nbytes
        turned.notes.append(
            f"R1: {wiring.head} is written beside the embedding that it was tied to, {size / 1e6:,.0f} MB, since the "
            "last norm's weight stands in it"
        )
    turned.notes += [
        f"{name}: an odd number of channels has no Hadamard matrix, so that none is spread over others"
        for name, span in folds.spans.items()
        if span == 1
    ]
    return turned


@dataclass(frozen=True)
class _Step:
    """One change of a matrix: of its columns, or of its rows as columns."""

    change: Change
    of_rows: bool = False


class _Folds:
    """What becomes of each tensor."""

    def __init__(self, checkpoint: Checkpoint, wiring: RotationMap, recipe: Recipe) -> None:
        self.checkpoint = checkpoint
        self.wiring = wiring
        self._owners = {name: file for file in checkpoint.files.values() for name in file.specs}
        self._stream: Rotation | None = None
        if wiring.readers:
            self._stream = _rotation(wiring.size, recipe, recipe.transform_block_size)
        sizes = {heads.head_dim for heads in wiring.values}
        self._of_heads = {size: _rotation(size, recipe, None) for size in sizes}
        self._norm_of = {module: norm for norm, modules in wiring.readers.items() for module in modules}
        self._writers = frozenset(wiring.writers)
        self._producers = {heads.producer: heads for heads in wiring.values}
        self._consumers = {heads.consumer: heads for heads in wiring.values}
        self._inner: int | None = None
        self.transforms = NO_TRANSFORMS
        if wiring.inner:
            self._inner = _inner_block(wiring.inner, recipe.transform_block_size)
            targets = Targets(_patterns(wiring.inner), "targets")
            heads = Targets(mtp_patterns(checkpoint.names, checkpoint.config), "ignore")
            self.transforms = Transforms((InputTransform("R4", targets, heads, self._inner),))

    @property
    def spans(self) -> dict[str, int]:
        """Over how many channels each rotation spreads one, at the least."""
        found = {}
        if self._stream is not None:
            found["R1"] = self._stream.span
        if self._of_heads:
            found["R2"] = min(rotation.span for rotation in self._of_heads.values())
        if self._inner is not None:
            found["R4"] = self._inner
        return found

    def of(self, name: str) -> Derived | None:
        """The tensor that stands in a tensor's place; None: it stays as it is."""
        module, _, suffix = name.rpartition(".")
        spec = self.checkpoint.spec(name)
        if suffix == "weight" and module in self.wiring.readers:
            return Derived(spec, partial(_constant, spec, 1 - self.wiring.offset))
        steps = {"weight": self._steps_of_weight, "bias": self._steps_of_bias}.get(suffix, lambda _: [])(module)
        return Derived(spec, partial(self._make, name, steps)) if steps else None

    def head(self, embedding: str) -> Derived:
        """The weight of a head that was tied to the embedding."""
        steps = self._steps_of_weight(self.wiring.head)
        return Derived(self.checkpoint.spec(embedding), partial(self._make, embedding, steps))

    def _steps_of_weight(self, module: str) -> list[_Step]:
        steps = []
        if self._stream is not None and module in self._norm_of:
            steps.append(_Step(partial(self._read_through, self._stream, self._norm_of[module])))
        elif self._stream is not None and module == self.wiring.embedding:
            steps.append(_Step(self._stream.apply))
        if (heads := self._consumers.get(module)) is not None:
            steps.append(_Step(partial(self._by_head, heads.head_dim, None)))
        if self._inner is not None and module in self.wiring.inner:
            steps.append(_Step(partial(hadamard, block=self._inner)))
        if (heads := self._producers.get(module)) is not None:
            steps.append(_Step(partial(self._by_head, heads.head_dim, heads.rows), of_rows=True))
        if self._stream is not None and module in self._writers:
            steps.append(_Step(self._stream.apply, of_rows=True))
        return steps

    def _steps_of_bias(self, module: str) -> list[_Step]:
        """A bias is one column, whose rows are a weight's rows."""
        return [step for step in self._steps_of_weight(module) if step.of_rows]

    def _read_through(self, rotation: Rotation, norm: str, rows: Tensor) -> Tensor:
        name = f"{norm}.weight"
        return rotation.apply(rows * (self._owners[name].read(name).double() + self.wiring.offset))

    def _by_head(self, head_dim: int, span: tuple[int, int] | None, rows: Tensor) -> Tensor:
        """rows [R, K]: each head among their columns, all or those within a span."""
        first, stop = span or (0, rows.shape[-1])
        heads = rows[:, first:stop].reshape(len(rows), -1, head_dim)
        turned = self._of_heads[head_dim].apply(heads).flatten(1)
        return torch.cat([rows[:, :first], turned, rows[:, stop:]], dim=-1)

    def _make(self, name: str, steps: list[_Step]) -> Tensor:
        stored = self._owners[name].read(name)
        spec = self.checkpoint.spec(name)
        out = stored[:, None] if stored.ndim == 1 else stored
        for i, step in enumerate(steps):
            dtype = spec.dtype if i + 1 == len(steps) else torch.float32
            out = _in_slices(out.t(), step.change, dtype).t() if step.of_rows else _in_slices(out, step.change, dtype)
        return out.reshape(spec.shape).contiguous()


def _rotation(size: int, recipe: Recipe, block_size: int | None) -> Rotation:
    seed = recipe.transform_seed if recipe.transform_type == "random-hadamard" else None
    try:
        return make_rotation(size, block_size=block_size, seed=seed)
    except ValueError as e:
        raise QuantizeError(str(e)) from e


def _inner_block(columns: Mapping[str, int], asked: int | None) -> int:
    """The Hadamard blocks that divide the columns of all modules."""
    size = gcd(*columns.values())
    block = largest_block(size)
    if asked is not None and not is_block(asked, size):
        raise QuantizeError(
            f"transform_block_size {asked} is no power of two that divides {size}; {block} is the largest"
        )
    return asked or block


def _patterns(modules: Iterable[str]) -> list[str]:
    """A regex for those that differ in the numbers of their layers."""
    kinds = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "#", module) for module in modules)
    return ["re:" + re.escape(kind).replace(r"\#", r"\d+") + "$" for kind in kinds]


def _constant(spec: TensorSpec, value: float) -> Tensor:
    return torch.full(spec.shape, value, dtype=spec.dtype)


def _in_slices(matrix: Tensor, change: Change, dtype: torch.dtype) -> Tensor:
    """The matrix [R, K] with each row changed, some rows at a time."""
    count = max(1, SLICE // matrix.shape[1])
    out = torch.empty(matrix.shape, dtype=dtype)
    for begin in range(0, len(matrix), count):
        out[begin : begin + count] = change(matrix[begin : begin + count].double())
    return out
