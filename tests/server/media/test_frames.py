"""Pixels that a tower sees, against transformers' own processors in Pillow: equal to the last bit."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image, ImageOps
from tiny_vision import SOFT_TOKENS, picture

from octavo.runtime.vision.recipes import (
    MAX_PIXELS,
    AnyResolution,
    Canvas,
    Grid,
    Lines,
    Squared,
    Tiles,
    WholeImage,
    WholePatches,
    WithinBudget,
)
from octavo.server.media.frames import ImageError, frames_of

SIZES = [(50, 37), (31, 90), (28, 28), (300, 20), (7, 11), (640, 427)]
CLIP = transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
SIGLIP = transformers.SiglipImageProcessorPil(size={"height": 28, "width": 28})
QWEN = transformers.Qwen2VLImageProcessorPil(
    patch_size=7, merge_size=2, size={"shortest_edge": 14 * 14 * 4, "longest_edge": 14 * 14 * 24}
)
IDEFICS = transformers.Idefics3ImageProcessorPil(size={"longest_edge": 112}, max_image_size={"longest_edge": 28})
UNCUT = transformers.SmolVLMImageProcessorPil(
    size={"longest_edge": 112}, max_image_size={"longest_edge": 28}, do_image_splitting=False
)
INTERN = transformers.GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, crop_to_patches=True, max_patches=6)
PIXTRAL = transformers.PixtralImageProcessorPil(size={"longest_edge": 56}, patch_size={"height": 14, "width": 14})
GRIDS = ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))
NEXT = transformers.LlavaNextImageProcessorPil(
    size={"shortest_edge": 28},
    crop_size={"height": 28, "width": 28},
    image_grid_pinpoints=[[28 * rows, 28 * columns] for columns, rows in GRIDS],
)
ONEVISION = transformers.LlavaOnevisionImageProcessorPil(size={"height": 28, "width": 28}, image_mean=[0.5, 0.3, 0.7])
GEMMA4 = transformers.Gemma4ImageProcessorPil(patch_size=7, pooling_kernel_size=3, max_soft_tokens=SOFT_TOKENS)
RECIPES = {
    "any": (NEXT, AnyResolution(28, GRIDS, 4, 3)),
    "squared": (
        lambda images, **options: ONEVISION(images=[images * 2], **options),
        Squared(28, (127, 76, 178), 3, 17),
    ),
    "budget": (GEMMA4, WithinBudget(21, SOFT_TOKENS, 3, "", "")),
    "clip": (CLIP, WholeImage((28, 28), 28, 3, 16)),
    "siglip": (SIGLIP, WholeImage((28, 28), None, int(SIGLIP.resample), 16)),
    "qwen": (QWEN, WholePatches(14, 14 * 14 * 4, 14 * 14 * 24, 3)),
    "idefics": (IDEFICS, Tiles(112, 28, True, 1, 4)),
    "internvl": (INTERN, Grid(28, 1, 6, 3, 4)),
    "pixtral": (PIXTRAL, Lines(56, 14, 3)),
    "uncut": (UNCUT, Tiles(112, 28, False, 1, 4)),
}


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def truth_of(processor: Any, image: Image.Image) -> np.ndarray:
    """[frames, H, W, 3] of bytes; Qwen's patches are put together again."""
    found = processor(images=[image], do_rescale=False, do_normalize=False, return_tensors="np")
    pixels = found["pixel_values"][:1] if "batch_num_images" in found else found["pixel_values"]
    if "image_position_ids" in found:
        columns, rows = found["image_position_ids"][0].max(axis=0) + 1
        patches = pixels[0, : rows * columns].reshape(rows, columns, 7, 7, 3)
        return patches.transpose(0, 2, 1, 3, 4).reshape(1, rows * 7, columns * 7, 3)
    if "image_grid_thw" not in found:
        return pixels.reshape(-1, *pixels.shape[-3:]).transpose(0, 2, 3, 1)
    _, rows, columns = found["image_grid_thw"][0]
    patches = pixels.reshape(rows // 2, columns // 2, 2, 2, 3, 2, 7, 7)
    assert (patches[..., 0, :, :] == patches[..., 1, :, :]).all()  # a still image is two frames
    return patches[:, :, :, :, :, 0].transpose(0, 2, 5, 1, 3, 6, 4).reshape(1, rows * 7, columns * 7, 3)


def check(name: str, content: bytes) -> None:
    processor, recipe = RECIPES[name]
    made = frames_of(content, recipe)
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    truth = truth_of(processor, image)
    assert made.size == image.size
    assert made.frames == (truth.shape[2:0:-1],) * len(truth)
    assert np.array_equal(np.frombuffer(made.pixels, np.uint8).reshape(truth.shape), truth)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("size", SIZES)
def test_pixels_of_every_shape(name: str, size: tuple[int, int]) -> None:
    check(name, file_of(picture(1, *size)))


@pytest.mark.parametrize("name", RECIPES)
def test_pixels_of_every_kind(name: str) -> None:
    base = picture(2, 60, 40)
    faded = base.convert("RGBA")
    faded.putalpha(picture(3, 60, 40).convert("L"))
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60))
    for content in (
        file_of(faded),
        file_of(faded, "WEBP", lossless=True),
        file_of(base.convert("L")),
        file_of(base.convert("LA")),
        file_of(base.convert("1")),
        file_of(base.quantize(16), transparency=3),
        file_of(base, "GIF"),
        file_of(base, "BMP"),
        file_of(base, "JPEG", quality=70),
        file_of(base.convert("CMYK"), "JPEG"),
        file_of(base, "JPEG", exif=exif),
        file_of(wide),
    ):
        check(name, content)


