"""The plan of a quantization: every tensor of the source, what becomes of it, in which unit of work, in which file.

All sizes are known before anything is written (QuantFormat.tensors), and the same recipe always gives the same plan,
which is what a resumed run relies on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from octavo.calibration.choices import Outside
from octavo.calibration.gguf_output import fitted, layout_of
from octavo.calibration.head import other_embeddings, select_embedding, select_head
from octavo.calibration.layers import (
    BLOCK,
    LinearLayer,
    QuantizeError,
    Selection,
    check_group_size,
    select_linears,
    select_towers,
)
from octavo.calibration.output import make_format
from octavo.calibration.recipe import Recipe, RecipeError, means_layer
from octavo.quant.checkpoint import SINGLE, Checkpoint
from octavo.quant.gguf.file import GGUF
from octavo.quant.gguf.writer import GGUFLayout, GGUFWriter
from octavo.quant.mtp_names import is_mtp
from octavo.quant.safetensors_file import PlacedWriter, SafetensorsWriter, TensorSpec
from octavo.quant.scheme import QuantScheme
from octavo.quant.tensor_file import TensorFile

OUTSIDE = "outside"  # the unit of all that stands in no block
STATES = {"linear_attention", "mamba", "conv"}  # kinds of layers without keys and values


@dataclass(frozen=True)
class Item:
    """One tensor of the source, and what becomes of it: the same, or a linear layer's tensors."""

    name: str
    file: TensorFile
    linear: LinearLayer | None
    scheme: QuantScheme | None
    outputs: Mapping[str, TensorSpec]

    @property
    def spec(self) -> TensorSpec:
        return self.file.specs[self.name]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.outputs.values())


@dataclass(frozen=True)
class Unit:
    """One unit of work, finished or lost as a whole. index: the block's; scales: names of its KV-cache scales."""

    name: str
    index: int | None
    items: tuple[Item, ...]
    scales: Mapping[str, TensorSpec]

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(item.spec.nbytes for item in self.items)


@dataclass(frozen=True)
class Plan:
    """units in the order of work; shards: file name -> its tensors."""

    units: tuple[Unit, ...]
    shards: Mapping[str, Mapping[str, TensorSpec]]
    selection: Selection
    schemes: Mapping[str, QuantScheme]
    layout: GGUFLayout | None = None  # of a GGUF file, which is one shard

    def writer(self, path: Path, specs: Mapping[str, TensorSpec], *, again: bool) -> PlacedWriter:
        """A writer of one of the shards; again: the file exists already."""
        if self.layout is not None:
            return GGUFWriter(path, self.layout, again=again)
        return SafetensorsWriter(path, specs, again=again)

    @property
    def bytes_before(self) -> int:
        return sum(unit.nbytes for unit in self.units)

    @property
    def bytes_after(self) -> int:
        return sum(spec.nbytes for specs in self.shards.values() for spec in specs.values())

    @property
    def in_blocks(self) -> list[Item]:
        """The decoder's quantized layers, whose schemes a target may choose; what is outside has its own."""
        linears = self.selection.linears
        items = (item for unit in self.units for item in unit.items)
        return [item for item in items if item.linear is not None and item.linear.module in linears]

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights that are quantized."""
        return next(item.spec.dtype for unit in self.units for item in unit.items if item.linear is not None)


def make_plan(checkpoint: Checkpoint, recipe: Recipe, max_shard_bytes: int) -> Plan:
    """Raises QuantizeError for layers that the recipe doesn't fit."""
    selection, schemes = _schemes(select_linears(checkpoint, list(recipe.ignore)), recipe)
    for scheme in dict.fromkeys(schemes.values()):
        check_group_size(scheme, {m: x for m, x in selection.linears.items() if schemes[m] == scheme})
    outside = _outside(checkpoint, recipe, schemes)
    kept = [name for name in selection.ignore if name not in outside]
    kept += other_embeddings(checkpoint) if "embedding" in recipe.outside else []
    selection = Selection(selection.linears, kept)
    layout = layout_of(checkpoint, recipe, selection.linears, schemes) if recipe.format == "gguf" else None
    units = _units(checkpoint, recipe, selection, outside, schemes, {} if layout is None else layout.specs)
    shards = _shards(units, max_shard_bytes) if layout is None else {GGUF: layout.specs}
    return Plan(units, shards, selection, schemes, layout)


