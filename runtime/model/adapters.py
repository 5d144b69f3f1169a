"""Adapters over a model's linear layers: names mapped to fused layers, shapes checked, DoRA resolved, and slots filled.

An adapter's tensors are named by transformers' modules; here q, k, v and gate, up are one layer each, of whose output
every module has some columns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.kernels.lora.reference import LayerAdapter, LowRank, delta
from octavo.quant.adapter_files import TENSORS, AdapterError, digest_of
from octavo.quant.adapters import joined, make_slots
from octavo.quant.formats.peft import AdapterFiles, missing, open_adapter
from octavo.quant.linear import Linear
from octavo.quant.printable import printable
from octavo.runtime.lora_config import LoraOptions
from octavo.runtime.model.names import layer_linears
from octavo.runtime.model.sources import Source
from octavo.runtime.model.spec import DecoderSpec

# A text model's layers, in a model by itself or in one that sees, too.
_LAYER = re.compile(r"((?:(?:model|language_model|text_model)\.)*)(layers\.\d+\..+)")


@dataclass(frozen=True)
class AdaptedLinear:
    """A linear layer [N, K] that adapters may change.

    modules: the columns of each, by names such as layers.0.mlp.up_proj
    """

    linear: Linear
    modules: Mapping[str, int]
    num_columns: int

    @property
    def num_rows(self) -> int:
        return sum(self.modules.values())

    def first_of(self, module: str) -> int:
        """A module's first column of the output."""
        names = list(self.modules)
        return sum(self.modules[name] for name in names[: names.index(module)])

    def weight(self, module: str) -> Tensor:
        """[n, K] float32: a module's weight, as it is multiplied."""
        whole = torch.cat([part.weight.unpack() for part in self.linear.parts])
        first = self.first_of(module)
        return whole[first : first + self.modules[module]]


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter, ready to be put into a slot. layers: what each layer's slots have packed, by its number."""

    layers: Mapping[int, Any]
    num_bytes: int


