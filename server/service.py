"""What the routes of all dialects share: the model, the engine, and how an answer is sent.

What takes long for a long body is kept off the event loop here.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Container, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response

from octavo.runtime.messages import AddRequest, PoolingParams, PoolingTask
from octavo.server.admission import Admission, QueueLimits, Ticket, timeout_of
from octavo.server.beam_search import search_beams
from octavo.server.encoding import JsonResponse, encode_in_turns
from octavo.server.errors import ApiError, bad_request
from octavo.server.fleet.fleet import Fleet
from octavo.server.generation import (
    LOWEST_PRIORITY,
    Choice,
    Delta,
    Steps,
    fair_owner,
    fold,
    generate,
    put_last,
    set_owner,
)
from octavo.server.metrics import Metrics
from octavo.server.middleware import PLACE, leave_place
from octavo.server.options import ServerOptions
from octavo.server.pooled_inputs import PooledPrompt
from octavo.server.pooled_text import PooledText
from octavo.server.pooling import PooledResult, pool, pooled_requests
from octavo.server.prompts import check_priority
from octavo.server.served_model import ServedModel
from octavo.server.speech_text import SpeechText
from octavo.server.streaming import SERVER_SENT, EventStream, Framing

logger = logging.getLogger(__name__)

LONG_BODY = 1 << 16  # bytes
VERY_LONG_BODY = 1 << 20
# What a model does that was asked for something else
HEARS = "writes down what it hears; POST /v1/audio/transcriptions works"
READS = "generates text, and does nothing else; POST /v1/completions works"
WRITES = (
    "generates text, and does nothing else here: POST /v1/completions and /v1/chat/completions work (octavo serve "
    "--runner pooling makes embeddings of it)"
)

T = TypeVar("T")


def owner_of(http: Request) -> str:
    """Whose requests, responses and files a request may see: those of its API key; on a server without keys, all."""
    owner: str = getattr(http.state, "owner", "")
    return owner


@dataclass(frozen=True)
class AudioLimits:
    """Of one recording: of its file, and of what that is decoded to."""

    most_bytes: int
    most_seconds: float


class Answer(ABC):
    """One HTTP request's answer under way, in some dialect.

    streams: whether it is sent as it comes. hints: the request's fields that were passed over.
    """

    choices: list[Choice]
    streams: bool
    hints: list[str]
    framing: Framing = SERVER_SENT

    @abstractmethod
    def whole(self, deltas: list[Delta]) -> dict[str, Any]:
        """The response, of all choices' joined deltas in order. Its long arrays are generators."""

    @abstractmethod
    def events(self, steps: Steps) -> AsyncGenerator[bytes, None]:
        """The pieces of a stream: what each step brought, in one piece, and what follows the last one."""


