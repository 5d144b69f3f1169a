"""Towers: what makes embeddings of an image.

A tower sees each image once: embeddings are kept by the image's digest, up to MAX_KEPT_BYTES.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from octavo.quant.linear import Linear
from octavo.runtime.vision.modules import SeenImage
from octavo.runtime.vision.recipes import (
    Layout,
    PromptImage,
    Size,
    VisionModel,
    WholePatches,
    tokens_at_once,
)

MAX_KEPT_BYTES = 256 << 20


class VisionTower:
    """A model's tower, on the model's device.

    facts: what the server is told. linears: its quantized linear layers, by their names. width: numbers of an
    embedding, once `problem` has looked.
    """

    def __init__(
        self,
        facts: VisionModel,
        module: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        linears: Mapping[str, Linear],
    ) -> None:
        self.facts = facts
        self.linears = linears
        self.module = module.eval()
        first = next(module.parameters())
        self._dtype = first.dtype
        self._device = first.device
        self._scale = 1 / (255 * torch.tensor(std, dtype=torch.float32)).view(3, 1, 1)
        self._shift = (torch.tensor(mean, dtype=torch.float32) / torch.tensor(std, dtype=torch.float32)).view(3, 1, 1)
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self._kept_bytes = 0
        self.width = 0

    @property
    def weight_bytes(self) -> int:
        packed = sum(linear.weight_bytes for linear in self.linears.values())
        return packed + sum(parameter.nbytes for parameter in self.module.parameters())

    def places(self, token_ids: Sequence[int], image: PromptImage) -> NDArray[np.int64]:
        """Positions of an image's placeholders in its prompt."""
        tokens = np.asarray(token_ids[image.start : image.start + image.length])
        return np.flatnonzero(tokens == self.facts.placeholder_id) + image.start

    def problem_of(self, token_ids: Sequence[int], images: Sequence[PromptImage]) -> str | None:
        """What is wrong with a prompt's images, or None: a bad one must not end everybody's requests."""
        end = 0
        for number, image in enumerate(images):
            if not end <= image.start < image.start + image.length <= len(token_ids):
                return f"image {number}: it stands for tokens that the prompt doesn't have"
            end = image.start + image.length
            if len(image.pixels) != sum(3 * width * height for width, height in image.frames) or not image.frames:
                return f"image {number}: {len(image.pixels)} bytes are not those of its frames {image.frames}"
            if image.is_whole != self.facts.sees_ahead:
                return f"image {number}: whether one step computes it is not as the model wants it"
            if self.facts.sight == "prompt" and (image.start, len(images)) != (0, 1):
                return f"image {number}: it isn't what all of a prompt begins with"
            wanted = self._num_embeddings(image, len(images))
            found = len(self.places(token_ids, image))
            if found != wanted:
                return f"image {number}: {found} placeholders in the prompt for {wanted} embeddings"
        return None

    def problem_of_logits(self, images: Sequence[PromptImage], most: int) -> str | None:
        """What is wrong with prompt_logprobs of a prompt with images, where a step may have so many rows of logits."""
        least = tokens_at_once(images)
        if least <= most:
            return None
        return f"prompt_logprobs: an image's {least} tokens are computed in one step, which may list {most}"

    def _num_embeddings(self, image: PromptImage, num_images: int) -> int:
        """Of one of so many images of a prompt; -1 where none of its size has its frames."""
        try:
            layout = self.facts.recipe_for(num_images).layout(image.size, "")
        except (ValueError, ArithmeticError):
            return -1
        frames = tuple(view.frame for view in layout.views)
        count = len(image.frames) // len(frames) if self.facts.sight == "prompt" else 1  # all of its images in one
        return count * layout.num_placeholders if image.frames == count * frames else -1

    def grid(self, image: PromptImage) -> Size | None:
        """Columns and rows of an image's placeholders, by which they are rotated; None: they are text to the rope."""
        recipe = self.facts.recipe
        return recipe.grid(image.frames[0]) if isinstance(recipe, WholePatches) else None

    @torch.inference_mode()
    def problem(self, hidden_size: int) -> str | None:
        """What goes wrong when the tower sees an image, or None: while requests run, it would end all of them.

        hidden_size: the decoder's. The image is black, and the one of two shapes that becomes fewer pixels.
        """
        recipe = self.facts.recipe
        try:
            layout, size = min(((recipe.layout(size, ""), size) for size in ((1, 1), (16, 1))), key=_num_pixels)
            frames = tuple(view.frame for view in layout.views)
            pixels = bytes(sum(3 * width * height for width, height in frames))
            made = self.module(self._seen(PromptImage(b"", 0, 0, size, frames, pixels)))
        except Exception as error:  # of transformers' modules, of any type
            return f"{type(error).__name__}: {error}"
        if len(made) != layout.num_placeholders or made.shape[1] % hidden_size:
            return f"it makes {list(made.shape)} for {layout.num_placeholders} tokens of {hidden_size} numbers"
        self.width = made.shape[1]
        return None if bool(made.isfinite().all()) else "it makes numbers that are not finite"

    @torch.inference_mode()
    def embed(self, image: PromptImage) -> Tensor:
        """[placeholders, hidden] in the model's type, on its device."""
        kept = self._kept.get(image.digest)
        if kept is not None:
            self._kept.move_to_end(image.digest)
            return kept
        made: Tensor = self.module(self._seen(image)).to(self._dtype)
        self._kept[image.digest] = made
        self._kept_bytes += made.nbytes
        while self._kept_bytes > MAX_KEPT_BYTES and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= oldest.nbytes
        return made

    def _seen(self, image: PromptImage) -> SeenImage:
        return SeenImage(list(self._frames(image)), image.size)

    def _frames(self, image: PromptImage) -> Iterator[Tensor]:
        begin = 0
        for width, height in image.frames:
            end = begin + 3 * width * height
            pixels = np.frombuffer(image.pixels, np.uint8, end - begin, begin).reshape(height, width, 3)
            frame = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)
            yield (frame * self._scale - self._shift).to(self._device, self._dtype)
            begin = end


def _num_pixels(seen: tuple[Layout, Size]) -> int:
    return sum(width * height for width, height in (view.frame for view in seen[0].views))
