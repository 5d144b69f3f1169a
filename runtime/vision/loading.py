"""A checkpoint's tower: which one it is, how its images are resized, and its weights.

A model whose tower or preprocessing isn't known here is served without images, with a note that says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from octavo.quant.checkpoint import read_config
from octavo.quant.model_files import read_object_if_any
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.sources import CheckpointSource, LoadError, some
from octavo.runtime.vision.recipes import (
    AnyResolution,
    Grid,
    Lines,
    Recipe,
    Squared,
    Tiles,
    VisionModel,
    WholeImage,
    WholePatches,
)
from octavo.runtime.vision.towers import (
    AnyResolutionModule,
    GemmaModule,
    IdeficsModule,
    InternModule,
    LlavaModule,
    Mistral3Module,
    QwenModule,
    VisionTower,
)

BICUBIC = 3
LANCZOS = 1
BILINEAR = 2
FILTERS = 6  # of Pillow, by number
MOST_LAYERS = 1000
MOST_SIZE = 1 << 28  # of whatever else a tower's config counts
MOST_SQUARES = 256  # of an image; the grids of so many are compared in 30 ms
MAX_LONGEST = 4096  # of an image's longer side, beyond which Idefics 3's processor resizes it once more
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
SIGLIP_PROCESSORS = ("SiglipImageProcessor",)
CLIP_PROCESSORS = ("CLIPImageProcessor", "LlavaImageProcessor")
QWEN_PROCESSORS = ("Qwen2VLImageProcessor",)
PIXTRAL_PROCESSORS = ("PixtralImageProcessor",)
GEMMA_PROCESSORS = ("Gemma3ImageProcessor",)
ANY_RESOLUTION_PROCESSORS = ("LlavaNextImageProcessor", "LlavaOnevisionImageProcessor")
INTERN_PROCESSORS = ("GotOcr2ImageProcessor",)
IDEFICS_PROCESSORS = ("Idefics3ImageProcessor", "SmolVLMImageProcessor")


class UnreadImagesError(ValueError):
    """Why this checkpoint's images can't be read here; its text can."""


def tower_of(
    config: EngineConfig, source: CheckpointSource, dtype: torch.dtype, device: torch.device, *, is_alone: bool
) -> tuple[VisionTower | None, str]:
    """The tower of a vision checkpoint, or None and why images are not read; "": its type is not known here.

    is_alone: the engine has one rank, and generates. Raises LoadError.
    """
    if read_config(Path(config.model)).get("model_type") not in MAKERS:
        return None, ""
    most = config.limit_mm_per_prompt.image
    try:
        if most == 0:
            raise UnreadImagesError("--limit-mm-per-prompt allows no image")
        if not is_alone:
            raise UnreadImagesError("images are read by engines of one rank that generate, so far")
        if device.type != "cpu":
            raise UnreadImagesError(
                "no GPU has read one yet, and its memory is planned without; --device cpu reads them"
            )
        tower = load_tower(Path(config.model), source, dtype, device, most)
        tokens = tower.facts.most_at_once
        if config.max_num_batched_tokens < tokens:
            raise UnreadImagesError(
                f"--max-num-batched-tokens {config.max_num_batched_tokens}: an image's {tokens} tokens see each other, "
                "and are computed in one step"
            )
        if config.deterministic and tower.facts.sees_ahead:
            raise UnreadImagesError("--deterministic: attention to an image's later tokens is not batch-invariant")
        return tower, ""
    except UnreadImagesError as error:
        return None, f"images are not read: {error}"


def load_tower(
    directory: Path, source: CheckpointSource, dtype: torch.dtype, device: torch.device, most_images: int
) -> VisionTower:
    """A checkpoint's tower. Raises UnreadImagesError, and LoadError for weights that don't make it."""
    from transformers import AutoConfig
    from transformers.initialization import no_init_weights

    given = _Preprocessing(directory)
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        _check_sizes(config)
        recipe, made = MAKERS[config.model_type](config, given)
        with no_init_weights():
            module = made(config).to(dtype)
    except UnreadImagesError:
        raise
    except Exception as error:  # of transformers' code, of any type, where numbers mean nothing to it
        raise UnreadImagesError(f"config.json makes no tower: {type(error).__name__}: {error}") from error
    sees_ahead = config.model_type == "gemma3"
    mark = config.boi_token_index if sees_ahead else config.image_token_id
    several = _several(recipe, config, given)
    facts = VisionModel(recipe, config.image_token_id, mark, most_images, sees_ahead, several)
    _fill(module, source)
    tower = VisionTower(facts, module.to(device), given.mean, given.std)
    if problem := tower.problem(config.get_text_config().hidden_size):
        raise UnreadImagesError(f"the tower can't see an image: {problem}")
    return tower


def _check_sizes(config: Any) -> None:
    """Raise UnreadImagesError for a tower that no machine holds, before transformers begins to make it."""
    vision = config.vision_config.to_dict()
    for key, value in vision.items():
        most = MOST_LAYERS if key in ("depth", "num_hidden_layers") else MOST_SIZE
        if isinstance(value, int) and value > most:
            raise UnreadImagesError(f"vision_config: {key} {value}; {most} is the most")
    for key in ("image_token_id", "boi_token_index"):
        if not 0 <= getattr(config, key, 0) < config.get_text_config().vocab_size:
            raise UnreadImagesError(f"config.json: {key} {getattr(config, key)} is no token of the vocabulary")


class _Preprocessing:
    """What preprocessor_config.json, or transformers 5's processor_config.json, says of images."""

    def __init__(self, directory: Path) -> None:
        both = read_object_if_any(directory / "processor_config.json").get("image_processor")
        found = read_object_if_any(directory / "preprocessor_config.json") or both
        if not isinstance(found, dict) or not found:
            raise UnreadImagesError("the checkpoint has no preprocessor_config.json, which says how images are resized")
        self.values: dict[str, Any] = found
        self.kind = str(found.get("image_processor_type") or found.get("feature_extractor_type"))
        self.kind = self.kind.removesuffix("Fast").removesuffix("Pil")
        for key in ("do_resize", "do_rescale", "do_normalize"):
            if found.get(key) is False:
                raise UnreadImagesError(f"preprocessor_config.json: {key} false is not supported")
        if abs(float(found.get("rescale_factor") or 1 / 255) * 255 - 1) > 1e-6:
            raise UnreadImagesError(f"preprocessor_config.json: rescale_factor {found['rescale_factor']} isn't 1 / 255")
        pads = (*IDEFICS_PROCESSORS, *PIXTRAL_PROCESSORS, *ANY_RESOLUTION_PROCESSORS)  # batches of images
        if found.get("do_pad") and self.kind not in pads:
            raise UnreadImagesError("preprocessor_config.json: do_pad true is not supported")
        is_half = self.kind in SIGLIP_PROCESSORS + IDEFICS_PROCESSORS + GEMMA_PROCESSORS
        self.mean = self._channels("image_mean", HALF if is_half else CLIP_MEAN)
        self.std = self._channels("image_std", HALF if is_half else CLIP_STD)
        resample = found.get("resample")
        default = LANCZOS if self.kind in IDEFICS_PROCESSORS else BICUBIC
        default = BILINEAR if self.kind in GEMMA_PROCESSORS else default
        self.resample = default if resample is None else resample
        if self.resample not in range(FILTERS):
            raise UnreadImagesError(f"preprocessor_config.json: resample {resample!r} is none of Pillow's filters")

    def _channels(self, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
        found = self.values.get(key) or default
        if len(found) != 3 or not all(isinstance(one, int | float) and math.isfinite(one) for one in found):
            raise UnreadImagesError(f"preprocessor_config.json: {key} {found} isn't a number for each channel")
        return tuple(found)

    def check_kind(self, known: Sequence[str]) -> None:
        if self.kind not in known:
            raise UnreadImagesError(
                f"preprocessor_config.json: image_processor_type {self.kind!r} is not supported here; "
                f"{' and '.join(known)} is"
            )

    def size(self, name: str) -> dict[str, int]:
        """`size` or `crop_size`; in older files one number, of the shorter side or of both."""
        given = self.values.get(name)
        if isinstance(given, int):
            return {"shortest_edge": given} if name == "size" else {"height": given, "width": given}
        return dict(given) if isinstance(given, dict) else {}


def _llava(config: Any, given: _Preprocessing) -> tuple[WholeImage, MakeModule]:
    kind = config.vision_config.model_type
    if kind not in ("clip_vision_model", "siglip_vision_model"):
        raise UnreadImagesError(f"llava with a vision tower of type {kind} is not supported; clip and siglip are")
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


def _qwen(config: Any, given: _Preprocessing) -> tuple[WholePatches, MakeModule]:
    given.check_kind(QWEN_PROCESSORS)
    vision = config.vision_config
    if "mrope_section" not in config.text_config.rope_parameters:
        raise UnreadImagesError("the config's rope has no mrope_section, by which images' tokens are rotated")
    if len(getattr(vision, "deepstack_visual_indexes", ())) >= config.text_config.num_hidden_layers:
        raise UnreadImagesError("deepstack_visual_indexes: the decoder has no layer behind those that features go to")
    for key, have in (
        ("patch_size", vision.patch_size),
        ("merge_size", vision.spatial_merge_size),
        ("temporal_patch_size", vision.temporal_patch_size),
    ):
        if given.values.get(key, have) != have:
            raise UnreadImagesError(f"preprocessor_config.json: {key} {given.values[key]} isn't the tower's, {have}")
    size = given.size("size")
    least = given.values.get("min_pixels") or size.get("shortest_edge") or 56 * 56
    most = given.values.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280
    return WholePatches(vision.patch_size * vision.spatial_merge_size, least, most, given.resample), QwenModule


def _idefics(config: Any, given: _Preprocessing) -> tuple[Tiles, MakeModule]:
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


def _mistral3(config: Any, given: _Preprocessing) -> tuple[Lines, MakeModule]:
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


def _internvl(config: Any, given: _Preprocessing) -> tuple[Grid, MakeModule]:
    given.check_kind(INTERN_PROCESSORS)
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


def _gemma3(config: Any, given: _Preprocessing) -> tuple[WholeImage, MakeModule]:
    given.check_kind(GEMMA_PROCESSORS)
    side = config.vision_config.image_size
    size = given.size("size")
    if (size.get("width"), size.get("height")) != (side, side) or given.values.get("do_pan_and_scan"):
        raise UnreadImagesError(
            f"preprocessor_config.json: size {size}, or do_pan_and_scan, is not supported; {side} x {side} alone is"
        )
    behind = "<end_of_image>\n\n"
    count = config.mm_tokens_per_image
    return WholeImage((side, side), None, given.resample, count, "\n\n<start_of_image>", behind), GemmaModule


def _llava_next(config: Any, given: _Preprocessing) -> tuple[AnyResolution, MakeModule]:
    kind = config.vision_config.model_type
    if kind not in ("clip_vision_model", "siglip_vision_model"):
        raise UnreadImagesError(
            f"{config.model_type} with a vision tower of type {kind} is not supported; clip and siglip are"
        )
    given.check_kind(ANY_RESOLUTION_PROCESSORS)
    side = config.vision_config.image_size
    sizes = [given.size(name) for name in ("size", "crop_size")]
    if any(set(size.values()) not in (set(), {side}) for size in sizes) or not sizes[0]:
        raise UnreadImagesError(f"preprocessor_config.json: size {sizes[0]} and crop_size {sizes[1]} aren't {side}")
    points = config.image_grid_pinpoints
    if given.values.get("image_grid_pinpoints", points) != points:
        raise UnreadImagesError("preprocessor_config.json: image_grid_pinpoints are not those of config.json")
    known = [tuple(point) for point in points if len(point) == 2]
    grids = tuple((width // side, height // side) for height, width in known)
    if not grids or any(length < side or length % side for point in known for length in point):
        raise UnreadImagesError(f"image_grid_pinpoints: {points[:4]} are not in squares of {side}, as the tower's")
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


def _several(recipe: Recipe, config: Any, given: _Preprocessing) -> Recipe | None:
    """How images are seen in prompts with more than one; None: as one is."""
    if config.model_type != "llava_onevision" or not isinstance(recipe, AnyResolution):
        return None
    red, green, blue = (int(255 * mean) for mean in given.mean)
    return Squared(recipe.side, (red, green, blue), recipe.resample, recipe.patches**2 + 1)


MakeModule = Callable[[Any], nn.Module]
Maker = Callable[[Any, _Preprocessing], tuple[Recipe, MakeModule]]
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
    "gemma3": _gemma3,
}
"""By model type: what is made of a checkpoint's config and its preprocessing."""


def _fill(module: nn.Module, source: CheckpointSource) -> None:
    """Copy the checkpoint's weights into a tower; those of quantized layers dequantized. Raises LoadError."""
    missing = []
    for name, parameter in module.state_dict(keep_vars=True).items():
        found = next((one for one in _spellings(name) if source.has(one.rpartition(".")[0])), None)
        if found is None:
            missing.append(name)
            continue
        owner, _, kind = found.rpartition(".")
        with torch.no_grad():
            if kind == "weight" and source.is_quantized(owner):
                weight, _ = source.dense(owner, *parameter.shape)
                parameter.copy_(weight)
            else:
                parameter.copy_(source.tensor(found, tuple(parameter.shape)))
    if missing:
        raise LoadError(f"the checkpoint has no weights for {some(missing)} of the vision tower")


def _spellings(name: str) -> Iterator[str]:
    """Names that a tower's parameter has in checkpoints: transformers 4 had a module more around CLIP and SigLIP."""
    tower, _, rest = name.partition(".")
    for prefix in ("model.", ""):
        yield prefix + name
        yield f"{prefix}{tower}.vision_model.{rest}"
