"""The original as a recipe's rotations make it: the runtime knows who is to be rotated, calibration how."""

from __future__ import annotations

from octavo.calibration.layers import QuantizeError
from octavo.calibration.recipe import Recipe
from octavo.calibration.rotated import rotated
from octavo.quant.checkpoint import Checkpoint
from octavo.runtime.model.rotation_map import rotation_map


def rotated_source(checkpoint: Checkpoint, recipe: Recipe, notes: list[str]) -> Checkpoint:
    """The checkpoint with the recipe's rotations folded into it; notes: what a person should know of it.

    Raises QuantizeError for a model that can't be rotated so.
    """
    if not recipe.rotations:
        return checkpoint
    try:
        wiring = rotation_map(checkpoint, recipe.rotations)
    except ValueError as e:  # what a rotation would change, or an architecture that isn't known
        raise QuantizeError(str(e)) from e
    turned = rotated(checkpoint, wiring, recipe)
    notes += turned.notes
    if turned.transforms:
        notes.append(
            "R4: the input of down_proj is rotated while serving, which vLLM and octavo on a CPU do; transformers 5.24 "
            "does not read transform_config, and computes another model"
        )
    return turned
