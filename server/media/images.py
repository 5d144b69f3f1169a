"""The images of a model that sees, for the routes: read out of requests, decoded, and put into prompts."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from octavo.runtime.vision.recipes import MAX_PIXELS, PromptImage, Recipe, VisionModel
from octavo.server.errors import bad_request
from octavo.server.frame_process import FrameProcess
from octavo.server.media import prompt
from octavo.server.media.jobs import Answer, Job, Refused
from octavo.server.media.prompt import PlacesError, ReadImage
from octavo.server.media.sources import ImageSource, content_of
from octavo.text.tokenizer import EncodingError, Tokenizer

DECODE_SECONDS = 20.0
NO_IMAGES = "this model reads text alone: leave images out, or serve a model that sees"
WITHOUT_IMAGE = "this model's prompts begin with an image, and this one has none"
MOST_SENT = 3 * MAX_PIXELS + (1 << 16)  # bytes of an answer
_GONE = Refused("it takes too much memory or time to decode")


class Images:
    """How one model's images are read. Use from one event loop only.

    mark: the token that chat templates write for an image. placeholder: the one that stands there many times.
    directory: below which requests may name files.
    """

    def __init__(self, vision: VisionModel, mark: str, placeholder: str, directory: Path | None) -> None:
        self.vision = vision
        self._mark = mark
        self._placeholder = placeholder
        self._directory = directory
        self._process = FrameProcess("octavo.server.media.process")
        self._lock = asyncio.Lock()

    @property
    def wants_one(self) -> bool:
        """Whether prompts begin with images, and there is none without."""
        return self.vision.begins_with is not None

    async def read(self, sources: Sequence[ImageSource]) -> list[ReadImage]:
        """The images of one prompt. Raises ApiError, which names the image."""
        most = self.vision.most_images
        if len(sources) > most:
            raise sources[most].refusal(f"{len(sources)} are there, and {most} the most (--limit-mm-per-prompt)")
        recipe = self.vision.recipe_for(len(sources))
        return [await self._read(source, recipe) for source in sources]

    async def _read(self, source: ImageSource, recipe: Recipe) -> ReadImage:
        content = await asyncio.to_thread(content_of, source, self._directory)
        await self._lock.acquire()  # who hangs up meanwhile leaves the queue
        # shielded: a job that has begun is finished; otherwise its answer would be taken for the next job's
        answer = await asyncio.shield(self._decoded(Job(content, recipe)))
        if not isinstance(answer, ReadImage):
            raise source.refusal(answer.message)
        return answer

    async def _decoded(self, job: Job) -> ReadImage | Refused:
        """With the lock, which it releases."""
        try:
            async with asyncio.timeout(DECODE_SECONDS):
                await self._process.connect()
                answer = await self._process.exchange(msgspec.msgpack.encode(job), MOST_SENT)
        except (OSError, EOFError, TimeoutError):
            self._process.close()
            return _GONE
        finally:
            self._lock.release()
        return await asyncio.to_thread(_checked, answer, job.recipe)

    def expanded(self, text: str, images: Sequence[ReadImage], field: str = "messages") -> str:
        """The text of a prompt with all placeholders of its images. Raises ApiError, which names the field."""
        try:
            return prompt.expanded(text, images, self.vision, self._mark, self._placeholder)
        except PlacesError as error:
            raise bad_request(f"{field}: {error}", field) from None

    def expanded_ids(
        self, token_ids: Sequence[int], images: Sequence[ReadImage], tokenizer: Tokenizer, field: str
    ) -> list[int]:
        """The token ids of a prompt, which are in the vocabulary, with all placeholders. Raises ApiError."""
        try:
            return prompt.expanded_ids(token_ids, images, self.vision, tokenizer)
        except (PlacesError, EncodingError) as error:
            raise bad_request(f"{field}: {error}", field) from None

    def placed(
        self, token_ids: Sequence[int], images: Sequence[ReadImage], field: str = "messages"
    ) -> tuple[PromptImage, ...]:
        """The images of a prompt, where its tokens have them. Raises ApiError, which names the field."""
        try:
            return prompt.placed(token_ids, images, self.vision)
        except PlacesError as error:
            raise bad_request(f"{field}: {error}", field) from None

    def close(self) -> None:
        """End the process."""
        self._process.close()


def _checked(answer: bytes, recipe: Recipe) -> ReadImage | Refused:
    """What the process says, which may be anything where a decoder was broken into."""
    try:
        found = msgspec.msgpack.decode(answer, type=Answer)
        if isinstance(found, Refused):
            return found
        views = recipe.layout(found.size, "").views
    except (msgspec.DecodeError, ValueError, ArithmeticError):
        return _GONE
    frames = tuple(view.frame for view in views)
    if found.frames != frames or len(found.pixels) != sum(3 * width * height for width, height in frames):
        return _GONE
    digest = hashlib.sha256(repr((found.size, frames)).encode())
    digest.update(found.pixels)
    return ReadImage(digest.digest(), found.size, frames, found.pixels)
