"""Adapters over a model's linear layers: names mapped to fused layers, shapes checked, DoRA resolved, and slots filled.

An adapter's tensors are named by transformers' modules (adapter_modules.py). All of a file is checked by every rank;
what a rank packs is its share: rows of B where the layer's rows are divided, columns of A where its columns are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from octavo.kernels.lora.embedding import EmbeddingAdapter, EmbeddingSlots
from octavo.kernels.lora.reference import LayerAdapter, LowRank, delta
from octavo.quant.adapter_files import TENSORS, AdapterError, digest_of
from octavo.quant.adapters import joined, make_slots
from octavo.quant.formats.peft import AdapterFiles, missing, open_adapter
from octavo.quant.linear import Linear
from octavo.quant.printable import printable
from octavo.runtime.lora_config import LoraOptions
from octavo.runtime.model.adapter_modules import EMBEDDING, HEAD, AdaptedLinear, ModelModules, Module
from octavo.runtime.model.layers import Embedding

_EMBEDDING_KINDS = {"lora_embedding_A", "lora_embedding_B"}


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter, ready to be put into a slot.

    layers: what each layer's slots have packed, by its number. embedding: None: it has none, or this is another stage.
    """

    layers: Mapping[int, Any]
    embedding: EmbeddingAdapter | None
    num_bytes: int


class _Piece(NamedTuple):
    """A module's tensors in a file, which go to `owns`, by the layers' names: of one expert of a stack, gate and up."""

    name: str
    owns: tuple[str, ...]
    expert: int | None = None


@dataclass(frozen=True)
class AdaptedParts:
    """What of a model adapters may change here. head, embedding: None: another stage has it."""

    layers: tuple[AdaptedLinear, ...]
    head: Linear | None = None
    embedding: Embedding | None = None


