"""From an image's file to the pixels that a tower sees: Pillow alone, as transformers' PIL processors use it.

It runs in a process of bounded memory (process.py): decoders have been broken into, and some files unfold to gigabytes.
What can be told from a file's header is refused before anything is unfolded.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence

from PIL import Image, ImageOps

from octavo.runtime.vision.recipes import MAX_PIXELS, Color, Recipe, Size, View
from octavo.server.media.jobs import Decoded

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


class ImageError(ValueError):
    """No image, or one that isn't read; the message says why."""


def frames_of(content: bytes, recipe: Recipe) -> Decoded:
    """What a tower sees of an image. Of several pictures in a file, the first one is the image. Raises ImageError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow's own limits: those here are lower, or said of metadata
        image = _opened(content)
        _views(_turned(image), recipe)
        picture = _decoded(image)
        views = _views(picture.size, recipe)
        pixels = b"".join(_pixels(picture, views, Image.Resampling(recipe.resample)))
    return Decoded(picture.size, tuple(view.frame for view in views), pixels)


def _views(size: Size, recipe: Recipe) -> tuple[View, ...]:
    try:
        return recipe.layout(size, "").views
    except ValueError as error:
        raise ImageError(str(error)) from None


def _opened(content: bytes) -> Image.Image:
    """The image with its header read alone."""
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        width, height = image.size
    except Exception as error:  # of Pillow's decoders, of any type
        raise ImageError(f"it is no image of a kind that is read: {', '.join(FORMATS)}") from error
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} pixels; {MAX_PIXELS} are the most")
    return image


def _turned(image: Image.Image) -> Size:
    """The size that an image has once it stands as its EXIF data say."""
    try:
        turns = image.getexif().get(0x0112) in (5, 6, 7, 8)
    except Exception:  # what can't be read says nothing; transformers' loader would fail, other programs don't
        turns = False
    width, height = image.size
    return (height, width) if turns else (width, height)


def _decoded(image: Image.Image) -> Image.Image:
    """The picture in RGB, upright, on white where it is transparent."""
    try:
        image.load()
        with contextlib.suppress(Exception):  # damaged EXIF data: the picture as it lies there
            image = ImageOps.exif_transpose(image)
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
        return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # of Pillow's decoders, of any type
        raise ImageError(f"it can't be decoded: {str(error) or type(error).__name__}") from error


def _pixels(picture: Image.Image, views: Sequence[View], resample: Image.Resampling) -> Iterator[bytes]:
    """Of each view; the image is resized once for those that follow each other with the same sizes."""
    if views[0].squared is not None:
        picture = _squared(picture, views[0].squared)
    resized = picture
    sizes: tuple[Size, ...] = ()
    for view in views:
        if view.sizes != sizes:
            begun = sizes and view.sizes[: len(sizes)] == sizes
            left = view.sizes[len(sizes) :] if begun else view.sizes
            resized = resized if begun else picture
            for size in left:
                resized = resized if resized.size == size else resized.resize(size, resample)
            sizes = view.sizes
        x, y = view.corner
        yield resized.crop((x, y, x + view.frame[0], y + view.frame[1])).tobytes()


def _squared(picture: Image.Image, color: Color) -> Image.Image:
    """The picture in the middle of a square of this color."""
    side = max(picture.size)
    square = Image.new("RGB", (side, side), color)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square