class Service:
    """One served model, for the routes."""

    def __init__(
        self, model: ServedModel, client: Fleet, metrics: Metrics, limits: QueueLimits, options: ServerOptions
    ) -> None:
        self.model = model
        self._client = client
        self._metrics = metrics
        self.admission = Admission(client, limits, options.fair_by)
        self._log_requests = options.enable_log_requests
        self._fair_by = options.fair_by
        self.audio_limits = AudioLimits(options.max_audio_bytes, options.max_audio_seconds)
        self._long_work = ThreadPoolExecutor(1, "octavo-long")

    def check(self, name: str | None, http: Request) -> None:
        """Whether a request for the model of this name can be answered. Raises ApiError.

        That the queue is full is told here, before the prompt is made: of a burst many have passed FullQueue together.
        """
        pooled = self.model.pooled
        if pooled is not None:
            self.check_name(name)
            raise bad_request(f"the model {self.model.name!r} generates no text; {pooled.what_works} work", "model")
        if self.model.speech is not None:
            self.check_name(name)
            raise bad_request(f"the model {self.model.name!r} {HEARS}", "model")
        self._check(name, http)

    def check_speech(self, http: Request) -> SpeechText:
        """The same for a request with a recording, whose model's name is checked later; returns what is asked with."""
        speech = self.model.speech
        if speech is None:
            raise bad_request(
                f"the model {self.model.name!r} reads text, and hears nothing; a speech model, such as Whisper, does",
                "model",
            )
        self._check(None, http)
        return speech

    def check_pooled(self, name: str | None, http: Request, task: PoolingTask) -> PooledText:
        """The same for a request that is pooled; returns what the model does. Raises ApiError."""
        pooled = self.model.pooled
        if pooled is None:
            self.check_name(name)
            does = HEARS if self.model.speech is not None else READS if self.model.encoder is not None else WRITES
            raise bad_request(f"the model {self.model.name!r} {does}", "model")
        self._check(name, http)
        if task not in pooled.facts.tasks:
            raise bad_request(f"the model {self.model.name!r} doesn't {task}; {pooled.what_works} work", "model")
        return pooled

    def _check(self, name: str | None, http: Request) -> None:
        self.check_name(name)
        if self._client.refusal is not None:
            raise ApiError(503, self._client.refusal)
        if getattr(http.state, PLACE, None) is None:
            self.admission.check_room(owner_of(http))

    def check_name(self, name: str | None) -> None:
        """Whether the model of this name is served. Raises ApiError."""
        if name is not None and not self.model.serves(name):
            served = ", ".join(self.model.all_names)
            raise ApiError(
                404, f"the model {name[:80]!r} is not served here; {served} is", param="model", code="model_not_found"
            )

    def abort(self, request_ids: Iterable[str]) -> None:
        """End these of the engine's requests with the finish reason `abort`."""
        self._client.abort(request_ids)

    def abort_all_of(self, key_owner: str, names: Container[str] | None = None) -> None:
        """End all of the engine's requests that were made with this API key, or those of these names."""
        self._client.abort_all_of(key_owner, names)

    def forget_prefixes(self) -> None:
        """Empty the prefix cache."""
        self._client.reset_prefix_cache()

    async def respond(self, http: Request, answer: Answer) -> Response:
        """Generate the answer and send it, whole or as events."""
        return await self.send(answer, self.steps(http, answer.choices, answer.hints))

    async def send(self, answer: Answer, steps: Steps) -> Response:
        """Send an answer as its steps come, whole or as events."""
        if answer.streams:
            return EventStream(answer.events(steps), answer.framing)
        deltas = await fold(steps, len(answer.choices))
        return JsonResponse(*await encode_in_turns(answer.whole(deltas)))

    def steps(self, http: Request, choices: Sequence[Choice], hints: Iterable[str]) -> Steps:
        """Admit the request, or raise ApiError; what its choices' answers are then comes step by step."""
        self._metrics.hints(hints)
        if self._log_requests:
            logger.info("%s: %d choices, %s", http.url.path, len(choices), choices[0].request.params)
        if getattr(http.state, "gives_way", False):  # a line of a batch
            put_last(choices)
        key_owner = owner_of(http)
        set_owner(choices, self._fair_by, key_owner)
        lengths = [choice.request.num_read for choice in choices]
        sent = {choice.sent.request_id: _media_bytes(choice.sent) for choice in choices}  # one for several answers
        ticket = self._admit(http, lengths, key_owner, choices[0].sent.owner, sum(sent.values()))
        answers = generate if choices[0].length_penalty is None else search_beams
        return answers(choices, self._client, self._metrics, ticket)

    async def pooled(
        self, http: Request, prompts: Sequence[PooledPrompt], params: PoolingParams, priority: int, user: str = ""
    ) -> list[PooledResult]:
        """Admit a pooled request, or raise ApiError; what each of its prompts gave. user: as --fair-by user has it."""
        check_priority(priority, self.model)
        if self._log_requests:
            logger.info("%s: %d prompts, %s", http.url.path, len(prompts), params)
        if getattr(http.state, "gives_way", False):  # a line of a batch
            priority = LOWEST_PRIORITY
        key_owner = owner_of(http)
        owner = fair_owner(self._fair_by, key_owner, user)
        requests = pooled_requests(prompts, params, self.model, priority=priority, owner=owner)
        ticket = self._admit(http, [len(prompt.token_ids) for prompt in prompts], key_owner, owner)
        return await pool(requests, self._client, self._metrics, ticket)

    def _admit(self, http: Request, lengths: list[int], key_owner: str, owner: str, media_bytes: int = 0) -> Ticket:
        """A ticket for prompts of these lengths, or ApiError."""
        leave_place(http.scope)  # for the ticket, which may need several
        ticket = self.admission.admit(
            lengths, timeout_of(http.headers.get("x-request-timeout")), key_owner, owner, media_bytes
        )
        ticket.name = getattr(http.state, "request_name", http.state.request_id)
        return ticket

    def count_hints(self, hints: Iterable[str]) -> None:
        """Count the fields of a request that were passed over."""
        self._metrics.hints(hints)

    async def off_loop(self, http: Request, work: Callable[[], T], weight: int = 1, beside: int = 0) -> T:
        """Do work whose time grows with the prompt: at once for a short body, in a thread for a longer one.

        weight: how much longer a byte of this body takes than one of a prompt. beside: further bytes of work.

        Work for very long bodies is done one at a time: tokenizing 4 MB takes 150 MB, which a thread's heap keeps.
        """
        size: int = http.state.body_size * weight + beside
        if size < LONG_BODY:
            return work()
        if size < VERY_LONG_BODY:
            return await asyncio.to_thread(work)
        return await asyncio.get_running_loop().run_in_executor(self._long_work, work)


def _media_bytes(request: AddRequest) -> int:
    """What it carries besides tokens."""
    return len(request.features) + sum(len(image.pixels) for image in request.images)
