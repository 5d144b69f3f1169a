"""The modules of a model that adapters may change, by transformers' names, and the layers here that have them.

Names are without what stands before `layers`; here q, k, v and gate, up are one layer each, of whose output every
module has some columns. A mixture's experts have several names, as transformers has changed them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.quant.linear import Linear
from octavo.quant.shard import WHOLE, Shard
from octavo.runtime.model.names import expert_role, layer_linears
from octavo.runtime.model.sources import Source
from octavo.runtime.model.spec import DecoderSpec
from octavo.runtime.parallel.layout import RankLayout

HEAD = "lm_head"
EMBEDDING = "embed_tokens"

# A text model's layers, in a model by itself or in one that sees, too.
_LAYER = re.compile(r"((?:(?:model|language_model|text_model|backbone)\.)*)(layers\.\d+\..+)")
_ENDS = re.compile(rf"(?:(?:model|language_model|text_model|backbone)\.)*({HEAD}|{EMBEDDING})")
_EXPERT = re.compile(r"(layers\.\d+)(?:\.(\w+))?\.experts\.(\d+)\.(\w+)")
_STACK = re.compile(r"(layers\.\d+)(?:\.(\w+))?\.experts(?:\.base_layer)?")


@dataclass(frozen=True)
class Module:
    """A linear module of the whole model, [N, K]. shard: what of it this rank has, if it has its layer."""

    num_rows: int
    num_columns: int
    shard: Shard = WHOLE

    @property
    def own_rows(self) -> int:
        return self._own(self.num_rows) if self.shard.axis == "rows" else self.num_rows

    @property
    def own_columns(self) -> int:
        return self._own(self.num_columns) if self.shard.axis == "columns" else self.num_columns

    @property
    def is_sum(self) -> bool:
        """Whether the outputs of several ranks, each of some columns, are summed."""
        return self.shard.axis == "columns" and bool(self.shard.ranges)

    def _own(self, length: int) -> int:
        return sum(stop - begin for begin, stop in self.shard.ranges) if self.shard.ranges else length


@dataclass(frozen=True)
class AdaptedLinear:
    """A linear layer here that adapters may change, and its modules, by name, in the order of its output's columns."""

    linear: Linear
    modules: Mapping[str, Module]

    @property
    def num_rows(self) -> int:
        return sum(module.own_rows for module in self.modules.values())

    @property
    def num_columns(self) -> int:
        return next(iter(self.modules.values())).own_columns

    def first_of(self, module: str) -> int:
        """A module's first column of the output."""
        names = list(self.modules)
        return sum(self.modules[name].own_rows for name in names[: names.index(module)])

    def weight(self, module: str) -> Tensor:
        """[n, K] float32: a module's weight here, as it is multiplied."""
        whole = torch.cat([part.weight.unpack() for part in self.linear.parts])
        first = self.first_of(module)
        return whole[first : first + self.modules[module].own_rows]


class ModelModules:
    """Modules of a whole model by their names in the checkpoint. own: this rank's share; None: there is one rank."""

    def __init__(self, spec: DecoderSpec, source: Source, own: RankLayout | None) -> None:
        self._prefix = source.prefix
        self._layers: list[dict[str, dict[str, Module]]] = []
        for index in range(len(spec.layers)):
            of_layer = {}
            for kind, parts in layer_linears(spec, index, source.prefix, source.has).items():
                shards = [WHOLE] * len(parts.modules) if own is None else own.shards(kind, spec)
                of_layer[kind] = {
                    name.removeprefix(source.prefix): Module(rows, parts.in_features, shard)
                    for (name, rows), shard in zip(parts.modules.items(), shards, strict=True)
                }
            self._layers.append(of_layer)
        head = Module(spec.vocab_size, spec.hidden_size, WHOLE if own is None else own.rows_of_vocabulary)
        self.head = {HEAD: head}
        self.by_name = {name: module for modules in self._all() for name, module in modules.items()}
        self.embedding = Module(spec.vocab_size, spec.hidden_size)
        self._experts: dict[tuple[str, int, str], str] = {}
        for name in self.by_name:
            if (match := _EXPERT.fullmatch(name)) is not None:
                self._experts[match[1], int(match[3]), expert_role(match[4])] = name

    def layers(self, linears: Sequence[Mapping[str, Linear]], first_layer: int) -> Iterator[AdaptedLinear]:
        """Those here: linears of each layer, by their names in it."""
        for index, of_layer in enumerate(linears, first_layer):
            for kind, linear in of_layer.items():
                yield AdaptedLinear(linear, self._layers[index][kind])

    def own_name(self, name: str) -> str:
        """What a module, or the embedding, is called here that a file calls so; the name itself where it is none."""
        match = _LAYER.fullmatch(name) or _ENDS.fullmatch(name)
        own = name if match is None else match[match.re.groups]
        expert = _EXPERT.fullmatch(own)
        if expert is None:
            return own
        return self._experts.get((expert[1], int(expert[3]), expert_role(expert[4])), own)

    def stack(self, name: str, role: str) -> list[tuple[str, ...]]:
        """Of each expert of a layer the modules of `gate_up` or `down`; none where the name is no layer's experts."""
        match = _LAYER.fullmatch(name)
        layer = None if match is None else _STACK.fullmatch(match[2])
        if layer is None:
            return []
        found: list[tuple[str, ...]] = []
        while (layer[1], len(found), role.partition("_")[0]) in self._experts:
            found.append(tuple(self._experts[layer[1], len(found), one] for one in role.split("_")))
        return found

    @property
    def mixtures(self) -> list[str]:
        """The layers that have experts."""
        return [*dict.fromkeys(layer for layer, _, _ in self._experts)]

    @staticmethod
    def prefix_of(name: str) -> str:
        """What stands before `layers` in a file's name of a module."""
        match = _LAYER.fullmatch(name)
        return "" if match is None else match[1]

    def _all(self) -> Iterator[dict[str, Module]]:
        for of_layer in self._layers:
            yield from of_layer.values()
        yield self.head
