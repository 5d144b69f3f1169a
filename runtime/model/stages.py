"""Stages of a model: consecutive layers on each rank, or on a few that divide them, one stage behind the other.

What travels is the residual stream [T, H] in the model's type: the first layer of a stage norms it by itself. A
decoder is built of the same modules as a whole one's. Only what stands at its ends differs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from octavo.kernels.attention.step import StepInputs
from octavo.kernels.quantized_activation import Hidden
from octavo.quant.head_name import head_name
from octavo.quant.shard import Range
from octavo.runtime.model.names import embedding_name, stored_name
from octavo.runtime.model.spec import DecoderSpec
from octavo.runtime.parallel.group import ALONE, Group


@dataclass(frozen=True)
class Stage:
    """The layers of a rank, and from which rank of `group` the residual stream comes, and to which it goes.

    source, target: None: what is before these layers is the embedding; what is behind them, the output head.
    """

    layers: Range
    source: int | None = None
    target: int | None = None
    group: Group = ALONE

    @property
    def is_first(self) -> bool:
        return self.source is None

    @property
    def is_last(self) -> bool:
        return self.target is None

    def of_others(self, spec: DecoderSpec, prefix: str) -> tuple[str, ...]:
        """How the names of the tensors begin that other stages have; `prefix` stands before layer names."""
        others = (index for index in range(len(spec.layers)) if index not in range(*self.layers))
        names = [f"{prefix}layers.{index}" for index in others]
        names += [] if self.is_first else [embedding_name(spec, prefix)]
        names += [] if self.is_last else [stored_name(spec, f"{prefix}norm"), head_name(prefix)]
        return tuple(f"{name}." for name in names)


class Received:
    """In the place of an `Embedding`: the residual stream behind the layers of the stage before.

    table [0, H]: none of an embedding's rows [V, H]; of the type of the residual stream.
    """

    def __init__(self, stage: Stage, table: Tensor) -> None:
        assert stage.source is not None
        self.table = table.new_empty((0, table.shape[1]))  # no view, which would keep all rows in memory
        self._source = stage.source
        self._group = stage.group

    def forward(self, token_ids: Tensor) -> Tensor:
        """[T, H], of the T tokens of a step."""
        return self._group.receive(self.table.new_empty((len(token_ids), self.table.shape[1])), self._source)


class HandedOn:
    """In the place of a `Head`: hands the residual stream to the next stage."""

    linear = None

    def __init__(self, stage: Stage) -> None:
        assert stage.target is not None
        self._target = stage.target
        self._group = stage.group

    def forward(self, hidden: Hidden, step: StepInputs | None) -> Tensor:  # noqa: ARG002
        """Returns what was handed on, of all tokens of the step: here are no logits."""
        assert isinstance(hidden, Tensor)
        self._group.send(hidden, self._target)
        return hidden
