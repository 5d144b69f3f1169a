"""The recipe that a model's sensitivity and a target give: measured, chosen, and compared with single schemes."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.calibration.budget import best_in_budget, cheapest_for_kl, measure_caches
from octavo.calibration.cache_choice import NO_CACHE, CacheRoom, cache_bits, cache_types
from octavo.calibration.candidates import candidates
from octavo.calibration.experts import cautious
from octavo.calibration.prepare import Calibration, Prepared
from octavo.calibration.progress import Progress
from octavo.calibration.recipe import Recipe, RecipeError
from octavo.calibration.sensitivity import carried_bytes, measure
from octavo.calibration.target import Streams, Target, in_gb
from octavo.calibration.target_bits import bits_budget
from octavo.jobs.memory import check_memory
from octavo.runtime.model.spec import DecoderSpec, LatentSpec


@dataclass(frozen=True)
class Mixing:
    """What a mixed recipe is to hold.

    streams      whose KV cache counts beside the weights; None: nobody's
    each_expert  an expert has a scheme of its own
    """

    target: Target
    streams: Streams | None = None
    each_expert: bool = False


def check_target(target: Target, planned: Prepared, streams: Streams | None = None) -> None:
    """Raise RecipeError for a target that is out of reach, as far as that is known without measuring."""
    if target.kind == "kl":
        candidates(planned.recipe, flag=target.flag)
    else:
        bits_budget(target, planned.plan, planned.recipe, cache_room(planned, streams))


def mixed_recipe(
    mixing: Mixing, planned: Prepared, calibration: Calibration, notes: list[str], progress: Progress
) -> Recipe:
    """The planned recipe with a scheme for each layer that holds the target. Raises RecipeError and QuantizeError.

    What a person should know is added to notes.
    """
    check_memory(carried_bytes(calibration.runner), "a smaller model or a recipe of your own works")
    recipe = planned.recipe
    target = mixing.target
    cache = cache_room(planned, mixing.streams)
    budget = 0.0 if target.kind == "kl" else bits_budget(target, planned.plan, recipe, cache)
    weights = sum(item.spec.numel for item in planned.plan.in_blocks)
    of_weights = budget - cache.most(budget * weights) / weights
    schemes = candidates(recipe, of_weights, target.flag)
    units = measure(planned, calibration, schemes, progress, each_expert=mixing.each_expert)
    if rare := [unit.name for unit in units if unit.is_rare]:
        notes.append(cautious(rare))
    if target.kind == "kl":
        return cheapest_for_kl(planned, calibration, units, target.value, progress)
    caches = measure_caches(planned, calibration, cache, progress)
    chosen = best_in_budget(planned, calibration, units, budget, progress, caches)
    if cache.streams is not None:
        size = in_gb(cache.bits[chosen.kv_cache] / 8)
        notes.append(f"KV cache of {cache.streams}: {chosen.kv_cache or 'as computed'}, {size}, counted in the target")
    return chosen


def cache_room(planned: Prepared, streams: Streams | None) -> CacheRoom:
    """The KV cache of streams, by the types that it may have. Raises RecipeError for longer ones than the model has."""
    if streams is None:
        return NO_CACHE
    spec = DecoderSpec.from_hf(planned.checkpoint.config)
    if streams.length > spec.max_position:
        raise RecipeError(
            f"--max-model-len {streams.length}: the model has {spec.max_position} positions; {spec.max_position} works"
        )
    keys = values = 0
    for _, mixer in spec.caches:
        tokens = streams.count * min(streams.length, mixer.window or streams.length)
        numbers = tokens * mixer.num_kv_heads * mixer.head_dim
        keys += numbers
        values += 0 if isinstance(mixer, LatentSpec) else numbers
    plain = 32 if spec.dtype == "float32" else 16
    types = cache_types(planned, spec.has_latents)
    bits = {kind: cache_bits(kind, keys, values, plain) for kind in types}
    return CacheRoom(keys + values, bits, streams)
