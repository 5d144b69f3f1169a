"""Files to samples, against soundfile's own whole decoding and scipy's resampling; and files that are none."""

from __future__ import annotations

import contextlib
import io
import itertools
import struct

import numpy as np
import pytest
import scipy.signal
import soundfile

from octavo.audio.decode import decode
from octavo.audio.facts import HOP, RATE, AudioError
from octavo.audio.log_mel import log_mel
from octavo.audio.pieces import cuts_in, pieces_of

KINDS = {
    "wav": ("WAV", "PCM_16"),
    "wav, float": ("WAV", "FLOAT"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}


def voice(rate: int, seconds: float = 1.5, channels: int = 1) -> np.ndarray:
    """Below the fourth of any rate here, so that resampling keeps all of it."""
    at = np.arange(int(rate * seconds)) / rate
    one = 0.4 * np.sin(2 * np.pi * 440 * at) + 0.2 * np.sin(2 * np.pi * 1250 * at)
    return np.stack([one * (1 + channel) / channels for channel in range(channels)], axis=1).astype(np.float32)


def written(kind: str, rate: int, samples: np.ndarray) -> bytes:
    file = io.BytesIO()
    container, subtype = KINDS[kind]
    soundfile.write(file, samples, rate, format=container, subtype=subtype)
    return file.getvalue()


def decoded(content: bytes, most_seconds: float = 60.0) -> np.ndarray:
    return decode(io.BytesIO(content), most_seconds)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (48_000, 2), (8_000, 1)])
def test_samples_are_those_of_the_file_at_16_kilohertz(kind: str, rate: int, channels: int) -> None:
    content = written(kind, rate, voice(rate, channels=channels))
    own = decoded(content)
    whole, _ = soundfile.read(io.BytesIO(content), dtype="float64", always_2d=True)
    truth = scipy.signal.resample(whole.mean(axis=1), round(len(whole) * RATE / rate))
    assert own.dtype == np.float32
    assert abs(len(own) - len(truth)) <= 1
    inner = slice(RATE // 10, len(truth) - RATE // 10)  # two filters differ at the ends, where a tone begins suddenly
    assert np.abs(own[: len(truth)][inner] - truth[inner]).max() < 2e-3


def riff(content: bytes, said: int) -> bytes:
    return content[:4] + struct.pack("<I", said) + content[8:]


WAV = written("wav", RATE, voice(RATE))
FLAC = written("flac", RATE, voice(RATE))
BAD = {
    "empty": (b"", "empty"),
    "text": (b"hello, this is no sound", "no WAV, FLAC, OGG or MP3"),
    "mp4": (b"\0\0\0\x20ftypM4A \0\0", "it is MP4 or M4A"),
    "webm": (b"\x1a\x45\xdf\xa3" + bytes(40), "it is WebM"),
    "a head alone": (WAV[:12], "cut short"),
    "a WAV cut short": (WAV[: len(WAV) // 2], "cut short"),
    "a FLAC cut short": (FLAC[: len(FLAC) // 2], "FLAC"),
    "a FLAC whose frames are noise": (FLAC[:60] + bytes(range(256)) * 40, "FLAC"),
    "an OGG of noise": (b"OggS" + bytes(range(200)), "OGG"),
    "an MP3 of noise": (b"\xff\xfb" + bytes(range(200)), "MP3"),
    "a tag alone": (b"ID3" + bytes(range(200)), "no MP3 behind them"),
    "no samples": (written("wav", RATE, np.zeros((0, 1), np.float32)), "no samples"),
    "not finite": (written("wav, float", RATE, np.full((200, 1), np.nan, np.float32)), "no finite numbers"),
    "many channels": (written("wav", RATE, np.zeros((10, 40), np.float32)), "40 channels"),
    "a rate of 100 Hz": (written("wav", 100, np.zeros((10, 1), np.float32)), "at 100 Hz"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_gives_no_samples_is_refused(name: str) -> None:
    content, reason = BAD[name]
    with pytest.raises(AudioError, match=reason) as caught:
        decoded(content)
    assert not caught.value.is_too_long


def test_a_writer_that_could_not_go_back_is_believed() -> None:
    np.testing.assert_array_equal(decoded(riff(WAV, 0xFFFFFFFF)), decoded(WAV))


@pytest.mark.parametrize("kind", ["flac", "wav"])
def test_a_bomb_is_refused_before_it_is_unpacked(kind: str) -> None:
    """Ten minutes of silence, a few kilobytes of FLAC, where ten seconds may come."""
    content = written(kind, RATE, np.zeros((600 * RATE, 1), np.float32))
    assert kind == "wav" or len(content) < 1 << 18
    with pytest.raises(AudioError, match="longer than 10 seconds") as caught:
        decoded(content, 10.0)
    assert caught.value.is_too_long


def test_mutated_files_give_samples_or_a_reason() -> None:
    rng = np.random.default_rng(0)
    for kind in KINDS:
        content = np.frombuffer(written(kind, RATE, voice(RATE, 0.2)), np.uint8)
        for _ in range(40):
            broken = content.copy()
            places = rng.integers(4, min(len(broken), 400), 6)
            broken[places] = rng.integers(0, 256, 6)
            with contextlib.suppress(AudioError):
                assert len(decoded(broken.tobytes(), 5.0)) <= 5 * RATE + 1


def test_long_audio_is_cut_where_it_is_quiet() -> None:
    rng = np.random.default_rng(0)
    samples = rng.standard_normal(75 * RATE).astype(np.float32)
    quiet = [int(29.4 * RATE), int(59.1 * RATE)]
    for place in quiet:
        samples[place - 1000 : place + 1000] *= 0.001
    cuts = cuts_in(samples, 30 * RATE)
    assert len(cuts) == 2
    for cut, place in zip(cuts, quiet, strict=True):
        assert abs(cut - place) < 250
    assert cuts_in(samples[: 30 * RATE], 30 * RATE) == []


def test_pieces_are_all_of_a_recording() -> None:
    samples = np.random.default_rng(0).standard_normal(int(3.3 * RATE)).astype(np.float32)
    pieces = pieces_of(samples, 80, RATE // HOP)
    assert pieces[0].begin == 0
    for piece, after in itertools.pairwise(pieces):
        assert piece.begin + piece.seconds == pytest.approx(after.begin)
        assert piece.seconds <= 1.0
    last = pieces[-1]
    assert last.begin + last.seconds == pytest.approx(3.3)
    own = np.frombuffer(last.features, np.float32).reshape(80, 100)
    np.testing.assert_array_equal(own, log_mel(samples[round(last.begin * RATE) :], 80, 100))


def tagged(content: bytes, count: int = 1) -> bytes:
    """Behind ID3 tags of 300 bytes."""
    return count * (b"ID3\x04\x00\x00" + bytes((0, 0, 2, 44)) + bytes(300)) + content


def test_tags_in_front_are_passed_over() -> None:
    content = written("mp3", RATE, voice(RATE))
    np.testing.assert_array_equal(decode(io.BytesIO(tagged(content, 2)), 60), decode(io.BytesIO(content), 60))


@pytest.mark.parametrize("container", ["AIFF", "AU", "WAV"])
def test_no_tag_hides_a_format_that_is_not_decoded(container: str) -> None:
    """Of a WAV behind tags libsndfile reads less than there is, and says nothing."""
    file = io.BytesIO()
    soundfile.write(file, voice(RATE), RATE, format=container)
    for count in (1, 9):
        with pytest.raises(AudioError, match="no MP3 behind them"):
            decode(io.BytesIO(tagged(file.getvalue(), count)), 60)
