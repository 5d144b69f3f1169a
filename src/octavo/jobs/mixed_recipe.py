"""The recipe that a model's sensitivity and a target give: measured, chosen, and compared with single schemes."""

from __future__ import annotations

from octavo.calibration.budget import best_in_budget, cheapest_for_kl
from octavo.calibration.candidates import candidates
from octavo.calibration.experts import cautious
from octavo.calibration.prepare import Calibration, Prepared
from octavo.calibration.progress import Progress
from octavo.calibration.recipe import Recipe
from octavo.calibration.sensitivity import carried_bytes, measure
from octavo.calibration.target import Target
from octavo.calibration.target_bits import bits_budget
from octavo.jobs.memory import check_memory


def check_target(target: Target, planned: Prepared) -> None:
    """Raise RecipeError for a target that is out of reach, as far as that is known without measuring."""
    if target.kind == "kl":
        candidates(planned.recipe, flag=target.flag)
    else:
        bits_budget(target, planned.plan, planned.recipe)


def mixed_recipe(
    target: Target,
    planned: Prepared,
    calibration: Calibration,
    progress: Progress,
    *,
    each_expert: bool,
    notes: list[str],
) -> Recipe:
    """The planned recipe with a scheme for each layer that holds the target. Raises RecipeError and QuantizeError.

    each_expert: a scheme for each expert of a mixture, too. What a person should know is added to notes.
    """
    check_memory(carried_bytes(calibration.runner), "a smaller model or a recipe of your own works")
    recipe = planned.recipe
    budget = 0.0 if target.kind == "kl" else bits_budget(target, planned.plan, recipe)
    schemes = candidates(recipe, budget, target.flag)
    units = measure(planned, calibration, schemes, progress, each_expert=each_expert)
    if rare := [unit.name for unit in units if unit.is_rare]:
        notes.append(cautious(rare))
    if target.kind == "kl":
        return cheapest_for_kl(planned, calibration, units, target.value, progress)
    return best_in_budget(planned, calibration, units, budget, progress)
