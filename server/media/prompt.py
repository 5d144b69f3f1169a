"""Images in a prompt: what stands for each in the text that a chat template wrote, and where its tokens are then."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from octavo.runtime.vision.recipes import PromptImage, Size, VisionModel


class PlacesError(ValueError):
    """A prompt that doesn't say where its images are; the message says why."""


@dataclass(frozen=True, slots=True)
class ReadImage:
    """An image of a request, decoded. size: its own; the rest as in PromptImage."""

    digest: bytes
    size: Size
    frames: tuple[Size, ...]
    pixels: bytes


def expanded(text: str, images: Sequence[ReadImage], vision: VisionModel, mark: str, placeholder: str) -> str:
    """The text with as many placeholders for each image as it has embeddings. Raises PlacesError.

    mark: what the template writes once for each image.
    """
    if vision.begins_with is not None:
        text = _begun(text, len(images), mark, vision.begins_with)
    pieces = text.split(mark)
    if len(pieces) != len(images) + 1:
        raise PlacesError(
            f"the prompt has {mark!r} {len(pieces) - 1} times for {len(images)} images; once for each is "
            "wanted, which a chat template writes, and no message may"
        )
    recipe = vision.recipe_for(len(images))
    stands = (recipe.layout(image.size, placeholder).text for image in images)
    return pieces[0] + "".join(stand + piece for stand, piece in zip(stands, pieces[1:], strict=True))


def placed(token_ids: Sequence[int], images: Sequence[ReadImage], vision: VisionModel) -> tuple[PromptImage, ...]:
    """The images of a prompt with the places that they have in it. Raises PlacesError."""
    places = [place for place, token in enumerate(token_ids) if token == vision.placeholder_id]
    recipe = vision.recipe_for(len(images))
    counts = [recipe.layout(image.size, "").num_placeholders for image in images]
    if sum(counts) != len(places):
        raise PlacesError(f"the prompt has {len(places)} placeholders for the {sum(counts)} that its images take")
    left = iter(places)
    if vision.sight == "prompt":
        return (_together(images, len(token_ids)),)
    return tuple(_placed(images, counts, left, is_whole=vision.sees_ahead))


def _begun(text: str, num_images: int, mark: str, begins_with: str) -> str:
    """As PaliGemma's processor puts a prompt together: images, the beginning token, the text, and a line's end."""
    text = text if mark in text else mark * num_images + text
    behind = text.rfind(mark) + len(mark)
    return f"{text[:behind]}{begins_with}{text[behind:]}\n"


def _together(images: Sequence[ReadImage], length: int) -> PromptImage:
    """All images of a prompt, whose tokens all see each other."""
    digest = hashlib.sha256(b"".join(image.digest for image in images)).digest()
    frames = tuple(frame for image in images for frame in image.frames)
    pixels = b"".join(image.pixels for image in images)
    return PromptImage(digest, 0, length, images[0].size, frames, pixels, is_whole=True)


def _placed(
    images: Sequence[ReadImage], counts: Sequence[int], places: Iterator[int], *, is_whole: bool
) -> Iterator[PromptImage]:
    for image, count in zip(images, counts, strict=True):
        own = list(islice(places, count))
        length = own[-1] + 1 - own[0]
        yield PromptImage(image.digest, own[0], length, image.size, image.frames, image.pixels, is_whole)
