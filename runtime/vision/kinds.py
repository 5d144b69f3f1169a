"""Model types that see: what is made of a checkpoint's config and of how its images are resized."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from octavo.runtime.vision.modules import (
    AnyResolutionModule,
    Gemma4Module,
    GemmaModule,
    IdeficsModule,
    InternModule,
    Llama4Module,
    LlavaModule,
    Mistral3Module,
    QwenModule,
)
from octavo.runtime.vision.preprocessing import (
    ANY_RESOLUTION_PROCESSORS,
    CLIP_PROCESSORS,
    GEMMA4_PROCESSORS,
    GEMMA_PROCESSORS,
    HALF,
    IDEFICS_PROCESSORS,
    INTERN_PROCESSORS,
    LLAMA4_PROCESSORS,
    PIXTRAL_PROCESSORS,
    QWEN_PROCESSORS,
    SIGLIP_PROCESSORS,
    Preprocessing,
    UnreadImagesError,
)
from octavo.runtime.vision.recipes import (
    AnyResolution,
    Canvas,
    Grid,
    Lines,
    Recipe,
    Sight,
    Squared,
    Tiles,
    VisionModel,
    WholeImage,
    WholePatches,
    WithinBudget,
)

MOST_SQUARES = 256  # of an image; the grids of so many are compared in 30 ms
MAX_LONGEST = 4096  # of an image's longer side, beyond which Idefics 3's processor resizes it once more


def _clip_or_siglip(config: Any) -> str:
    kind: str = config.vision_config.model_type
    if kind not in ("clip_vision_model", "siglip_vision_model"):
        raise UnreadImagesError(
            f"{config.model_type} with a vision tower of type {kind} is not supported; clip and siglip are"
        )
    return kind


def _check_tower(config: Any, kind: str) -> None:
    """Refuse a tower of another type, which transformers would make of any config."""
    found = config.vision_config.model_type
    if found != kind:
        raise UnreadImagesError(f"{config.model_type} with a vision tower of type {found} is not supported; {kind} is")


def _llava(config: Any, given: Preprocessing) -> tuple[WholeImage, MakeModule]:
    kind = _clip_or_siglip(config)
    given.check_kind(CLIP_PROCESSORS + SIGLIP_PROCESSORS)
    size = given.size("size")
    crops = bool(given.values.get("do_center_crop", given.kind not in SIGLIP_PROCESSORS))
    box = given.size("crop_size") if crops else size
    side = config.vision_config.image_size
    if (box.get("width"), box.get("height")) != (side, side) or not (
        size == box or (crops and "shortest_edge" in size)
    ):
        raise UnreadImagesError(
            f"preprocessor_config.json: size {size} and crop_size {box if crops else None} don't make each image "
            f"{side} x {side} pixels, as the tower sees it"
        )
    shorter = None if size == box else size["shortest_edge"]
    patches = (side // config.vision_config.patch_size) ** 2
    count = patches + (kind == "clip_vision_model") - (config.vision_feature_select_strategy == "default")
    return WholeImage((side, side), shorter, given.resample, count), LlavaModule


def _qwen(config: Any, given: Preprocessing) -> tuple[WholePatches, MakeModule]:
    given.check_kind(QWEN_PROCESSORS)
    vision = config.vision_config
    if "mrope_section" not in config.text_config.rope_parameters:
        raise UnreadImagesError("the config's rope has no mrope_section, by which images' tokens are rotated")
    if len(getattr(vision, "deepstack_visual_indexes", ())) >= config.text_config.num_hidden_layers:
        raise UnreadImagesError("deepstack_visual_indexes: the decoder has no layer behind those that features go to")
    given.check_same("patch_size", vision.patch_size)
    given.check_same("merge_size", vision.spatial_merge_size)
    given.check_same("temporal_patch_size", vision.temporal_patch_size)
    size = given.size("size")
    least = given.values.get("min_pixels") or size.get("shortest_edge") or 56 * 56
    most = given.values.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280
    return WholePatches(vision.patch_size * vision.spatial_merge_size, least, most, given.resample), QwenModule


def _idefics(config: Any, given: Preprocessing) -> tuple[Tiles, MakeModule]:
    given.check_kind(IDEFICS_PROCESSORS)
    vision = config.vision_config
    longest = given.size("size").get("longest_edge")
    side = (given.values.get("max_image_size") or {}).get("longest_edge")
    if longest is None or not 1 <= longest <= MAX_LONGEST or side != vision.image_size:
        raise UnreadImagesError(
            f"preprocessor_config.json: longest_edge {longest} in squares of {side} is not supported; up to "
            f"{MAX_LONGEST}, in squares of {vision.image_size}, as the tower sees them, is"
        )
    count = (side // vision.patch_size) ** 2 // config.scale_factor**2
    return Tiles(longest, side, given.values.get("do_image_splitting", True), given.resample, count), IdeficsModule


def _mistral3(config: Any, given: Preprocessing) -> tuple[Lines, MakeModule]:
    given.check_kind(PIXTRAL_PROCESSORS)
    if config.vision_config.model_type != "pixtral":
        raise UnreadImagesError(
            f"mistral3 with a vision tower of type {config.vision_config.model_type}; pixtral is known"
        )
    longest = given.size("size").get("longest_edge")
    if longest is None or longest > config.vision_config.image_size:
        raise UnreadImagesError(
            f"preprocessor_config.json: longest_edge {longest}; the tower's images have up to "
            f"{config.vision_config.image_size} pixels a side"
        )
    return Lines(longest, config.vision_config.patch_size * config.spatial_merge_size, given.resample), Mistral3Module


def _internvl(config: Any, given: Preprocessing) -> tuple[Grid, MakeModule]:
    given.check_kind(INTERN_PROCESSORS)
    _check_tower(config, "internvl_vision")
    vision = config.vision_config
    side = vision.image_size[0]
    size = given.size("size")
    layer = config.vision_feature_layer
    if (size.get("width"), size.get("height")) != (side, side) or layer != -1 or config.downsample_ratio != 0.5:
        raise UnreadImagesError(
            f"size {size} with vision_feature_layer {layer} and downsample_ratio {config.downsample_ratio} is not "
            f"supported; squares of {side}, the last layer and 0.5 are"
        )
    most = int(given.values.get("max_patches") or 12)  # whatever crop_to_patches says: InternVL's processor sets it
    if most > MOST_SQUARES:
        raise UnreadImagesError(f"preprocessor_config.json: max_patches {most}; {MOST_SQUARES} are the most")
    least = min(int(given.values.get("min_patches") or 1), most)
    count = (side // vision.patch_size[0]) ** 2 // 4
    return Grid(side, least, most, given.resample, count), InternModule


def _gemma3(config: Any, given: Preprocessing) -> tuple[WholeImage, MakeModule]:
    given.check_kind(GEMMA_PROCESSORS)
    _check_tower(config, "siglip_vision_model")
    side = config.vision_config.image_size
    size = given.size("size")
    if (size.get("width"), size.get("height")) != (side, side) or given.values.get("do_pan_and_scan"):
        raise UnreadImagesError(
            f"preprocessor_config.json: size {size}, or do_pan_and_scan, is not supported; {side} x {side} alone is"
        )
    behind = "<end_of_image>\n\n"
    count = config.mm_tokens_per_image
    return WholeImage((side, side), None, given.resample, count, "\n\n<start_of_image>", behind), GemmaModule


def _llava_next(config: Any, given: Preprocessing) -> tuple[AnyResolution, MakeModule]:
    _clip_or_siglip(config)
    given.check_kind(ANY_RESOLUTION_PROCESSORS)
    side = config.vision_config.image_size
    sizes = [given.size(name) for name in ("size", "crop_size")]
    if any(set(size.values()) not in (set(), {side}) for size in sizes) or not sizes[0]:
        raise UnreadImagesError(f"preprocessor_config.json: size {sizes[0]} and crop_size {sizes[1]} aren't {side}")
    points = config.image_grid_pinpoints
    if not points or any(len(point) != 2 or any(one < side or one % side for one in point) for point in points):
        raise UnreadImagesError(f"image_grid_pinpoints: {points[:4]} are not in squares of {side}, as the tower's")
    if given.values.get("image_grid_pinpoints", points) != points:
        raise UnreadImagesError("preprocessor_config.json: image_grid_pinpoints are not those of config.json")
    grids = tuple((width // side, height // side) for height, width in points)
    if (most := max(columns * rows for columns, rows in grids)) > MOST_SQUARES or len(grids) > MOST_SQUARES:
        raise UnreadImagesError(f"image_grid_pinpoints: {most} squares in {len(grids)} grids; {MOST_SQUARES} are most")
    patches = side // config.vision_config.patch_size
    recipe = AnyResolution(side, grids, patches, given.resample, _most_squares(config))
    return recipe, partial(AnyResolutionModule, recipe=recipe)


def _most_squares(config: Any) -> int:
    """Of LLaVA-OneVision's images; 0: LLaVA-NeXT bounds none."""
    if config.model_type == "llava_next":
        return 0
    most = config.vision_aspect_ratio.removeprefix("anyres_max_")
    if not most.isdecimal() or not 0 < int(most) <= MOST_SQUARES:
        raise UnreadImagesError(f"vision_aspect_ratio {config.vision_aspect_ratio!r}: anyres_max_9 is what is known")
    return int(most)


