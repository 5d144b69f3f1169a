"""What a speech model is asked with, and how its tokens become segments, where no server is needed to see it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_whisper
from tiny_whisper import END, FIRST_TIME, IDS

from octavo.audio.facts import Piece
from octavo.runtime.source_messages import AudioSource
from octavo.server.speech_text import SpeechText, read_speech_text
from octavo.server.transcript import Said, Segment, segments_of, srt_of, text_of, vtt_of
from octavo.server.transcription import Asked, marks_of
from octavo.text.tokenizer import Tokenizer

SHAPE = AudioSource(tiny_whisper.NUM_MELS, 2 * tiny_whisper.POSITIONS, tiny_whisper.POSITIONS, 1)
PLAIN = Asked("transcribe", "de", (), 0.0, has_times=False, measures=False)


def speech_of(directory: Path, **changed: object) -> SpeechText:
    """Of a directory without a model."""
    tiny_whisper.save_text_side(directory)
    file = directory / "generation_config.json"
    file.write_text(json.dumps({"is_multilingual": True, "suppress_tokens": [-1, 3]} | changed))
    return read_speech_text(directory, SHAPE, Tokenizer.open(directory))


def test_marks_are_the_tokenizers(tmp_path: Path) -> None:
    speech = speech_of(tmp_path, max_initial_timestamp_index=7, begin_suppress_tokens=[220, END])
    assert (speech.start, speech.end, speech.first_time) == (IDS["startoftranscript"], END, FIRST_TIME)
    assert speech.languages == {code: IDS[code] for code in ("en", "de", "haw")}
    assert speech.tasks == {task: IDS[task] for task in ("transcribe", "translate")}
    assert (speech.suppressed, speech.never_first) == ((3,), (220, END))
    assert speech.latest_start == FIRST_TIME + 7
    assert speech.seconds_a_time == pytest.approx(0.02)


def test_what_is_known_is_in_the_prompt_and_the_rest_is_sampled(tmp_path: Path) -> None:
    speech = speech_of(tmp_path)
    de, task, plain = IDS["de"], IDS["transcribe"], IDS["notimestamps"]
    assert marks_of(PLAIN, speech) == ((de, task, plain), ())
    timed = Asked("translate", "de", (), 0.0, has_times=True, measures=False)
    assert marks_of(timed, speech) == ((de, IDS["translate"]), ())
    measured = Asked("transcribe", "de", (), 0.0, has_times=True, measures=True)
    assert marks_of(measured, speech) == ((), ((de,), (task,)))
    heard = PLAIN.in_language(None)
    assert marks_of(heard, speech) == ((), (tuple(speech.languages.values()), (task,), (plain,)))


def test_a_model_of_one_language_has_no_marks_for_it(tmp_path: Path) -> None:
    speech = speech_of(tmp_path, is_multilingual=False)
    assert (speech.languages, speech.tasks) == ({}, {})
    assert marks_of(PLAIN.in_language(None), speech) == ((IDS["notimestamps"],), ())


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("preprocessor_config.json", {"hop_length": 80}, "hop_length is 80"),
        ("generation_config.json", {"suppress_tokens": "all"}, "suppress_tokens must be a list"),
        ("generation_config.json", {"suppress_tokens": [10**12]}, "suppress_tokens must be a list of token ids, below"),
        (
            "generation_config.json",
            {"max_initial_timestamp_index": []},
            r"max_initial_timestamp_index \[\] is no index",
        ),
    ],
)
def test_what_cannot_be_meant_is_named(file: str, content: object, said: str, tmp_path: Path) -> None:
    tiny_whisper.save_text_side(tmp_path)
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=said):
        read_speech_text(tmp_path, SHAPE, Tokenizer.open(tmp_path))


def test_segments_stand_between_times(tmp_path: Path) -> None:
    """Pairs, a time without text, text that no time ends, and a time beyond the recording."""
    speech = speech_of(tmp_path)
    pieces = [Piece(0.0, 0.9, b""), Piece(0.9, 0.5, b""), Piece(1.4, 0.3, b"")]
    said = [
        Said([FIRST_TIME, 1, 2, FIRST_TIME + 20, FIRST_TIME + 25, 3, FIRST_TIME + 50, END], []),
        Said([FIRST_TIME + 5, FIRST_TIME + 10, 4, 5], []),
        Said([6, END], []),
    ]
    assert segments_of(said, pieces, speech) == [
        Segment(0.0, 0.4, [1, 2], 0),
        Segment(0.5, 0.9, [3], 0),
        Segment(1.1, 1.4, [4, 5], 1),
        Segment(1.4, 1.7, [6], 2),
    ]


def test_subtitles_are_as_their_formats_say(tmp_path: Path) -> None:
    """No text ends its own cue."""
    speech = speech_of(tmp_path)
    tokenizer = Tokenizer.open(tmp_path)
    first, second = (tokenizer.encode(text) for text in (" One --> two.\n\nThree", " Four"))
    segments = [Segment(0.0, 59.9996, first, 0), Segment(3723.04, 3724.5, second, 1)]
    assert srt_of(segments, tokenizer) == (
        "1\n00:00:00,000 --> 00:01:00,000\nOne -> two.  Three\n\n2\n01:02:03,040 --> 01:02:04,500\nFour\n\n"
    )
    assert vtt_of(segments, tokenizer) == (
        "WEBVTT\n\n00:00:00.000 --> 00:01:00.000\nOne -> two.  Three\n\n01:02:03.040 --> 01:02:04.500\nFour\n\n"
    )
    said = [Said([*first, END], []), Said([FIRST_TIME, *second, FIRST_TIME + 1, END], [])]
    assert text_of(said, speech, tokenizer) == "One --> two.\n\nThree Four"
