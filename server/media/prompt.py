"""Images in a prompt: what stands for each in its text or among its token ids, and where its tokens are then."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from octavo.runtime.vision.recipes import PromptImage, Size, VisionModel
from octavo.text.tokenizer import Tokenizer

LINE_END = "\n"  # behind a prompt that begins with images


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


def expanded_ids(
    token_ids: Sequence[int], images: Sequence[ReadImage], vision: VisionModel, tokenizer: Tokenizer
) -> list[int]:
    """The token ids of a prompt with as many placeholders for each image as it has embeddings. Raises PlacesError.

    Ids with all placeholders stay as they are. Else each image has its mark among them. Ids that the tokenizer makes of
    their own text become those of the expanded text, whatever stands beside a mark; others are kept one by one.
    """
    ids = list(token_ids)
    recipe = vision.recipe_for(len(images))
    mark, placeholder = (tokenizer.token_name(token) for token in (vision.mark_id, vision.placeholder_id))
    layouts = [recipe.layout(image.size, placeholder) for image in images]
    stands = [_plain(layout.text, tokenizer) for layout in layouts]
    num_placeholders = sum(layout.num_placeholders for layout in layouts)
    if ids.count(vision.placeholder_id) == num_placeholders and _are_among(stands, ids, vision):
        return ids
    if vision.begins_with is not None:
        ids = _bare(ids, len(images), vision, tokenizer)
    if (count := ids.count(vision.mark_id)) != len(images):
        raise PlacesError(
            f"the prompt has token {vision.mark_id} ({mark}) {count} times for {len(images)} images; "
            f"once for each is wanted, or all of their {num_placeholders} placeholders, {vision.placeholder_id}"
        )
    text = tokenizer.decode(ids)
    if _plain(text, tokenizer) == ids:
        return _plain(expanded(text, images, vision, mark, placeholder), tokenizer)
    return _spliced(ids, stands, vision, tokenizer)


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
    return f"{text[:behind]}{begins_with}{text[behind:]}{LINE_END}"


def _bare(ids: list[int], num_images: int, vision: VisionModel, tokenizer: Tokenizer) -> list[int]:
    """A prompt of a model whose prompts begin with images, without what its processor puts around the text."""
    assert vision.begins_with is not None
    begin = _plain(vision.begins_with, tokenizer)
    ids = ids[len(begin) :] if ids[: len(begin)] == begin else ids
    if vision.mark_id not in ids:
        return [vision.mark_id] * num_images + ids
    behind = len(ids) - ids[::-1].index(vision.mark_id)
    if ids[behind : behind + len(begin)] != begin:
        return ids
    rest = ids[behind + len(begin) :]
    end = _plain(LINE_END, tokenizer)
    return ids[:behind] + (rest[: -len(end)] if rest[-len(end) :] == end else rest)


def _spliced(ids: list[int], stands: list[list[int]], vision: VisionModel, tokenizer: Tokenizer) -> list[int]:
    """The ids with an image's own in place of each mark."""
    found: list[int] = []
    left = iter(stands)
    last = max(place for place, token in enumerate(ids) if token == vision.mark_id)
    for place, token in enumerate(ids):
        found += next(left) if token == vision.mark_id else [token]
        if place == last and vision.begins_with is not None:
            found += _plain(vision.begins_with, tokenizer)
    return found if vision.begins_with is None else found + _plain(LINE_END, tokenizer)


def _are_among(stands: list[list[int]], ids: list[int], vision: VisionModel) -> bool:
    """Whether ids with as many placeholders as images take have what stands around them, too.

    Only where an image takes one, and its mark is the same token, is that a question.
    """
    if vision.mark_id != vision.placeholder_id or ids.count(vision.mark_id) != len(stands):
        return True
    begin = 0
    for stand in stands:
        place = next((i for i in range(begin, len(ids)) if ids[i : i + len(stand)] == stand), None)
        if place is None:
            return False
        begin = place + len(stand)
    return True


def _plain(text: str, tokenizer: Tokenizer) -> list[int]:
    """A text's tokens, with nothing before and behind them."""
    return tokenizer.encode(text, add_special_tokens=False)


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
