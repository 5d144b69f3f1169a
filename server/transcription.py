"""A recording's pieces as requests of the engine: Whisper's marks in front, its rules beside.

What is known is in the prompt, which is computed at once. What is asked of the model (its language), or asked about
(whether anybody speaks), is sampled: first come the tokens that the rules force.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from octavo.audio.facts import Piece
from octavo.runtime.messages import AddRequest, SamplingParams
from octavo.runtime.source_messages import AnswerRules
from octavo.server.dialects.fields import GenerationRequest
from octavo.server.generation import Choice, text_parser
from octavo.server.metrics import Timeline
from octavo.server.served_model import ServedModel
from octavo.server.speech_text import SpeechText, Task

_unique = itertools.count()


@dataclass(frozen=True)
class Asked:
    """What is wanted of a recording.

    language     its code; None: the model says it
    before       tokens of a text that came before
    has_times    with timestamps; measures: with log-probabilities, and whether anybody speaks
    """

    task: Task
    language: str | None
    before: tuple[int, ...]
    temperature: float
    has_times: bool
    measures: bool
    seed: int | None = None

    def in_language(self, code: str | None) -> Asked:
        return replace(self, language=code)


def choices_of(pieces: Sequence[Piece], asked: Asked, model: ServedModel, speech: SpeechText) -> list[Choice]:
    """One for each piece."""
    known, starts = marks_of(asked, speech)
    before = (speech.previous, *asked.before) if asked.before else ()
    prompt = [*before, speech.start, *known]
    params = params_of(asked, starts, model.max_model_len - len(prompt), speech)
    return [_choice(index, piece, prompt, params, model) for index, piece in enumerate(pieces)]


def choice_of_language(piece: Piece, model: ServedModel, speech: SpeechText) -> Choice:
    """Whose answer is the token of a piece's language."""
    rules = AnswerRules((tuple(speech.languages.values()),))
    params = SamplingParams(max_tokens=1, temperature=0.0, rules=rules)
    return _choice(0, piece, [speech.start], params, model)


def choice_of_silence(model: ServedModel, speech: SpeechText) -> Choice:
    """One token, for who wants to know whether the engine answers."""
    silence = Piece(0.0, 0.0, bytes(speech.source.num_bytes))
    return _choice(0, silence, [speech.start], SamplingParams(max_tokens=1, temperature=0.0), model)


def marks_of(asked: Asked, speech: SpeechText) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """The marks behind the first one: those that stand in the prompt, and those that are sampled."""
    marks: list[tuple[int, ...]] = []
    if speech.languages:
        own = speech.languages
        marks = [tuple(own.values()) if asked.language is None else (own[asked.language],), (speech.tasks[asked.task],)]
    if not asked.has_times:
        marks.append((speech.no_times,))
    if asked.measures or any(len(mark) > 1 for mark in marks):
        return (), tuple(marks)
    return tuple(mark[0] for mark in marks), ()


def params_of(asked: Asked, starts: tuple[tuple[int, ...], ...], room: int, speech: SpeechText) -> SamplingParams:
    forbidden = dict.fromkeys((*speech.suppressed, *((speech.no_times,) if asked.has_times else ())))
    return SamplingParams(
        max_tokens=room,
        temperature=asked.temperature,
        seed=asked.seed,
        stop_token_ids=(speech.end,),
        logprobs=0 if asked.measures else None,
        logprob_token_ids=(speech.no_speech,) if asked.measures and speech.no_speech is not None else (),
        forbidden=tuple((token,) for token in forbidden),
        rules=AnswerRules(
            starts,
            speech.never_first,
            speech.first_time if asked.has_times else None,
            speech.latest_start if asked.has_times else None,
            speech.end,
        ),
    )


def _choice(index: int, piece: Piece, prompt: list[int], params: SamplingParams, model: ServedModel) -> Choice:
    name = f"{model.server_name}speech-{next(_unique)}"
    request = AddRequest(name, prompt, params, time.time(), features=piece.features)
    return Choice(
        index=index,
        request=request,
        sent=request,
        parser=text_parser(request, GenerationRequest(), model),
        num_wanted=params.max_tokens,
        show_stop=False,
        own_stops=frozenset(),
        timeline=Timeline(request.arrival_time, len(prompt)),
    )