class ModelAdapters:
    """The layers of a model that adapters may change, and their slots.

    recordable: whether steps whose tokens use adapters may be recorded. embedding: what adapters add to it.
    """

    def __init__(self, modules: ModelModules, parts: AdaptedParts, options: LoraOptions, dtype: torch.dtype) -> None:
        wanted = set() if "all" in options.lora_target_modules else set(options.lora_target_modules)  # SGLang's "all"
        self.num_slots = options.max_loras
        self._modules = modules
        head = [] if parts.head is None else [AdaptedLinear(parts.head, modules.head)]
        self._layers = [
            layer
            for layer in (*parts.layers, *head)
            if not wanted or any(_ending(name) in wanted for name in layer.modules)
        ]
        self._wanted = wanted
        self._layer_of = {name: number for number, layer in enumerate(self._layers) for name in layer.modules}
        self._options = options
        self._dtype = {"auto": dtype, "float32": torch.float32, "float16": torch.float16}.get(
            options.lora_dtype, torch.bfloat16
        )
        self._parts = parts
        self._model_dtype = dtype
        self.embedding = EmbeddingSlots(options.max_loras)
        self._in_slots: list[LoadedAdapter | None] = [None] * options.max_loras
        bodies = {self._give_slots(layer) for layer in self._layers}
        self.recordable = bodies <= {"cpu"}
        known = {_ending(name) for name in (*modules.by_name, EMBEDDING)}
        unknown = wanted - known
        if unknown:
            raise ValueError(
                f"--lora-target-modules {sorted(unknown)[0]}: the model has no such module; it has "
                f"{', '.join(sorted(known))}"
            )

    def _give_slots(self, layer: AdaptedLinear) -> str:
        options = self._options
        shape = (layer.num_rows, layer.num_columns)
        layer.linear.adapters, body = make_slots(
            options.max_loras, shape, len(layer.modules), options.max_lora_rank, self._dtype
        )
        return body

    @property
    def note(self) -> str:
        """A line for who starts it."""
        options = self._options
        return (
            f"LoRA adapters: up to {options.max_loras} in a step, of rank {options.max_lora_rank} at most, beside "
            f"{len(self._layers)} linear layers"
        )

    def put(self, slot: int, adapter: LoadedAdapter | None) -> None:
        """Let a slot, which no step under way uses, have this adapter; None: nothing."""
        before = self._in_slots[slot]
        self._in_slots[slot] = adapter
        for number in {*(before.layers if before else ()), *(adapter.layers if adapter else ())}:
            slots = self._layers[number].linear.adapters
            assert slots is not None
            slots.put(slot, adapter.layers.get(number) if adapter else None)
        self.embedding.put(slot, adapter.embedding if adapter else None)

    @torch.inference_mode()
    def load(self, directory: Path, digest: str, *, is_checked: bool = False) -> LoadedAdapter:
        """Read and pack an adapter, in any thread. Raises AdapterError where it isn't one of this digest, or at all.

        is_checked: another rank compares copies of the base's tables with them, which a stage may not have.
        """
        _check_digest(directory, digest)
        files = open_adapter(directory)
        pieces = [piece for name in files.modules for piece in self._checked(files, name, is_checked=is_checked)]
        owns = [own for piece in pieces for own in piece.owns]
        if twice := [own for own, count in Counter(owns).items() if count > 1]:
            raise AdapterError(f"{directory / TENSORS}: {printable(twice[0], 200)} has two adapters, by two names")
        self._check_complete(files, pieces)
        embedding = None
        of_layers: dict[int, list[_Piece]] = {}
        for piece in pieces:
            if piece.owns == (EMBEDDING,):
                embedding = self._of_embedding(files, piece.name)
            elif (number := self._layer_of.get(piece.owns[0])) is not None:  # None: another stage's
                of_layers.setdefault(number, []).append(piece)
        numbers = sorted(of_layers)
        reader = _Reader(files)
        packed: list[Any] = []
        for number in numbers:
            slots = self._layers[number].linear.adapters
            assert slots is not None
            packed.append(slots.pack(_layer_adapter(reader, self._layers[number], of_layers[number])))
        _check_digest(directory, digest)  # nobody has written to it meanwhile
        num_bytes = sum(it.num_bytes for it in packed) + (0 if embedding is None else embedding.num_bytes)
        return LoadedAdapter(dict(zip(numbers, joined(packed), strict=True)), embedding, num_bytes)

    def _of_embedding(self, files: AdapterFiles, name: str) -> EmbeddingAdapter | None:
        if self._parts.embedding is None or "lora_embedding_A" not in files.modules[name]:
            return None
        a, b = (files.read(name, f"lora_embedding_{matrix}").to(self._dtype) for matrix in "AB")
        return EmbeddingAdapter(a.T.contiguous(), b, files.config.scale(name) * self._parts.embedding.scale)

    def _checked(self, files: AdapterFiles, name: str, *, is_checked: bool) -> Iterator[_Piece]:
        """What a module's tensors go to, once they have been checked. Raises AdapterError."""
        where = f"{files.directory / TENSORS}: {printable(name, 200)}"
        own = self._modules.own_name(name)
        if own == EMBEDDING:
            self._check_embedding(files, name, where)
            if not is_checked:
                self._check_copy(files, name, self._modules.embedding, where)
            yield _Piece(name, (EMBEDDING,))
            return
        if own not in self._modules.by_name:
            yield from self._checked_stack(files, name, where)
            return
        if self._wanted and _ending(own) not in self._wanted:
            allowed = ", ".join(sorted(self._wanted))
            raise AdapterError(f"{where}: --lora-target-modules are {allowed}, and don't have it")
        kinds = set(files.modules[name])
        if "weight" in kinds and own != HEAD:
            raise AdapterError(f"{where}.base_layer.weight is no tensor of a LoRA adapter that is known here")
        if not is_checked:
            self._check_copy(files, name, self._modules.by_name[own], where)
        self._check_module(files, name, self._modules.by_name[own], where)
        yield _Piece(name, (own,))

    def _check_module(self, files: AdapterFiles, name: str, module: Module, where: str) -> None:
        config = files.config
        kinds = set(files.modules[name])
        low = {"lora_A", "lora_B"}
        if kinds & _EMBEDDING_KINDS:
            raise AdapterError(f"{where} is a linear layer, and has an adapter of an embedding")
        _check_pair(kinds, low, where)
        if kinds & low and not config.selects(name):
            raise AdapterError(f"{where} is not among target_modules of {config.where}: PEFT would pass over it")
        if ("lora_magnitude_vector" in kinds) != (config.use_dora and bool(kinds & low)):
            raise AdapterError(f"{where}: use_dora is {config.use_dora}; a lora_magnitude_vector stands for DoRA alone")
        if "lora_magnitude_vector" in kinds and module.is_sum:
            raise AdapterError(
                f"{where}: use_dora asks for the norms of whole rows, and -tp divides the layer's columns; one rank "
                "serves it, and so does the adapter merged into a checkpoint"
            )
        if "bias" in kinds and (config.bias == "none" or (config.bias == "lora_only" and not kinds & low)):
            raise AdapterError(f"{where} has a bias, and bias is {config.bias!r} in {config.where}")
        rank = config.rank(name)
        if kinds & low:
            self._check_rank(rank, where)
        n = module.num_rows
        k = module.num_columns
        expected = {"lora_A": (rank, k), "lora_B": (n, rank), "lora_magnitude_vector": (n,), "bias": (n,)}
        _check_shapes(files, name, expected, where)

    def _checked_stack(self, files: AdapterFiles, name: str, where: str) -> Iterator[_Piece]:
        """Of a mixture whose experts are one tensor: A [experts * r, K], B [N, r * experts]."""
        parameter, role = self._stacked(files, name)
        experts = self._modules.stack(name, role)
        if not experts:
            raise AdapterError(f"{where}: the model has no such linear layer")
        kinds = set(files.modules[name])
        pair = {"lora_A", "lora_B"}
        if kinds - pair:
            raise AdapterError(f"{where}: {sorted(kinds - pair)[0]} of a mixture's experts is not served")
        _check_pair(kinds, pair, where)
        config = files.config
        if not config.selects_parameter(parameter):
            raise AdapterError(f"{where} is not among target_parameters of {config.where}: PEFT would pass over it")
        if self._wanted and not all(_ending(own) in self._wanted for own in experts[0]):
            allowed = ", ".join(sorted(self._wanted))
            raise AdapterError(f"{where}: --lora-target-modules are {allowed}, and don't have it")
        if config.use_dora:
            raise AdapterError(f"{where}: use_dora of a mixture's experts is not served, nor does PEFT know it")
        rank = config.rank(parameter)
        self._check_rank(rank, where)
        modules = [self._modules.by_name[own] for own in experts[0]]
        rows = sum(module.num_rows for module in modules)
        pairs = rank * len(experts)
        _check_shapes(files, name, {"lora_A": (pairs, modules[0].num_columns), "lora_B": (rows, pairs)}, where)
        for number, owns in enumerate(experts):
            yield _Piece(name, owns, number)

    def _stacked(self, files: AdapterFiles, name: str) -> tuple[str, str]:
        """(name of the parameter, gate_up or down) of an adapter beside experts in one tensor.

        Of two, PEFT's names say no more than which was adapted first; shapes tell them apart.
        """
        owner = name.removesuffix(".base_layer")
        down = self._modules.stack(name, "down")
        a, b = (files.spec(name, kind) for kind in ("lora_A", "lora_B"))
        if down and a is not None and b is not None:
            module = self._modules.by_name[down[0][0]]
            if (*b.shape[:1], *a.shape[-1:]) == (module.num_rows, module.num_columns):
                return f"{owner}.down_proj", "down"
        return f"{owner}.gate_up_proj", "gate_up"

    def _check_embedding(self, files: AdapterFiles, name: str, where: str) -> None:
        config = files.config
        kinds = set(files.modules[name])
        other = kinds - _EMBEDDING_KINDS - {"weight"}
        if other:
            raise AdapterError(f"{where}: {sorted(other)[0]} of an embedding is not served")
        if not kinds & _EMBEDDING_KINDS:
            return
        _check_pair(kinds, _EMBEDDING_KINDS, where)
        if not config.selects(name):
            raise AdapterError(f"{where} is not among target_modules of {config.where}: PEFT would pass over it")
        if config.use_dora:
            raise AdapterError(f"{where}: use_dora of an embedding is not served")
        if self._wanted and EMBEDDING not in self._wanted:
            allowed = ", ".join(sorted(self._wanted))
            raise AdapterError(f"{where}: --lora-target-modules are {allowed}, and don't have it")
        rank = config.rank(name)
        self._check_rank(rank, where)
        table = self._modules.embedding
        expected = {"lora_embedding_A": (rank, table.num_rows), "lora_embedding_B": (table.num_columns, rank)}
        _check_shapes(files, name, expected, where)

    def _check_copy(self, files: AdapterFiles, name: str, module: Module, where: str) -> None:
        """PEFT saves a copy of the base's own table beside an adapter of it; another one would be another model."""
        if "weight" not in files.modules[name]:
            return
        _check_shapes(files, name, {"weight": (module.num_rows, module.num_columns)}, where)
        if not self._is_own_table(self._modules.own_name(name), files.read(name, "weight")):
            raise AdapterError(
                f"{where}.base_layer.weight is not the model's own as far as this rank knows, and whole modules beside "
                "the adapter are not served; PEFT's save_embedding_layers=False leaves it out"
            )

    def _is_own_table(self, name: str, values: Tensor) -> bool:
        """Whether values [vocabulary, H] are those of the embedding, or the head; False where that isn't here."""
        rows = _own(self._modules.head[HEAD], values).to(self._model_dtype)
        if name == EMBEDDING:
            return self._parts.embedding is not None and torch.equal(self._parts.embedding.table, rows)
        head = self._parts.head
        return head is not None and torch.equal(AdaptedLinear(head, self._modules.head).weight(HEAD), rows.float())

    def _check_rank(self, rank: int, where: str) -> None:
        if rank > self._options.max_lora_rank:
            raise AdapterError(
                f"{where}: its rank is {rank}, and --max-lora-rank is {self._options.max_lora_rank}; "
                f"--max-lora-rank {rank} works"
            )

    def _check_complete(self, files: AdapterFiles, pieces: list[_Piece]) -> None:
        """Raise AdapterError where the config selects modules of which the file has nothing.

        Experts one by one are left out: whether they are linear layers to PEFT depends on the version of transformers.
        """
        config = files.config
        named = {own: piece.name for piece in pieces if piece.expert is None for own in piece.owns}
        prefix = next(filter(None, (self._modules.prefix_of(piece.name) for piece in pieces)), "")
        names = [name for name in self._modules.by_name if ".experts." not in name]
        absent = missing(files, [named.get(name) or (name if name == HEAD else f"{prefix}{name}") for name in names])
        embedding = named.get(EMBEDDING, f"{prefix}{EMBEDDING}")
        if not absent and config.selects(embedding) and "lora_embedding_A" not in files.modules.get(embedding, {}):
            absent = embedding
        if absent:
            raise AdapterError(f"{files.directory / TENSORS} has nothing of {absent}, which target_modules select")
        self._check_stacks(files, {_parameter(piece) for piece in pieces if piece.expert is not None}, prefix)

    def _check_stacks(self, files: AdapterFiles, found: set[str], prefix: str) -> None:
        """The same of parameters: each of target_parameters, and what it selects of one layer it does of all."""
        config = files.config
        ends = {re.sub(r".*\blayers\.\d+\.", "", name) for name in found}
        wanted = [f"{prefix}{layer}.{end}" for layer in self._modules.mixtures for end in sorted(ends)]
        lacking = [name for name in wanted if config.selects_parameter(name) and name not in found]
        lacking += [
            one for one in config.target_parameters if not any(f".{name}".endswith(f".{one}") for name in found)
        ]
        if lacking:
            what = printable(lacking[0], 200)
            raise AdapterError(f"{files.directory / TENSORS} has nothing of {what}, which target_parameters select")