def _outside(checkpoint: Checkpoint, recipe: Recipe, schemes: dict[str, QuantScheme]) -> dict[str, LinearLayer]:
    """What is in no block of the decoder and quantized, too: of towers, head, embedding. Their schemes are added."""
    outside: dict[str, LinearLayer] = {}
    for name, scheme in recipe.outside.items():
        found = _SELECT[name](checkpoint, list(recipe.ignore))
        check_group_size(scheme, found)
        schemes |= dict.fromkeys(found, scheme)
        outside |= found
    return outside


_SELECT: dict[Outside, Callable[[Checkpoint, list[str]], dict[str, LinearLayer]]] = {
    "towers": select_towers,
    "lm_head": select_head,
    "embedding": select_embedding,
}


def _schemes(selection: Selection, recipe: Recipe) -> tuple[Selection, dict[str, QuantScheme]]:
    """Each layer's scheme; what a recipe's `layers` leave as they are goes to the ignored."""
    every = selection.linears
    names = {name for m, x in every.items() for name in (m, x.kind, x.kind.rpartition(".")[2])}
    patterns = [p for p in recipe.layers if p not in names]
    unused = [p for p in patterns if not any(means_layer(p, m, x.kind) for m, x in every.items())]
    if unused:
        raise QuantizeError(f"recipe: {' '.join(unused)} matches no linear layer that is to be quantized")
    found = recipe.schemes_of({module: linear.kind for module, linear in every.items()})
    if recipe.format == "gguf":
        found = fitted(recipe, every, found)
    schemes = {module: scheme for module, scheme in found.items() if scheme is not None}
    if not schemes:
        raise QuantizeError("nothing is left to quantize: the recipe leaves every linear layer as it is")
    kept = [module for module in every if module not in schemes]
    return Selection({m: every[m] for m in schemes}, selection.ignore + kept), schemes


def _units(
    checkpoint: Checkpoint,
    recipe: Recipe,
    selection: Selection,
    outside: Mapping[str, LinearLayer],
    schemes: Mapping[str, QuantScheme],
    changed: Mapping[str, TensorSpec],
) -> tuple[Unit, ...]:
    """All tensors in the source's order, by block; changed: what tensors that aren't quantized become. outside: as
    of `_outside`.
    """
    linears = {**selection.linears, **outside}
    stacks = _stacks(checkpoint, selection)
    members: dict[tuple[int, int] | None, list[Item]] = {None: []}
    for file in checkpoint.files.values():
        for name, spec in file.specs.items():
            match = BLOCK.match(f"{name}.weight")  # tensors of a block itself have no module within it
            stack = None if match is None else stacks.get(f"{match['prefix']}{match['list']}")
            is_own = stack is not None and not is_mtp(name, checkpoint.config)
            place = (stack, int(match["index"])) if match is not None and stack is not None and is_own else None
            linear = linears.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            members.setdefault(place, []).append(_item(name, file, changed.get(name, spec), recipe, linear, schemes))
    rest = Unit(OUTSIDE, None, tuple(members.pop(None)), {})
    prefixes = {stack: prefix for prefix, stack in reversed(stacks.items())}
    places = sorted(place for place in members if place is not None)
    num_first = sum(stack == 0 for stack, _ in places)
    units = []
    for stack, number in places:
        name = f"{prefixes[stack]}.{number}"
        scales = _scale_specs(recipe, f"{name}.self_attn", checkpoint)
        units.append(Unit(name, number if stack == 0 else num_first + number, tuple(members[stack, number]), scales))
    return rest, *units


def _stacks(checkpoint: Checkpoint, selection: Selection) -> dict[str, int]:
    """By the names of lists of blocks, which stack each is: an encoder's is 0, and its decoder's, computed later, 1.

    A model without an encoder has one stack, whatever its lists are called.
    """
    if not checkpoint.layout.has_encoder:
        return {linear.module.partition(f".{linear.index}.")[0]: 0 for linear in selection.linears.values()}
    matches = [match for name in checkpoint.names if (match := BLOCK.match(name)) is not None]
    return {f"{m['prefix']}{m['list']}": int(not m["prefix"].endswith("encoder.")) for m in matches}