def of_several(recipe: Recipe, config: Any, given: Preprocessing) -> Recipe | None:
    """How images are seen in prompts with more than one; None: as one is."""
    if config.model_type != "llava_onevision" or not isinstance(recipe, AnyResolution):
        return None
    red, green, blue = (int(255 * mean) for mean in given.mean)
    return Squared(recipe.side, (red, green, blue), recipe.resample, recipe.patches**2 + 1)


def _paligemma(config: Any, given: Preprocessing) -> tuple[WholeImage, MakeModule]:
    given.check_kind(SIGLIP_PROCESSORS)
    vision = config.vision_config
    side = vision.image_size
    size = given.size("size")
    if vision.model_type != "siglip_vision_model" or (size.get("width"), size.get("height")) != (side, side):
        raise UnreadImagesError(
            f"preprocessor_config.json: size {size} with a vision tower of type {vision.model_type} is not supported; "
            f"{side} x {side}, as the tower sees it, and siglip are"
        )
    count = (side // vision.patch_size) ** 2
    return WholeImage((side, side), None, given.resample, count), GemmaModule


def _gemma4(config: Any, given: Preprocessing) -> tuple[WithinBudget, MakeModule]:
    given.check_kind(GEMMA4_PROCESSORS)
    vision = config.vision_config
    given.check_same("patch_size", vision.patch_size)
    given.check_same("pooling_kernel_size", vision.pooling_kernel_size)
    most = int(given.values.get("max_soft_tokens") or 280)
    if not 0 < most * vision.pooling_kernel_size <= vision.position_embedding_size:
        raise UnreadImagesError(
            f"preprocessor_config.json: max_soft_tokens {most}; the tower has {vision.position_embedding_size} "
            f"positions a side, for {vision.pooling_kernel_size} patches each"
        )
    if given.values.get("do_normalize") and (given.mean, given.std) != ((0, 0, 0), (1, 1, 1)):
        raise UnreadImagesError("preprocessor_config.json: image_mean and image_std: the tower itself normalizes")
    given.mean = given.std = HALF  # as the tower does
    factor = vision.patch_size * vision.pooling_kernel_size
    before = given.token("boi_token", "<|image>")
    behind = given.token("eoi_token", "<image|>")
    return WithinBudget(factor, most, given.resample, before, behind), Gemma4Module


def _llama4(config: Any, given: Preprocessing) -> tuple[Canvas, MakeModule]:
    given.check_kind(LLAMA4_PROCESSORS)
    vision = config.vision_config
    side = vision.image_size
    size = given.size("size") or {"height": side, "width": side}
    most = int(given.values.get("max_patches") or 16)
    if (size.get("width"), size.get("height")) != (side, side) or not 0 < most <= MOST_SQUARES:
        raise UnreadImagesError(
            f"preprocessor_config.json: size {size} with max_patches {most} is not supported; squares of {side}, as "
            f"the tower sees them, and {MOST_SQUARES} at most are"
        )
    count = (side // vision.patch_size) ** 2 // round(1 / vision.pixel_shuffle_ratio**2)
    grows = bool(given.values.get("resize_to_max_canvas"))
    return Canvas(side, most, grows, given.resample, count), Llama4Module


def mark_of(config: Any, given: Preprocessing) -> int:
    """The token that chat templates write once for an image."""
    if config.model_type == "llama4":
        return given.token_id("<|image|>")
    return int(config.boi_token_index if config.model_type == "gemma3" else config.image_token_id)


def sight_of(config: Any) -> Sight:
    """What an image's tokens see in this model's text half."""
    if config.model_type in ("gemma3", "paligemma"):
        return "image" if config.model_type == "gemma3" else "prompt"
    is_gemma4 = config.model_type == "gemma4" and config.text_config.use_bidirectional_attention == "vision"
    return "image_in_windows" if is_gemma4 else "past"


def vision_model_of(config: Any, given: Preprocessing, most_images: int) -> tuple[VisionModel, MakeModule]:
    """What a server is told of a checkpoint, and what makes its tower. Raises UnreadImagesError."""
    recipe, make = MAKERS[config.model_type](config, given)
    begins_with = given.token("bos_token", "<bos>") if config.model_type == "paligemma" else None
    mark = mark_of(config, given)
    several = of_several(recipe, config, given)
    facts = VisionModel(recipe, config.image_token_id, mark, most_images, sight_of(config), several, begins_with)
    return facts, make


MakeModule = Callable[[Any], nn.Module]
Maker = Callable[[Any, Preprocessing], tuple[Recipe, MakeModule]]
MAKERS: dict[str, Maker] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_next,
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "qwen3_vl_moe": _qwen,
    "qwen3_5": _qwen,
    "qwen3_5_moe": _qwen,
    "idefics3": _idefics,
    "smolvlm": _idefics,
    "mistral3": _mistral3,
    "internvl": _internvl,
    "llama4": _llama4,
    "gemma3": _gemma3,
    "paligemma": _paligemma,
    "gemma4": _gemma4,
}
"""By model type: what is made of a checkpoint's config and its preprocessing."""
