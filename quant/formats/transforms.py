"""compressed-tensors' `transform_config`: what is multiplied by a matrix while serving, and what was folded offline.

Source: vllm-project/compressed-tensors, `transform/transform_config.py`, `transform_scheme.py`, `transform_args.py`.
What was folded is in the weights already. Of the rest octavo serves one: a linear layer's input is multiplied by
Sylvester's Hadamard matrix over sqrt(n), whole or in blocks of `head_dim`. A file may have that matrix, of +-1, as
`{module}.{name}_input.weight`; where several layers have the same, of one of them alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor

from octavo.kernels.hadamard.reference import hadamard, is_block
from octavo.quant.formats.config_reading import check_types
from octavo.quant.formats.format import FormatError
from octavo.quant.formats.targets import Targets

FOLDED = ("weight_input", "weight_output")
OF_SCORES = {"q_attn", "k_cache"}
KEY = "transform_config"


class _Args(msgspec.Struct):
    targets: str | list[str]
    location: str
    inverse: bool = False
    ignore: str | list[str] = []


class _Scheme(msgspec.Struct):
    type: str
    apply: list[_Args] = []
    randomize: bool = False
    head_dim: int | None = None


class _Config(msgspec.Struct):
    config_groups: dict[str, _Scheme]


@dataclass(frozen=True)
class InputTransform:
    """Linear layers whose input is multiplied by Hadamard blocks first; block None: all columns are one."""

    name: str
    targets: Targets
    ignore: Targets
    block: int | None

    def block_of(self, module: str, columns: int) -> int | None:
        """Of a linear layer with so many columns; None: its input stays as it is. Raises FormatError."""
        if not self.targets.match(module) or self.ignore.match(module):
            return None
        block = self.block or columns
        if not is_block(block, columns):
            raise FormatError(
                f"{module}: transform {self.name!r}: {columns} columns have no Hadamard blocks of {block}"
            )
        return block

    def to_config(self) -> dict[str, Any]:
        """As llm-compressor's SpinQuantModifier writes R4: before the product, and the inverse in the weight."""
        where = {"targets": list(self.targets.patterns), "ignore": list(self.ignore.patterns)}
        return {
            "type": "hadamard",
            "apply": [
                {**where, "location": "input", "inverse": False},
                {**where, "location": "weight_input", "inverse": True},
            ],
            "randomize": False,
            "requires_grad": False,
            "head_dim": self.block,
            "precision": "torch.float32",
        }


@dataclass(frozen=True)
class Transforms:
    """All that is done while serving. notes: what isn't, since it changes no answer."""

    inputs: tuple[InputTransform, ...] = ()
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.inputs)

    @property
    def names(self) -> str:
        return ", ".join(it.name for it in self.inputs)

    def block_of(self, module: str, columns: int) -> int | None:
        """The Hadamard blocks of a linear layer's input; None: it stays as it is. Raises FormatError."""
        found = {it.name: block for it in self.inputs if (block := it.block_of(module, columns)) is not None}
        if len(found) > 1:
            raise FormatError(f"{module}: transforms {', '.join(found)} are of the same input; one can be served")
        return next(iter(found.values()), None)

    def is_stored(self, name: str) -> bool:
        """Whether a tensor is the matrix of one of them, by its name."""
        return name.endswith(tuple(f".{it.name}_input.weight" for it in self.inputs))

    def to_config(self) -> dict[str, Any]:
        """The `transform_config`."""
        return {"config_groups": {it.name: it.to_config() for it in self.inputs}} if self.inputs else {}


NO_TRANSFORMS = Transforms()


def check_matrix(name: str, matrix: Tensor) -> None:
    """Raise FormatError for a stored matrix that isn't Sylvester's."""
    size = matrix.shape[0]
    if matrix.ndim == 2 and matrix.shape[1] == size and is_block(size, size):
        expected = hadamard(torch.eye(size), size) * size**0.5
        if torch.equal(matrix.float(), expected.round()):
            return
    raise FormatError(f"{name} {list(matrix.shape)} is not Sylvester's Hadamard matrix of +-1, which alone is served")


def parse_transforms(raw: Mapping[str, Any] | None, *, has_kv_scales: bool) -> Transforms:
    """A `transform_config`. Raises FormatError for what would be another model if it were left out."""
    if not raw:
        return NO_TRANSFORMS
    inputs: list[InputTransform] = []
    notes: list[str] = []
    for name, scheme in check_types(raw, _Config, KEY).config_groups.items():
        online = [args for args in scheme.apply if args.location not in FOLDED]
        where = {args.location for args in online}
        if where == OF_SCORES and not has_kv_scales:
            notes.append(f"{KEY} {name!r}: rotating queries and keys changes no score, and is left out")
        elif where:
            _check(name, scheme, where)
            inputs += [_input(name, scheme, args) for args in online]
    return Transforms(tuple(inputs), tuple(notes))


def _check(name: str, scheme: _Scheme, where: set[str]) -> None:
    """Refuse what isn't served."""
    if where != {"input"}:
        cause = " with scales of the KV cache behind them" if where == OF_SCORES else ""
        raise FormatError(f"{KEY} {name!r}: location {', '.join(sorted(where))}{cause} is not supported; input is")
    if scheme.type != "hadamard" or scheme.randomize:
        kind = f"{scheme.type}, randomized" if scheme.randomize else scheme.type
        raise FormatError(f"{KEY} {name!r}: type {kind} is not supported while serving; hadamard is")


def _input(name: str, scheme: _Scheme, args: _Args) -> InputTransform:
    key = f"{KEY}.config_groups.{name}"
    return InputTransform(
        name,
        Targets(_several(args.targets), f"{key}.targets"),
        Targets(_several(args.ignore), f"{key}.ignore"),
        scheme.head_dim,
    )


def _several(patterns: str | list[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else patterns
