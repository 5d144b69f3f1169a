"""What a speech model has said of a recording: its text, in segments with times, and the formats that these have."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from octavo.audio.facts import HOP, RATE, Piece
from octavo.runtime.messages import Logprobs
from octavo.server.speech_text import SpeechText
from octavo.text.tokenizer import Tokenizer

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Said:
    """A piece's answer: its tokens behind the marks, and of all its tokens the log-probabilities, where asked for."""

    token_ids: list[int]
    logprobs: list[Logprobs]


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a recording, in seconds, and its tokens, timestamps left out."""

    start: float
    end: float
    token_ids: list[int]
    piece: int


def text_of(said: Sequence[Said], speech: SpeechText, tokenizer: Tokenizer) -> str:
    """The text of all pieces."""
    texts = (tokenizer.decode(speech.text_tokens(it.token_ids)) for it in said)
    return "".join(texts).strip()


def segments_of(said: Sequence[Said], pieces: Sequence[Piece], speech: SpeechText) -> list[Segment]:
    """The segments of all pieces: what stands between two timestamps, the last one as far as the piece goes."""
    return [
        segment
        for number, (it, piece) in enumerate(zip(said, pieces, strict=True))
        for segment in _segments(number, it.token_ids, piece, speech)
    ]


def _segments(number: int, token_ids: Sequence[int], piece: Piece, speech: SpeechText) -> list[Segment]:
    found: list[Segment] = []
    start = 0.0
    text: list[int] = []

    def close(end: float) -> None:
        if text:
            first, last = (round(piece.begin + min(at, piece.seconds), 3) for at in (start, end))
            found.append(Segment(first, last, text.copy(), number))
            text.clear()

    for token in token_ids:
        if token >= speech.first_time:
            at = (token - speech.first_time) * speech.seconds_a_time
            close(at)
            start = at
        elif token < speech.end:
            text.append(token)
    close(piece.seconds)
    return found


def verbose_segments(
    segments: Sequence[Segment],
    said: Sequence[Said],
    pieces: Sequence[Piece],
    speech: SpeechText,
    tokenizer: Tokenizer,
    temperature: float,
) -> list[Json]:
    """OpenAI's segments. What measures an answer is of a whole piece, as Whisper has it."""
    measures = [_measures(it, speech, tokenizer) for it in said]
    return [
        {
            "id": number,
            "seek": round(pieces[it.piece].begin * RATE / HOP),  # in moments of the features
            "start": it.start,
            "end": it.end,
            "text": tokenizer.decode(it.token_ids),
            "tokens": it.token_ids,
            "temperature": temperature,
            **measures[it.piece],
        }
        for number, it in enumerate(segments)
    ]


def _measures(said: Said, speech: SpeechText, tokenizer: Tokenizer) -> Json:
    text = tokenizer.decode(speech.text_tokens(said.token_ids)).encode()
    own = said.logprobs[len(said.logprobs) - len(said.token_ids) :]
    return {
        "avg_logprob": sum(entry.logprob for entry in own) / max(1, len(own)),
        "compression_ratio": len(text) / len(zlib.compress(text)),
        "no_speech_prob": _no_speech(said.logprobs, speech),
    }


def _no_speech(logprobs: Sequence[Logprobs], speech: SpeechText) -> float | None:
    """Of the logits behind the first mark."""
    if speech.no_speech is None or not logprobs:
        return None
    first = logprobs[0]
    return math.exp(first.top_logprobs[first.top_ids.index(speech.no_speech)])


def srt_of(segments: Sequence[Segment], tokenizer: Tokenizer) -> str:
    """SubRip."""
    return "".join(
        f"{number}\n{_clock(it.start, ',')} --> {_clock(it.end, ',')}\n{_line(it, tokenizer)}\n\n"
        for number, it in enumerate(segments, start=1)
    )


def vtt_of(segments: Sequence[Segment], tokenizer: Tokenizer) -> str:
    """WebVTT."""
    cues = (f"{_clock(it.start, '.')} --> {_clock(it.end, '.')}\n{_line(it, tokenizer)}\n\n" for it in segments)
    return "WEBVTT\n\n" + "".join(cues)


def _line(segment: Segment, tokenizer: Tokenizer) -> str:
    """A cue's text: no line of it may end the cue, or be taken for its times."""
    return tokenizer.decode(segment.token_ids).strip().replace("\n", " ").replace("-->", "->")


def _clock(seconds: float, point: str) -> str:
    """HH:MM:SS and milliseconds."""
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{point}{rest % 1000:03}"


def duration_of(pieces: Sequence[Piece]) -> float:
    """Seconds of the recording, to the sample."""
    last = pieces[-1]
    return round((last.begin + last.seconds) * RATE) / RATE
