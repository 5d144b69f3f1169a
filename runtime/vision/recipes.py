"""How a model's images are resized and cut, and what stands for them in a prompt: arithmetic on sizes alone.

The engine reads a recipe out of a checkpoint (kinds.py) and tells the server of it; the process that decodes images
follows it (server/media). Rescaling and normalizing are the tower's, so that pixels cross the socket as bytes.
The formulas are those of transformers' PIL processors, so that pixels are equal to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

import msgspec

MAX_PIXELS = 1 << 26  # of an image, and of what it is resized to; as RGB it takes 192 MiB
MAX_RATIO = 200  # of an image's sides, in Qwen's models

Size = tuple[int, int]
"""Width and height."""
Color = tuple[int, int, int]


class View(NamedTuple):
    """Pixels that a tower sees: `frame` of the image, after it is resized to each of these sizes in turn.

    corner: where the frame's left upper pixel is; what lies outside of the image is black. squared: the color of bars
    beside the image that make it a square before it is resized; None: it keeps its shape.
    """

    sizes: tuple[Size, ...]
    frame: Size
    corner: tuple[int, int] = (0, 0)
    squared: Color | None = None


class Layout(NamedTuple):
    """What an image becomes. text: what stands in the prompt for it, with so many placeholders."""

    views: tuple[View, ...]
    text: str
    num_placeholders: int


class WholeImage(msgspec.Struct, frozen=True, tag="whole"):
    """One frame of the same size for every image: CLIP's and SigLIP's.

    shorter: what the image's shorter side is resized to, before `frame` is cut out of its middle; None: the image is
    resized to `frame`. resample: Pillow's number of the filter. count: placeholders. before, behind: what stands around
    them.
    """

    frame: Size
    shorter: int | None
    resample: int
    count: int
    before: str = ""
    behind: str = ""

    def layout(self, size: Size, placeholder: str) -> Layout:
        """Of an image of this size. Raises ValueError for one that can't be resized."""
        resized = self.frame
        if self.shorter is not None:
            width, height = size
            long = int(self.shorter * max(size) / min(size))
            resized = (self.shorter, long) if width <= height else (long, self.shorter)
        check_pixels(size, resized)
        left, top = ((have - wanted) // 2 for have, wanted in zip(resized, self.frame, strict=True))
        view = View((resized,), self.frame, (left, top))
        return Layout((view,), self.before + placeholder * self.count + self.behind, self.count)


class WholePatches(msgspec.Struct, frozen=True, tag="patches"):
    """One frame that keeps the image's shape, in multiples of `factor`, a placeholder's side: Qwen2-VL's and later.

    least, most: pixels of the frame.
    """

    factor: int
    least: int
    most: int
    resample: int

    def layout(self, size: Size, placeholder: str) -> Layout:
        """Of an image of this size. Raises ValueError for one that can't be resized."""
        if max(size) > MAX_RATIO * min(size):
            raise ValueError(f"{size[0]} x {size[1]} pixels: one side is more than {MAX_RATIO} times the other")
        width, height = (round(side / self.factor) * self.factor for side in size)
        if width * height > self.most:
            scale = math.sqrt(size[0] * size[1] / self.most)
            width, height = (max(self.factor, math.floor(x / scale / self.factor) * self.factor) for x in size)
        elif width * height < self.least:
            scale = math.sqrt(self.least / (size[0] * size[1]))
            width, height = (math.ceil(x * scale / self.factor) * self.factor for x in size)
        check_pixels(size, (width, height))
        columns, rows = self.grid((width, height))
        return Layout((View(((width, height),), (width, height)),), placeholder * (columns * rows), columns * rows)

    def grid(self, frame: Size) -> Size:
        """Columns and rows of a frame's placeholders."""
        return frame[0] // self.factor, frame[1] // self.factor


class Tiles(msgspec.Struct, frozen=True, tag="tiles"):
    """Squares side by side that cover the image, and the whole of it in one more: Idefics 3's and SmolVLM's.

    longest: what the image's longer side is resized to at first. side: of a square. cuts: whether there is more than
    one. count: placeholders of each.
    """

    longest: int
    side: int
    cuts: bool
    resample: int
    count: int

    def layout(self, size: Size, placeholder: str) -> Layout:
        """Of an image of this size. Raises ValueError for one that can't be resized."""
        square = (self.side, self.side)
        longest = self._longest(size)
        sizes = (longest, self._in_squares(longest) if self.cuts else square)
        check_pixels(size, sizes[-1])
        columns, rows = (length // self.side for length in sizes[-1])
        if (columns, rows) == (1, 1):
            return Layout((View(sizes, square),), self._said("<global-img>", placeholder) + FAKE, self.count)
        corners = [(column, row) for row in range(rows) for column in range(columns)]
        views = [View(sizes, square, (self.side * column, self.side * row)) for column, row in corners]
        views.append(View((*sizes, square), square))
        lines = (
            "".join(self._said(f"<row_{row + 1}_col_{column + 1}>", placeholder) for column in range(columns)) + "\n"
            for row in range(rows)
        )
        text = "".join(lines) + "\n" + self._said("<global-img>", placeholder) + FAKE
        return Layout(tuple(views), text, len(views) * self.count)

    def _said(self, name: str, placeholder: str) -> str:
        return FAKE + name + placeholder * self.count

    def _longest(self, size: Size) -> Size:
        """With the longer side as it should be, and the shorter one even."""
        width, height = size
        ratio = width / height
        if width >= height:
            short = int(self.longest / ratio)
            return (self.longest, max(1, short + short % 2))
        short = int(self.longest * ratio)
        return (max(1, short + short % 2), self.longest)

    def _in_squares(self, size: Size) -> Size:
        width, height = size
        ratio = width / height
        if width >= height:
            width = self._whole(width)
            return (width, self._whole(int(width / ratio)))
        height = self._whole(height)
        return (self._whole(int(height * ratio)), height)

    def _whole(self, length: int) -> int:
        return math.ceil(length / self.side) * self.side


class Lines(msgspec.Struct, frozen=True, tag="lines"):
    """One frame that keeps the image's shape, with a token behind each line of placeholders: Mistral 3's.

    longest: the most pixels of a side. factor: a placeholder's side.
    """

    longest: int
    factor: int
    resample: int

    def layout(self, size: Size, placeholder: str) -> Layout:
        """Of an image of this size."""
        ratio = max(size) / self.longest
        sides = [math.floor(side / ratio) for side in size] if ratio > 1 else size
        columns, rows = (max(1, math.ceil(side / self.factor)) for side in sides)
        frame = (columns * self.factor, rows * self.factor)
        text = "[IMG_BREAK]".join([placeholder * columns] * rows) + "[IMG_END]"
        return Layout((View((frame,), frame),), text, columns * rows)


class Grid(msgspec.Struct, frozen=True, tag="grid"):
    """Squares side by side in a grid of the image's shape, and behind several of them the whole in one: InternVL's.

    side: of a square. least, most: squares of a grid. count: placeholders of each.
    """

    side: int
    least: int
    most: int
    resample: int
    count: int

    def layout(self, size: Size, placeholder: str) -> Layout:
        """Of an image of this size."""
        square = (self.side, self.side)
        columns, rows = self._grid(size)
        whole = ((columns * self.side, rows * self.side),)
        places = [(column, row) for row in range(rows) for column in range(columns)]
        views = [View(whole, square, (self.side * column, self.side * row)) for column, row in places]
        if len(views) > 1:
            views.append(View((square,), square))
        count = self.count * len(views)
        return Layout(tuple(views), f"<img>{placeholder * count}</img>", count)

    def _grid(self, size: Size) -> Size:
        """The grid nearest to the image in shape; of equally near ones a larger one, if the image fills half of it."""
        width, height = size
        numbers = range(1, self.most + 1)
        grids = [(c, r) for c in numbers for r in numbers if self.least <= c * r <= self.most]
        best = (1, 1)
        nearest = math.inf
        for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
            distance = abs(width / height - columns / rows)
            fills_half = width * height > 0.5 * self.side * self.side * columns * rows
            if distance < nearest or (distance == nearest and fills_half):
                nearest = distance
                best = (columns, rows)
        return best


class Kept(NamedTuple):
    """The part of a grid's patches that an image fills: how many are left out at each of two opposite sides, how many
    are left, and how many those are made.
    """

    out: Size
    left: Size
    made: Size


class WithinBudget(msgspec.Struct, frozen=True, tag="budget"):
    """One frame of the image's shape, as large as a number of placeholders allows: Gemma 4's.

    factor: a placeholder's side. most: placeholders. before, behind: what stands around them.
    """

    factor: int
    most: int
    resample: int
    before: str
    behind: str

    def layout(self, size: Size, placeholder: str) -> Layout:
        """Of an image of this size."""
        scale = math.sqrt(self.most * self.factor**2 / (size[0] * size[1]))
        columns, rows = (math.floor(scale * length / self.factor) for length in size)
        if rows == 0:
            rows = 1
            columns = min(size[0] // size[1], self.most)
        elif columns == 0:
            columns = 1
            rows = min(size[1] // size[0], self.most)
        frame = (columns * self.factor, rows * self.factor)
        count = columns * rows
        return Layout((View((frame,), frame),), self.before + placeholder * count + self.behind, count)


class AnyResolution(msgspec.Struct, frozen=True, tag="any"):
    """The whole image in one square, and squares of a grid that it fills without being stretched: LLaVA-NeXT's.

    Of the grid's patches, those beside the image are left out, and a token stands behind each line of the others.
    side: of a square. grids: columns and rows of those that there are. patches: of a square's side. most: squares whose
    patches an image has at most, roughly; more are averaged (LLaVA-OneVision); 0: any number.
    """

    side: int
    grids: tuple[Size, ...]
    patches: int
    resample: int
    most: int = 0

    def layout(self, size: Size, placeholder: str) -> Layout:
        """Of an image of this size. Raises ValueError for one that can't be resized."""
        square = (self.side, self.side)
        grid = self.grid(size)
        whole = (grid[0] * self.side, grid[1] * self.side)
        check_pixels(size, whole)
        resized = _within(size, whole)
        left, top = ((most - length) // 2 for most, length in zip(whole, resized, strict=True))
        places = [(column, row) for row in range(grid[1]) for column in range(grid[0])]
        views = [View((resized,), square, (self.side * x - left, self.side * y - top)) for x, y in places]
        columns, rows = self.kept(size).made
        count = self.patches**2 + (columns + 1) * rows
        return Layout((View((square,), square), *views), placeholder * count, count)

    def grid(self, size: Size) -> Size:
        """The grid in which an image has the most pixels of its own; of equally good ones the smallest."""
        width, height = size

        def goodness(grid: Size) -> tuple[int, int]:
            across, down = (count * self.side for count in grid)
            scale = min(across / width, down / height)
            filled = min(int(width * scale) * int(height * scale), width * height)
            return filled, filled - across * down

        return max(self.grids, key=goodness)

    def kept(self, size: Size) -> Kept:
        """Which patches of the grid an image of this size has."""
        width, height = size
        columns, rows = (length * self.patches for length in self.grid(size))
        across = down = 0
        if width / height > columns / rows:
            down = (rows - int(round(height * (columns / width), 7))) // 2
        else:
            across = (columns - int(round(width * (rows / height), 7))) // 2
        left = (columns - 2 * across, rows - 2 * down)
        ratio = math.sqrt(left[0] * left[1] / (self.most * self.patches**2)) if self.most else 0.0
        made = (int(left[0] // ratio), int(left[1] // ratio)) if ratio > 1.1 else left
        return Kept((across, down), left, made)


class Canvas(msgspec.Struct, frozen=True, tag="canvas"):
    """Squares of the canvas that the image, which keeps its shape, fills best from its corner on, and behind several of
    them the whole image in one: Llama 4's.

    side: of a square. most: squares of a canvas. grows: the image is enlarged to fill its canvas. count: placeholders
    of each square.
    """

    side: int
    most: int
    grows: bool
    resample: int
    count: int

    def layout(self, size: Size, placeholder: str) -> Layout:
        """Of an image of this size."""
        square = (self.side, self.side)
        columns, rows = self._canvas(size)
        canvas = (columns * self.side, rows * self.side)
        room = canvas
        if not self.grows:
            room = (min(max(size[0], self.side), canvas[0]), min(max(size[1], self.side), canvas[1]))
        across, down = (most / length for most, length in zip(room, size, strict=True))
        resized = (room[0], min(math.floor(size[1] * across), room[1]))
        if across >= down:
            resized = (min(math.floor(size[0] * down), room[0]), room[1])
        sizes = ((max(1, resized[0]), max(1, resized[1])),)
        places = [(self.side * column, self.side * row) for row in range(rows) for column in range(columns)]
        views = [View(sizes, square, place) for place in places]
        text = ""
        if len(views) > 1:
            views.append(View((square,), square))
            line = "<|tile_x_separator|>".join([placeholder * self.count] * columns) + "<|tile_y_separator|>"
            text = line * rows
        text = f"<|image_start|>{text}<|image|>{placeholder * self.count}<|image_end|>"
        return Layout(tuple(views), text, len(views) * self.count)

    def _canvas(self, size: Size) -> Size:
        """Columns and rows of the least canvas among those by which the image is enlarged least, or else reduced
        least; with `grows`, enlarged most.
        """
        found = [
            (min(columns * self.side / size[0], rows * self.side / size[1]), columns, rows)
            for columns in range(1, self.most + 1)
            for rows in range(1, self.most // columns + 1)
        ]
        larger = [scale for scale, _, _ in found if scale >= 1]
        wanted = max(scale for scale, _, _ in found)
        if larger and not self.grows:
            wanted = min(larger)
        best = [(columns, rows) for scale, columns, rows in found if scale == wanted]
        return min(best, key=lambda grid: grid[0] * grid[1])


class Squared(msgspec.Struct, frozen=True, tag="squared"):
    """The whole image in one square, between bars of a color: LLaVA-OneVision's, where a prompt has several images.

    side: of the square. count: placeholders.
    """

    side: int
    color: Color
    resample: int
    count: int

    def layout(self, size: Size, placeholder: str) -> Layout:
        """Of an image of this size. Raises ValueError for one that can't be made a square."""
        square = (self.side, self.side)
        check_pixels(size, (max(size), max(size)))
        return Layout((View((square,), square, squared=self.color),), placeholder * self.count, self.count)


Recipe = WholeImage | WholePatches | Tiles | Lines | Grid | WithinBudget | AnyResolution | Squared | Canvas
Sight = Literal["past", "image", "image_in_windows", "prompt"]
"""What an image's tokens see: those before them; all of the image, too; the same in layers with a window alone; all of
the prompt, as the prompt's text does."""
FAKE = "<fake_token_around_image>"


def _within(size: Size, whole: Size) -> Size:
    """An image's size, once it is resized to fill one of the sides of `whole`."""
    across, down = (most / length for most, length in zip(whole, size, strict=True))
    if across < down:
        return whole[0], min(math.ceil(size[1] * across), whole[1])
    return min(math.ceil(size[0] * down), whole[0]), whole[1]


def check_pixels(size: Size, resized: Size) -> None:
    """Raise ValueError for an image of this size that would be resized to too many pixels."""
    if resized[0] * resized[1] > MAX_PIXELS:
        raise ValueError(
            f"{size[0]} x {size[1]} pixels are resized to {resized[0]} x {resized[1]} for this model; {MAX_PIXELS} "
            "pixels are the most: send it with sides less unlike"
        )


class VisionModel(msgspec.Struct, frozen=True):
    """What a server needs to know of a model that sees.

    placeholder_id: the token in whose places an image's embeddings go. mark_id: what chat templates write once for an
    image. most_images: of a prompt. sight: what its tokens see.
    begins_with: what stands behind the images, with which prompts of such a model begin; None: images stand anywhere.
    of_several: the recipe for images of prompts that have more than one; None: the same.
    """

    recipe: Recipe
    placeholder_id: int
    mark_id: int
    most_images: int
    sight: Sight = "past"
    of_several: Recipe | None = None
    begins_with: str | None = None

    def recipe_for(self, num_images: int) -> Recipe:
        """Of the images of a prompt that has so many."""
        return self.recipe if num_images == 1 or self.of_several is None else self.of_several

    @property
    def sees_ahead(self) -> bool:
        """Whether an image's tokens see some behind them."""
        return self.sight != "past"

    @property
    def most_at_once(self) -> int:
        """Tokens that a step must hold together."""
        match self.recipe:
            case WholeImage(count=most) | WithinBudget(most=most) if self.sees_ahead:
                return most
        return 1


class PromptImage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An image of a prompt: the pixels that the tower sees, and where the prompt has it.

    digest: SHA-256 of `size`, `frames` and `pixels`, which names it in the prefix cache. start, length: the tokens that
    stand for it, those between its placeholders among them. size: its own, before it was resized. frames: the size of
    each; pixels: theirs, RGB, row by row. is_whole: its tokens see each other, so that one step computes all of them.
    """

    digest: bytes
    start: int
    length: int
    size: Size
    frames: tuple[Size, ...]
    pixels: bytes
    is_whole: bool = False


def tokens_at_once(images: Iterable[PromptImage]) -> int:
    """Tokens of a prompt with these images that no step may divide; 0: there are none."""
    return max((image.length for image in images if image.is_whole), default=0)