def test_of_several_pictures_the_first_is_seen() -> None:
    first, second = picture(4, 30, 30), picture(5, 30, 30)
    moving = file_of(first, "GIF", save_all=True, append_images=[second])
    recipe = RECIPES["clip"][1]
    assert frames_of(moving, recipe) == frames_of(file_of(first, "GIF"), recipe)


@pytest.mark.parametrize(
    ("size", "name", "says"),
    [
        ((9000, 9000), "clip", f"9000 x 9000 pixels; {MAX_PIXELS} are the most"),
        ((1, 100_000), "clip", "1 x 100000 pixels are resized to 28 x 2800000 for this model"),
        ((9, 100_000), "squared", "9 x 100000 pixels are resized to 100000 x 100000 for this model"),
        ((201, 1), "qwen", "201 x 1 pixels: one side is more than 200 times the other"),
    ],
)
def test_sizes_that_are_refused(size: tuple[int, int], name: str, says: str) -> None:
    with pytest.raises(ImageError, match=says):
        frames_of(file_of(Image.new("1", size)), RECIPES[name][1])


def test_how_many_tokens_an_image_of_any_resolution_is() -> None:
    """Of every size, as transformers' processor of LLaVA-OneVision counts them, bounded and not."""
    whole = object.__new__(transformers.LlavaOnevisionProcessor)
    whole.num_image_tokens = 16
    for most in (0, 2):
        whole.vision_aspect_ratio = f"anyres_max_{most or 10**6}"
        recipe = AnyResolution(28, GRIDS, 4, 3, most)
        whole.image_processor = NEXT
        for width, height in [(width, height) for width in range(1, 200, 7) for height in range(1, 200, 11)]:
            wanted = whole._get_number_of_features(height, width, 28, 28)
            assert recipe.layout((width, height), "").num_placeholders == wanted


CANVASES = {
    (50, 37): (2, 2), (31, 90): (2, 3), (28, 28): (1, 1), (300, 20): (6, 1), (7, 11): (1, 1), (640, 427): (3, 2),
    (100, 100): (2, 2), (57, 56): (3, 2), (1, 200): (1, 6), (84, 28): (3, 1), (29, 28): (2, 1), (40, 300): (1, 6),
}  # fmt: skip
"""Columns and rows of Llama 4's squares of 28 pixels by image size, as transformers 5.19 with torchvision has them."""


def test_canvases_of_llama_4() -> None:
    """Pillow's pixels are those of torchvision but for a level here and there, which is why no processor is asked."""
    recipe = Canvas(28, 6, False, 2, 4)
    for size, (columns, rows) in CANVASES.items():
        made = frames_of(file_of(picture(1, *size)), recipe)
        assert len(made.frames) == columns * rows + (columns * rows > 1)
        separators = recipe.layout(size, "*").text.split("<|image|>")[0]
        assert separators.count("<|tile_y_separator|>") == (rows if columns * rows > 1 else 0)
        assert separators.count("<|tile_x_separator|>") == (columns - 1) * rows
    assert Canvas(28, 6, True, 2, 4).layout((20, 20), "").views[0].sizes == ((56, 56),)
