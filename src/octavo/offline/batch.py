"""Many prompts at once: tokenized in a thread while the first ones are answered, and never all of them open.

Prompts are opened in groups: of one group all that a step brings is read at once. Images of open prompts have as many
bytes at most as a server takes, and a group that waits has a share of those. What is wrong with any prompt ends all of
them; so does whoever cancels it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import chain

from octavo.inputs import Given
from octavo.offline.answers import GrowingRequest, TokenTexts, plain_parsers
from octavo.offline.errors import python_errors
from octavo.offline.model import OfflineModel
from octavo.offline.order import in_order
from octavo.offline.requests import Conversation, Job, Written, choices_of, tokenized, written
from octavo.outputs import RequestOutput
from octavo.server.admission import MOST_MEDIA
from octavo.server.prompts import Prompt
from octavo.server.reading import Reading

GROUP = 64  # prompts
ORDERED = 4096  # prompts that are put in order at a time; those of the next such row are tokenized meanwhile
MOST_OPEN = 4096  # answers that are open at least, where so many are asked for; each takes some kilobytes
GROUP_MEDIA = MOST_MEDIA // 8  # bytes of images behind which a group ends
IMAGES_AHEAD = 1  # groups with images that wait, decoded, until there is room for them
OPEN_OF_SEQUENCES = 4  # of those that the engines compute at a time, how many times as many are open


@dataclass(frozen=True, slots=True)
class Ready:
    """A prompt that can be answered. given: as text, where it came as messages. reading: how answers are told apart."""

    job: Job
    given: Given
    prompt: Prompt
    reading: Reading | None

    @property
    def media_bytes(self) -> int:
        return sum(len(image.pixels) for image in self.prompt.images)


class Batch:
    """One call of a program. Use from the event loop of the model.

    on_end is called with each prompt's answers when the last of these has ended.
    """

    def __init__(self, model: OfflineModel, on_end: Callable[[RequestOutput], object] = lambda _: None) -> None:
        self._model = model
        self._on_end = on_end
        self._texts = TokenTexts(model.model)
        self._num_open = 0
        self._media_open = 0
        self._has_room = asyncio.Condition()
        self._most_running = OPEN_OF_SEQUENCES * model.model.max_num_seqs
        self._most_open = max(MOST_OPEN, self._most_running)
        self._outputs: dict[int, RequestOutput] = {}

    async def run(self, jobs: Sequence[Job], group: int = GROUP) -> list[RequestOutput]:
        """All answers, in the order of the prompts. Raises ValueError and EngineError."""
        sees = any(_has_images(job.given) for job in jobs)
        ready: asyncio.Queue[list[Ready] | None] = asyncio.Queue(IMAGES_AHEAD if sees else 0)
        if sees:
            self._most_open = self._most_running
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._tokenize(jobs, group, ready, group if sees else ORDERED))
                while (prompts := await ready.get()) is not None:
                    num_answers = sum(it.job.asked.request.num_choices for it in prompts)
                    await self._take_room(num_answers, sum(it.media_bytes for it in prompts))
                    tasks.create_task(self._answer(prompts))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return [self._outputs[id(job)] for job in jobs]

    async def _tokenize(
        self, jobs: Sequence[Job], group: int, ready: asyncio.Queue[list[Ready] | None], ordered: int
    ) -> None:
        """Make token ids of all prompts, and groups in the order in which they are computed; None when that is done.

        ordered: with images, of which a group may end early, no more than a group.
        """
        begin = 0
        with python_errors():
            while begin < len(jobs):
                row = jobs[begin : begin + ordered]
                parts = [row[first : first + group] for first in range(0, len(row), group)]
                found = list(chain.from_iterable(await asyncio.gather(*(self._tokenized(part) for part in parts))))
                prompts = in_order(found, lambda ready: ready.prompt.token_ids, self._most_tokens)
                begin += len(found)
                for first in range(0, len(prompts), group):
                    await ready.put(prompts[first : first + group])
        await ready.put(None)

    async def _tokenized(self, jobs: Sequence[Job]) -> list[Ready]:
        """The first of these, whose images fill a group, or all of them."""
        texts: list[Written] = []
        left = GROUP_MEDIA
        for job in jobs:
            texts.append(await written(job.given, self._model.model))
            left -= sum(len(image.pixels) for image in texts[-1].images)
            if left <= 0:
                break
        return await asyncio.to_thread(self._prompts_of, jobs[: len(texts)], texts)

    def _most_tokens(self, ready: Ready) -> int:
        model = self._model.model
        return ready.job.asked.wanted.limit(ready.prompt.room(model), model)

    def _prompts_of(self, jobs: Sequence[Job], texts: Sequence[Written]) -> list[Ready]:
        return [self._ready(job, text) for job, text in zip(jobs, texts, strict=True)]

    def _ready(self, job: Job, found: Written) -> Ready:
        prompt = tokenized(found, job.asked, self._model.model)
        return Ready(job, found.given, prompt, self._model.reading(job.given, prompt, job.asked))

    async def _answer(self, prompts: Sequence[Ready]) -> None:
        """The answers to one group of prompts."""
        model = self._model.model
        with python_errors():
            choices = choices_of([(it.job.asked, it.prompt, it.reading) for it in prompts], model)
            growing: list[GrowingRequest] = []  # by the choice's index: n answers to a prompt share theirs
            job_of: list[Job] = []
            for it in prompts:
                job = it.job
                own = choices[len(growing) : len(growing) + job.asked.request.num_choices]
                plain = plain_parsers(own, job.asked, model, it.reading) if self._model.tells_apart else None
                growing += [GrowingRequest(job.request_id, it.given, job.asked, own, self._texts, plain)] * len(own)
                job_of += [job] * len(own)
            async with aclosing(self._model.steps(choices)) as steps:
                async for deltas in steps:
                    for delta in deltas:
                        answers = growing[delta.index]
                        answers.add(delta)
                        if answers.is_finished:
                            self._end(job_of[delta.index], answers)
                    await self._leave_room(sum(delta.finish_reason is not None for delta in deltas))
        await self._leave_room(0, sum(it.media_bytes for it in prompts))

    def _end(self, job: Job, answers: GrowingRequest) -> None:
        output = self._outputs[id(job)] = answers.whole()
        self._on_end(output)

    async def _take_room(self, count: int, num_bytes: int) -> None:
        async with self._has_room:
            await self._has_room.wait_for(lambda: self._num_open == 0 or self._has_room_for(count, num_bytes))
            self._num_open += count
            self._media_open += num_bytes

    def _has_room_for(self, count: int, num_bytes: int) -> bool:
        return self._num_open + count <= self._most_open and self._media_open + num_bytes <= MOST_MEDIA

    async def _leave_room(self, count: int, num_bytes: int = 0) -> None:
        if count or num_bytes:
            async with self._has_room:
                self._num_open -= count
                self._media_open -= num_bytes
                self._has_room.notify_all()


def _has_images(given: Given | Conversation) -> bool:
    return bool(given.images if isinstance(given, Given) else given.sources)