class ModelAdapters:
    """The layers of a model that adapters may change, and their slots.

    recordable: whether steps whose tokens use adapters may be recorded.
    """

    def __init__(self, layers: Sequence[AdaptedLinear], options: LoraOptions, dtype: torch.dtype) -> None:
        wanted = set() if "all" in options.lora_target_modules else set(options.lora_target_modules)  # SGLang's "all"
        self.num_slots = options.max_loras
        self._all = {name for layer in layers for name in layer.modules}
        self._layers = [
            layer
            for layer in layers
            if ".experts." not in next(iter(layer.modules))
            and (not wanted or any(_ending(name) in wanted for name in layer.modules))
        ]
        self._wanted = wanted
        self._layer_of = {name: number for number, layer in enumerate(self._layers) for name in layer.modules}
        self._options = options
        self._dtype = {"auto": dtype, "float32": torch.float32, "float16": torch.float16}.get(
            options.lora_dtype, torch.bfloat16
        )
        self._in_slots: list[LoadedAdapter | None] = [None] * options.max_loras
        bodies = {self._give_slots(layer) for layer in self._layers}
        self.recordable = bodies <= {"cpu"}
        unknown = wanted - {_ending(name) for name in self._all}
        if unknown:
            known = ", ".join(sorted({_ending(name) for name in self._all}))
            raise ValueError(
                f"--lora-target-modules {sorted(unknown)[0]}: the model has no such module; it has {known}"
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

    @torch.inference_mode()
    def load(self, directory: Path, digest: str) -> LoadedAdapter:
        """Read and pack an adapter, in any thread. Raises AdapterError where it isn't one of this digest, or at all."""
        _check_digest(directory, digest)
        files = open_adapter(directory)
        modules = {self._known(files, name): name for name in files.modules}
        self._check_complete(files, modules)
        of_layers: dict[int, list[str]] = {}
        for name in modules:
            of_layers.setdefault(self._layer_of[name], []).append(name)
        packed: list[Any] = []
        numbers = sorted(of_layers)
        for number in numbers:
            slots = self._layers[number].linear.adapters
            assert slots is not None
            names = {name: modules[name] for name in of_layers[number]}
            packed.append(slots.pack(_layer_adapter(files, self._layers[number], names)))
        _check_digest(directory, digest)  # nobody has written to it meanwhile
        layers = dict(zip(numbers, joined(packed), strict=True))
        return LoadedAdapter(layers, sum(it.num_bytes for it in packed))

    def _known(self, files: AdapterFiles, name: str) -> str:
        """A module's name as the layers have it, once its tensors have been checked. Raises AdapterError."""
        where = f"{files.directory / TENSORS}: {printable(name, 200)}"
        match = _LAYER.fullmatch(name)
        own = match[2] if match is not None else name
        if ".experts." in own:
            raise AdapterError(f"{where}: adapters of a mixture's experts are not served")
        if own in ("lm_head", "embed_tokens") or _ending(own) in ("lm_head", "embed_tokens"):
            raise AdapterError(f"{where}: adapters of the head and of embeddings are not served")
        if own not in self._layer_of:
            if own in self._all:
                allowed = ", ".join(sorted(self._wanted))
                raise AdapterError(f"{where}: --lora-target-modules are {allowed}, and don't have it")
            raise AdapterError(f"{where}: the model has no such linear layer")
        layer = self._layers[self._layer_of[own]]
        self._check_shapes(files, name, (layer.modules[own], layer.num_columns), where)
        return own

    def _check_shapes(self, files: AdapterFiles, name: str, shape: tuple[int, int], where: str) -> None:
        config = files.config
        n, k = shape
        kinds = set(files.modules[name])
        low = {"lora_A", "lora_B"}
        if kinds & low and not low <= kinds:
            raise AdapterError(f"{where} has {sorted(kinds & low)[0]} alone; an adapter has lora_A and lora_B")
        if kinds & low and not config.selects(name):
            raise AdapterError(f"{where} is not among target_modules of {config.where}: PEFT would pass over it")
        if ("lora_magnitude_vector" in kinds) != (config.use_dora and bool(kinds & low)):
            raise AdapterError(f"{where}: use_dora is {config.use_dora}; a lora_magnitude_vector stands for DoRA alone")
        if "bias" in kinds and (config.bias == "none" or (config.bias == "lora_only" and not kinds & low)):
            raise AdapterError(f"{where} has a bias, and bias is {config.bias!r} in {config.where}")
        rank = config.rank(name)
        if kinds & low and rank > self._options.max_lora_rank:
            raise AdapterError(
                f"{where}: its rank is {rank}, and --max-lora-rank is {self._options.max_lora_rank}; "
                f"--max-lora-rank {rank} works"
            )
        expected = {"lora_A": (rank, k), "lora_B": (n, rank), "lora_magnitude_vector": (n,), "bias": (n,)}
        for kind in sorted(kinds):
            spec = files.spec(name, kind)
            assert spec is not None
            if spec.shape != expected[kind]:
                raise AdapterError(f"{where}: {kind} is {list(spec.shape)}; this model needs {list(expected[kind])}")

    def _check_complete(self, files: AdapterFiles, modules: Mapping[str, str]) -> None:
        """Raise AdapterError where the config selects modules of which the file has nothing."""
        one = next(iter(modules.values()))
        match = _LAYER.fullmatch(one)
        prefix = "" if match is None else match[1]
        absent = missing(files, [f"{prefix}{name}" for name in self._all if ".experts." not in name])
        if absent:
            raise AdapterError(f"{files.directory / TENSORS} has nothing of {absent}, which target_modules select")


def _ending(name: str) -> str:
    return name.rpartition(".")[2]


def _check_digest(directory: Path, digest: str) -> None:
    found = digest_of(directory)
    if found != digest:
        raise AdapterError(
            f"{directory} has changed since it was loaded: its digest is {found[:16]}, not {digest[:16]}"
        )


def _layer_adapter(files: AdapterFiles, layer: AdaptedLinear, names: Mapping[str, str]) -> LayerAdapter:
    """names: of the layer's modules, and in the file."""
    parts: list[LowRank] = []
    gain: Tensor | None = None
    shift: Tensor | None = None
    base = layer.linear.whole_bias
    for own, name in names.items():
        first = layer.first_of(own)
        columns = slice(first, first + layer.modules[own])
        part = None
        if files.spec(name, "lora_A") is not None:
            part = LowRank(first, files.read(name, "lora_A"), files.read(name, "lora_B"), files.config.scale(name))
            parts.append(part)
        if part is not None and files.config.use_dora:
            gain = torch.ones(layer.num_rows) if gain is None else gain
            norm = (layer.weight(own) + delta(part)).norm(dim=1)
            gain[columns] = files.read(name, "lora_magnitude_vector").float() / norm
        bias = files.read(name, "bias").float() if files.spec(name, "bias") is not None else None
        if bias is not None or (gain is not None and base is not None):
            shift = torch.zeros(layer.num_rows) if shift is None else shift
            old = torch.zeros(layer.num_rows) if base is None else base.float()
            kept = old[columns] if bias is None else bias
            shift[columns] = kept - old[columns] * (1.0 if gain is None else gain[columns])
    return LayerAdapter(tuple(parts), gain, shift)


def adapters_of(
    linears: Sequence[Mapping[str, Linear]], spec: DecoderSpec, source: Source, options: LoraOptions, dtype: torch.dtype
) -> ModelAdapters:
    """Over the linear layers of each of a decoder's layers, by their names in it. dtype: what it computes in."""
    found: list[AdaptedLinear] = []
    for index, of_layer in enumerate(linears):
        parts = layer_linears(spec, index, source.prefix, source.has)
        for name, linear in of_layer.items():
            modules = {full.removeprefix(source.prefix): rows for full, rows in parts[name].modules.items()}
            found.append(AdaptedLinear(linear, modules, parts[name].in_features))
    return ModelAdapters(found, options, dtype)