def _ending(name: str) -> str:
    return name.rpartition(".")[2]


def _check_digest(directory: Path, digest: str) -> None:
    found = digest_of(directory)
    if found != digest:
        raise AdapterError(
            f"{directory} has changed since it was loaded: its digest is {found[:16]}, not {digest[:16]}"
        )


def _check_pair(kinds: set[str], pair: set[str], where: str) -> None:
    if kinds & pair and not pair <= kinds:
        raise AdapterError(f"{where} has {sorted(kinds & pair)[0]} alone; an adapter has {' and '.join(sorted(pair))}")


def _check_shapes(files: AdapterFiles, name: str, expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Of those kinds that are there."""
    for kind in sorted(set(files.modules[name]) & set(expected)):
        spec = files.spec(name, kind)
        assert spec is not None
        if spec.shape != expected[kind]:
            raise AdapterError(f"{where}: {kind} is {list(spec.shape)}; this model needs {list(expected[kind])}")


class _Reader:
    """A file's tensors; the last pair stays, since all experts of a stack are in one."""

    def __init__(self, files: AdapterFiles) -> None:
        self.files = files
        self._name = ""
        self._pair: tuple[Tensor, Tensor] | None = None

    def low_rank(self, piece: _Piece) -> tuple[Tensor, Tensor]:
        """A [r, K] and B [N, r] of all of its rows and columns."""
        if self._pair is None or self._name != piece.name:
            self._name = piece.name
            self._pair = self.files.read(piece.name, "lora_A"), self.files.read(piece.name, "lora_B")
        a, b = self._pair
        if piece.expert is None:
            return a, b
        rank = self.files.config.rank(_parameter(piece))
        count = len(a) // rank
        return a.view(count, rank, -1)[piece.expert], b.view(len(b), rank, count)[:, :, piece.expert]

    def scale(self, piece: _Piece) -> float:
        return self.files.config.scale(piece.name if piece.expert is None else _parameter(piece))


def _parameter(piece: _Piece) -> str:
    """The name of the experts' parameter that a stack adapts."""
    return f"{piece.name.removesuffix('.base_layer')}.{'down' if len(piece.owns) == 1 else 'gate_up'}_proj"


def _layer_adapter(reader: _Reader, layer: AdaptedLinear, pieces: list[_Piece]) -> LayerAdapter:
    """This rank's share of an adapter of a layer."""
    files = reader.files
    parts: list[LowRank] = []
    gain: Tensor | None = None
    shift: Tensor | None = None
    base = layer.linear.whole_bias
    for piece in pieces:
        own = piece.owns[0]
        module = layer.modules[own]
        first = layer.first_of(own)
        columns = slice(first, first + module.own_rows)
        part = None
        if files.spec(piece.name, "lora_A") is not None:
            a, b = _cut(*reader.low_rank(piece), [layer.modules[name] for name in piece.owns])
            part = LowRank(first, a, b, reader.scale(piece))
            parts.append(part)
        if part is not None and files.config.use_dora:
            gain = torch.ones(layer.num_rows) if gain is None else gain
            norm = (layer.weight(own) + delta(part)).norm(dim=1)
            gain[columns] = _own(module, files.read(piece.name, "lora_magnitude_vector").float()) / norm
        bias = None
        if files.spec(piece.name, "bias") is not None:
            bias = module.shard.of_bias(files.read(piece.name, "bias").float())
        if bias is not None or (gain is not None and base is not None):
            shift = torch.zeros(layer.num_rows) if shift is None else shift
            old = torch.zeros(layer.num_rows) if base is None else base.float()
            kept = old[columns] if bias is None else bias
            shift[columns] = kept - old[columns] * (1.0 if gain is None else gain[columns])
    return LayerAdapter(tuple(parts), gain, shift)


def _cut(a: Tensor, b: Tensor, modules: list[Module]) -> tuple[Tensor, Tensor]:
    """This rank's columns of A, or its rows of B, which are of these modules one behind the other."""
    if modules[0].is_sum:
        own = modules[0].shard.of(a)
        assert isinstance(own, Tensor)
        return own, b
    rows = torch.split(b, [module.num_rows for module in modules])
    return a, torch.cat([_own(module, part) for module, part in zip(modules, rows, strict=True)])


def _own(module: Module, rows: Tensor) -> Tensor:
    """This rank's rows."""
    if not module.shard.ranges:
        return rows
    return torch.cat([rows[begin:stop] for begin, stop in module.shard.ranges])