def _item(
    name: str,
    file: TensorFile,
    spec: TensorSpec,
    recipe: Recipe,
    linear: LinearLayer | None,
    schemes: Mapping[str, QuantScheme],
) -> Item:
    if linear is None:
        return Item(name, file, None, None, {name: spec})
    scheme = schemes[linear.module]
    try:
        planned = make_format(recipe, scheme, spec.dtype).tensors(linear.out_features, linear.in_features)
    except ValueError as e:
        raise QuantizeError(
            f"{linear.module} [{linear.out_features}, {linear.in_features}]: {e}; format compressed-tensors takes any "
            f"shape, and --ignore {linear.kind.rpartition('.')[2]} leaves such layers as they are"
        ) from e
    return Item(name, file, linear, scheme, {f"{linear.module}.{suffix}": out for suffix, out in planned.items()})


def _scale_specs(recipe: Recipe, attention: str, checkpoint: Checkpoint) -> dict[str, TensorSpec]:
    """KV-cache scales as compressed-tensors names and shapes them."""
    kv = recipe.kv
    if kv is None:
        return {}
    heads = scaled_heads(checkpoint)
    spec = TensorSpec(torch.float32, (heads, 1, 1) if kv.per_head else (1,))
    sides = {"k_scale": kv.key, "v_scale": kv.value}
    return {f"{attention}.{name}": spec for name, dtype in sides.items() if dtype != "bf16"}


def scaled_heads(checkpoint: Checkpoint) -> int:
    """How many KV heads a layer has. Raises RecipeError for a model whose KV cache no scales are made for."""
    text = checkpoint.config.get("text_config") or checkpoint.config
    if text.get("kv_lora_rank"):
        raise RecipeError(
            "kv_cache: the cache of this model holds latents, for which a checkpoint has no scales; leave it out, and "
            "octavo serve --kv-cache-dtype fp8_e4m3 measures one"
        )
    if text.get("num_kv_shared_layers") or text.get("global_head_dim") or text.get("per_layer_config"):
        raise RecipeError(
            "kv_cache: layers of this model have caches of several kinds, for which no scales are made; leave it out, "
            "and octavo serve --kv-cache-dtype fp8_e4m3 measures some"
        )
    kinds = text.get("layer_types") or text.get("layers_block_type") or ()
    if text.get("linear_num_key_heads") or STATES.intersection(kinds):
        raise RecipeError(
            "kv_cache: layers of this model have states instead of keys and values, and scales are measured in all "
            "layers or none; leave it out, and octavo serve --kv-cache-dtype fp8_e4m3 measures those that there are"
        )
    heads = text.get("num_key_value_heads") or text.get("num_attention_heads")
    if not isinstance(heads, int):
        raise RecipeError("config.json has no num_key_value_heads: KV-cache scales can't be made")
    return heads


def _shards(units: tuple[Unit, ...], most: int) -> dict[str, dict[str, TensorSpec]]:
    """Files of at most `most` bytes in the order of the units; a larger tensor has a file of its own."""
    pieces = [(item.outputs, item.nbytes) for unit in units for item in unit.items]
    pieces += [(unit.scales, sum(s.nbytes for s in unit.scales.values())) for unit in units if unit.scales]
    shards: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for specs, nbytes in pieces:
        if shards[-1] and size + nbytes > most:
            shards.append({})
            size = 0
        shards[-1].update(specs)
        size += nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards)}


def weight_map(plan: Plan) -> dict[str, object]:
    """The index file's content, for more than one shard."""
    names = {tensor: shard for shard, specs in plan.shards.items() for tensor in specs}
    return {"metadata": {"total_size": plan.bytes_after}, "weight_map": dict(sorted(names.items()))}


def source_digest(checkpoint: Checkpoint) -> str:
    """A hash of what tells a source from another without reading it: config, names, shapes, and the files' times."""
    files = [
        [name, file.size, file.path.stat().st_mtime_ns, [[n, str(s.dtype), s.shape] for n, s in file.specs.items()]]
        for name, file in checkpoint.files.items()
    ]
    return hashlib.sha256(
        json.dumps([checkpoint.config, checkpoint.source, files], sort_keys=True).encode()
    ).hexdigest()
