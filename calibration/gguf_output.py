"""Which blocks of a GGUF file hold which layer: llama.cpp's mixes, and what takes the place of blocks that don't fit.

Source: ggml-org/llama.cpp, `src/llama-quant.cpp`: the values, the down projections and the output head of some layers
have more bits; columns that are no whole super-blocks of 256 are in blocks of 32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from octavo.calibration.layers import LinearLayer, QuantizeError
from octavo.calibration.recipe import Recipe, means_layer
from octavo.quant.checkpoint import Checkpoint
from octavo.quant.formats.gguf import kind_of
from octavo.quant.gguf.file import EMBEDDING, HEAD
from octavo.quant.gguf.layout import make_layout
from octavo.quant.gguf.writer import GGUFLayout
from octavo.quant.model_files import CheckpointError
from octavo.quant.scheme import GGUF, QuantScheme
from octavo.quant.super_blocks import SUPER

FILE_TYPES = {
    "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17,
    "Q6_K": 18, "Q4_K": 14, "Q5_K": 16,
}  # fmt: skip
INSTEAD = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # in blocks of 32


def fitted(
    recipe: Recipe, linears: Mapping[str, LinearLayer], schemes: Mapping[str, QuantScheme | None]
) -> dict[str, QuantScheme | None]:
    """The layers' schemes with the mix's own for some, and others where blocks don't fit."""
    num_layers = max(linear.index for linear in linears.values()) + 1
    found = dict(schemes)
    for module, scheme in schemes.items():
        if scheme is None:
            continue
        linear = linears[module]
        kind = kind_of(scheme)
        if not any(means_layer(pattern, module, linear.kind) for pattern in recipe.layers):
            kind = _mixed(recipe.scheme.upper(), kind, linear, num_layers)
        found[module] = QuantScheme(GGUF[_fitting(kind, linear.in_features)])
    return found


def _mixed(mix: str, kind: str, linear: LinearLayer, num_layers: int) -> str:
    """What a layer has in a mix."""
    name = linear.kind.rpartition(".")[2]
    eighth = num_layers // 8
    more = linear.index < eighth or linear.index >= 7 * num_layers // 8 or (linear.index - eighth) % 3 == 2
    matters = name in ("v_proj", "down_proj", "w2")
    if mix in ("Q4_K_M", "Q5_K_M"):
        if name == "qkv_proj":
            return "Q5_K" if mix == "Q4_K_M" else "Q6_K"
        return "Q6_K" if matters and more else kind
    if mix == "Q4_K_S" and matters:
        return "Q5_K" if linear.index < (4 if name == "v_proj" else eighth) else kind
    return kind


def _fitting(kind: str, columns: int) -> str:
    return INSTEAD.get(kind, kind) if columns % SUPER else kind


def outside_kinds(recipe: Recipe, checkpoint: Checkpoint) -> dict[str, str]:
    """The kinds of blocks of the embedding and the output head, by the tensors' names."""
    base = kind_of(recipe.default)
    found = {}
    for name in (EMBEDDING, HEAD):
        if not checkpoint.has(name):
            continue
        columns = checkpoint.spec(name).shape[-1]
        is_head = name == HEAD or not checkpoint.has(HEAD)
        wanted = "Q8_0" if base == "Q8_0" else "Q6_K" if is_head else base
        if columns % 32 == 0:
            found[name] = _fitting(wanted, columns)
    return found


def layout_of(
    checkpoint: Checkpoint, recipe: Recipe, linears: Mapping[str, LinearLayer], schemes: Mapping[str, QuantScheme]
) -> GGUFLayout:
    """The file that a recipe gives. Raises QuantizeError for a model that a GGUF file can't hold."""
    in_blocks = {
        module: (kind_of(scheme), (linears[module].out_features, linears[module].in_features))
        for module, scheme in schemes.items()
    }
    plain = {
        name: checkpoint.spec(name)
        for name in sorted(checkpoint.names)
        if name.removesuffix(".weight") not in in_blocks or not name.endswith(".weight")
    }
    rounded = outside_kinds(recipe, checkpoint)
    file_type = FILE_TYPES[recipe.scheme.upper() if recipe.scheme.upper() in FILE_TYPES else kind_of(recipe.default)]
    try:
        return make_layout(checkpoint.directory, checkpoint.config, plain, rounded, in_blocks, file_type)
    except CheckpointError as e:
        raise QuantizeError(f"format gguf: {e}") from e


def replaced(recipe: Recipe, linears: Mapping[str, LinearLayer], schemes: Mapping[str, QuantScheme]) -> list[str]:
    """A line for each kind of blocks that stands in another's place, for a person."""
    counts: Counter[tuple[str, int]] = Counter()
    wanted = recipe.schemes_of({module: linears[module].kind for module in schemes})
    for module, scheme in schemes.items():
        columns = linears[module].in_features
        kind = kind_of(scheme)
        asked = wanted[module]
        if columns % SUPER and asked is not None and kind in INSTEAD.values() and kind_of(asked) in INSTEAD:
            counts[kind, columns] += 1
    return [
        f"{count} layers of {columns} columns are in blocks of {kind}, as llama.cpp has it: super-blocks hold {SUPER}"
        for (kind, columns), count in counts.items()
    ]
