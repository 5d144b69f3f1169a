"""The schemes that mixed precision chooses from: those that one recipe may have beside one another."""

from __future__ import annotations

from octavo.calibration.recipe import KEEP, Recipe, RecipeError, parse_scheme

FLOATS = {
    "NVFP4": ("NVFP4", "FP8_DYNAMIC"),
    "NVFP4A16": ("NVFP4A16", "MXFP8A16"),
    "MXFP4": ("MXFP4", "MXFP8"),
    "MXFP4A16": ("MXFP4A16", "NVFP4A16", "MXFP8A16"),
}
"""Of four bits, and what layers get that mind them: each with inputs rounded, or each with inputs as they are."""


def candidates(recipe: Recipe, budget: float = 0, flag: str = "--bits-budget") -> list[str]:
    """The schemes to choose from. Of integers three bits and two, which lose most, only where the budget asks for them.

    Raises RecipeError for a recipe that leaves no choice, in the words of the flag that asked for one.
    """
    if recipe.format == "gguf":
        raise RecipeError(
            f"{flag} chooses among W3A16 to W8A16, and format gguf has schemes of its own; of those, Q4_K_M and its "
            "like are mixes"
        )
    if recipe.format in ("awq", "fp8"):
        raise RecipeError(
            f"{flag} gives layers different schemes, and format {recipe.format} has one for all; "
            "compressed-tensors and gptq have several"
        )
    if named := [pattern for pattern, scheme in recipe.layers.items() if scheme != KEEP]:
        raise RecipeError(
            f"{flag} chooses each layer's scheme, and layers has one for {named[0]}: leave it out, or say none there, "
            "which leaves such layers as they are"
        )
    own = own_candidate(recipe)
    if own in FLOATS:
        return list(FLOATS[own])
    base, _, group_size = own.partition("@")
    if not base.startswith("W4A16"):
        raise RecipeError(
            f"{flag} chooses among schemes around 4 bits, not {recipe.scheme}; W4A16 and W4A16_ASYM begin integers, "
            f"and {', '.join(FLOATS)} floats"
        )
    names = [own, f"W8A16@{group_size}"]
    if group_size != "32":
        names.insert(1, f"{base}@32")
    if budget < 4.6:
        names.insert(0, f"W3A16@{group_size}")
    if budget < 3.6:
        names.insert(0, f"W2A16@{group_size}")
    return names


def own_candidate(recipe: Recipe) -> str:
    """The candidate that is the recipe's own scheme: that of integers always has a group size."""
    base, _, size = recipe.scheme.upper().partition("@")
    weight = parse_scheme(recipe.scheme).weight
    return base if weight.is_float else f"{base}@{size or weight.granularity.group_size}"
