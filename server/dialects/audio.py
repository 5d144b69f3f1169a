"""/v1/audio/transcriptions and /v1/audio/translations: OpenAI's forms, with a recording in; its text out."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, BinaryIO

from fastapi import APIRouter, Request
from fastapi.responses import Response

from octavo.audio.facts import AudioError, Piece
from octavo.server.dialects.audio_request import FIELDS, AudioForm, read_fields
from octavo.server.encoding import JsonResponse, encode_json
from octavo.server.errors import RESPONSES, ApiError, also_as
from octavo.server.forms import file_of, received_form
from octavo.server.generation import Choice, Delta, Steps, fold
from octavo.server.service import VERY_LONG_BODY, Service
from octavo.server.speech_text import SpeechText, Task
from octavo.server.streaming import EventStream, event, unless_hung_up
from octavo.server.strict_json import HUNG_UP, StrictRoute
from octavo.server.transcript import Said, duration_of, segments_of, srt_of, text_of, verbose_segments, vtt_of
from octavo.server.transcription import Asked, choice_of_language, choices_of
from octavo.text.detokenizer import IncrementalDecoder
from octavo.text.tokenizer import Tokenizer

Json = dict[str, Any]


def routes(service: Service) -> APIRouter:
    """Both routes."""
    router = APIRouter(route_class=StrictRoute, responses=RESPONSES)
    answers = also_as("text/event-stream")

    @router.post("/v1/audio/transcriptions", responses=answers)
    async def transcriptions(http: Request) -> Response:
        """Write down what is said in a recording: multipart, with the fields file and model."""
        return await _answered(http, service, "transcribe")

    @router.post("/v1/audio/translations", responses=answers)
    async def translations(http: Request) -> Response:
        """The same in English, whatever is spoken."""
        return await _answered(http, service, "translate")

    return router


async def _answered(http: Request, service: Service, task: Task) -> Response:
    speech = service.check_speech(http)
    limit = service.audio_limits.most_bytes
    too_large = f"the file is larger than {limit} bytes (--max-audio-bytes)"
    form = await received_form(http, limit, too_large, FIELDS[task])
    try:
        fields = read_fields(form, task, speech, service.model)
        service.check_name(fields.model)
        file = file_of(form).file
        http.state.body_size = file_of(form).size or 0
        # in a thread however short the file: silence is added up to the length that the model reads
        pieces = await service.off_loop(http, lambda: _pieces(file, service, speech), beside=VERY_LONG_BODY)
    finally:
        await form.close()
    response = await unless_hung_up(http.receive, lambda: _Transcript(http, service, speech, fields, pieces).sent())
    return Response(status_code=HUNG_UP) if response is None else response


def _pieces(file: BinaryIO, service: Service, speech: SpeechText) -> list[Piece]:
    """The recording in pieces. Raises ApiError."""
    from octavo.audio.decode import decode
    from octavo.audio.pieces import pieces_of

    try:
        samples = decode(file, service.audio_limits.most_seconds)
    except AudioError as error:
        raise ApiError(413 if error.is_too_long else 400, f"file: {error}", param="file") from None
    return pieces_of(samples, speech.source.rows, speech.source.length)


class _Transcript:
    """One request's answer."""

    def __init__(
        self, http: Request, service: Service, speech: SpeechText, fields: AudioForm, pieces: list[Piece]
    ) -> None:
        self._http = http
        self._service = service
        self._speech = speech
        self._fields = fields
        self._pieces = pieces
        self._tokenizer = service.model.tokenizer
        self._asked = fields.asked

    async def sent(self) -> Response:
        """The response. Raises ApiError."""
        asked = self._asked
        model = self._service.model
        if asked.language is None and self._speech.languages and len(self._pieces) > 1:
            asked = self._asked = await self._with_language(asked)
        choices = choices_of(self._pieces, asked, model, self._speech)
        steps = self._service.steps(self._http, choices, ())
        if self._fields.stream:
            return EventStream(self._events(choices, steps))
        deltas = await fold(steps, len(choices))
        return self._whole([self._said(choice, delta) for choice, delta in zip(choices, deltas, strict=True)], deltas)

    async def _with_language(self, asked: Asked) -> Asked:
        """With the language of the first piece, which is that of all."""
        choice = choice_of_language(self._pieces[0], self._service.model, self._speech)
        (delta,) = await fold(self._service.steps(self._http, [choice], ()), 1)
        return asked.in_language(self._code(delta.token_ids))

    def _code(self, token_ids: Sequence[int]) -> str | None:
        """The language whose mark is the first of these."""
        first = token_ids[0] if token_ids else -1
        return next((code for code, token in self._speech.languages.items() if token == first), None)

    def _said(self, choice: Choice, delta: Delta) -> Said:
        """An answer behind its marks."""
        rules = choice.request.params.rules
        num_marks = 0 if rules is None else len(rules.starts)
        return Said(delta.token_ids[num_marks:], delta.logprobs)

    def _whole(self, said: list[Said], deltas: list[Delta]) -> Response:
        speech = self._speech
        tokenizer = self._tokenizer
        form = self._fields.response_format
        segments = segments_of(said, self._pieces, speech) if self._asked.has_times else []
        if form == "srt":
            return Response(srt_of(segments, tokenizer), media_type="text/plain")
        if form == "vtt":
            return Response(vtt_of(segments, tokenizer), media_type="text/plain")
        text = text_of(said, speech, tokenizer)
        if form == "text":
            return Response(f"{text}\n", media_type="text/plain")
        if form == "json":
            return _json({"text": text, "usage": self._usage()})
        spoken = self._asked.language or self._code(deltas[0].token_ids) or "en"
        content: Json = {
            "task": self._asked.task,
            "language": "en" if self._asked.task == "translate" else spoken,
            "duration": duration_of(self._pieces),
            "text": text,
        }
        content["segments"] = verbose_segments(segments, said, self._pieces, speech, tokenizer, self._asked.temperature)
        return _json(content | {"usage": self._usage()})

    def _usage(self) -> Json:
        """OpenAI's, by seconds that were begun."""
        return {"type": "duration", "seconds": math.ceil(duration_of(self._pieces))}

    async def _events(self, choices: Sequence[Choice], steps: Steps) -> AsyncGenerator[bytes, None]:
        """OpenAI's events. Pieces are computed together, and told one after another."""
        text = ""
        waiting = [_Pending(self._speech, self._tokenizer) for _ in choices]
        at = 0
        async with aclosing(steps):
            async for deltas in steps:
                for delta in deltas:
                    waiting[delta.index].take(delta)
                fresh = ""
                while at < len(waiting):
                    fresh += waiting[at].taken()
                    if not waiting[at].has_ended:
                        break
                    at += 1
                fresh = fresh if text else fresh.lstrip()
                if fresh:
                    text += fresh
                    yield event({"type": "transcript.text.delta", "delta": fresh})
        yield event({"type": "transcript.text.done", "text": text})


class _Pending:
    """A piece's text that was not told yet."""

    def __init__(self, speech: SpeechText, tokenizer: Tokenizer) -> None:
        self._speech = speech
        self._decoder = IncrementalDecoder(tokenizer, skip_special_tokens=False)
        self._text = ""
        self.has_ended = False

    def take(self, delta: Delta) -> None:
        self._text += self._decoder.push(self._speech.text_tokens(delta.token_ids))
        if delta.finish_reason is not None:
            self._text += self._decoder.finish()
            self.has_ended = True

    def taken(self) -> str:
        text = self._text
        self._text = ""
        return text


def _json(content: Json) -> Response:
    return JsonResponse(encode_json(content))
