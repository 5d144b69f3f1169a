"""The recipe that a model's sensitivity and a target give: measured, chosen, and compared with single schemes."""

from __future__ import annotations

from octavo.calibration.budget import best_in_budget, carried_bytes, cheapest_for_kl, measure
from octavo.calibration.candidates import candidates
from octavo.calibration.prepare import Calibration, Prepared
from octavo.calibration.progress import Progress
from octavo.calibration.recipe import Recipe
from octavo.calibration.target import Target
from octavo.calibration.target_bits import bits_budget
from octavo.jobs.memory import check_memory


def check_target(target: Target, planned: Prepared) -> None:
    """Raise RecipeError for a target that is out of reach, as far as that is known without measuring."""
    if target.kind == "kl":
        candidates(planned.recipe, flag=target.flag)
    else:
        bits_budget(target, planned.plan, planned.recipe)


def mixed_recipe(target: Target, planned: Prepared, calibration: Calibration, progress: Progress) -> Recipe:
    """The planned recipe with a scheme for each layer that holds the target. Raises RecipeError and QuantizeError."""
    check_memory(carried_bytes(calibration.runner), "a smaller model or a recipe of your own works")
    recipe = planned.recipe
    if target.kind == "kl":
        units = measure(planned, calibration, candidates(recipe, flag=target.flag), progress)
        return cheapest_for_kl(planned, calibration, units, target.value, progress)
    budget = bits_budget(target, planned.plan, recipe)
    units = measure(planned, calibration, candidates(recipe, budget, target.flag), progress)
    return best_in_budget(planned, calibration, units, budget, progress)
