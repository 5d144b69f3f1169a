"""Sound files to samples, with the extra `audio`: WAV, FLAC, OGG (Vorbis, Opus) and MP3 become one channel at 16 kHz.

What a file says of itself is not believed: samples are counted as they come, and no more than a limit is kept, however
few bytes they were packed in. A file is known by its first bytes, behind the ID3 tags that libsndfile passes over, so
that its parsers of rarer formats never see what a client sends.
"""

from __future__ import annotations

from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from octavo.audio.facts import RATE, AudioError
from octavo.audio.log_mel import Floats

BLOCK = 1 << 14  # frames that are decoded at once
MOST_CHANNELS = 16
RATES = (1_000, 384_000)
MOST_TAGS = 8  # in front of what is heard
ENDLESS = (0, 0xFFFFFFFF)  # the length in the head of a WAV file whose writer could not go back to it


class _Stream(soundfile.SoundFile):  # type: ignore[misc]  # which has no types
    """A file that is read on and on: soundfile would seek after each block, and an MP3 goes on wrongly then."""

    def seekable(self) -> bool:
        return False


def decode(file: BinaryIO, most_seconds: float) -> Floats:
    """The samples of a file that can be searched, [count] float32 at 16 kHz. Raises AudioError."""
    kind = _kind_of(file)
    try:
        with _Stream(file) as sound:
            return _samples(sound, kind, most_seconds)
    except soundfile.LibsndfileError as error:
        raise AudioError(f"the {kind} file can't be decoded: {error.error_string}") from None


def _kind_of(file: BinaryIO) -> str:
    """WAV, FLAC, OGG or MP3; leaves the file at its beginning."""
    size = file.seek(0, 2)
    if size == 0:
        raise AudioError("the file is empty")
    has_tags, head = _behind_tags(file)
    file.seek(0)
    is_mp3 = len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0
    if has_tags and not is_mp3:
        raise AudioError("the file has ID3 tags, and no MP3 behind them")
    if head[:4] == b"RIFF" and head[8:] == b"WAVE":
        said = int.from_bytes(head[4:8], "little")
        if said not in ENDLESS and said + 8 > size:
            raise AudioError(f"the WAV file is cut short: it says that it has {said + 8} bytes, and {size} came")
        return "WAV"
    if head[:4] == b"fLaC":
        return "FLAC"
    if head[:4] == b"OggS":
        return "OGG"
    if is_mp3:
        return "MP3"
    other = "MP4 or M4A" if head[4:8] == b"ftyp" else "WebM" if head[:4] == b"\x1a\x45\xdf\xa3" else ""
    is_other = f": it is {other}" if other else ""
    raise AudioError(f"the file is no WAV, FLAC, OGG or MP3, which are what is decoded here{is_other}")


def _behind_tags(file: BinaryIO) -> tuple[bool, bytes]:
    """Whether there are ID3 tags, and the first bytes behind them."""
    begin = 0
    for _ in range(1 + MOST_TAGS):
        file.seek(begin)
        head = file.read(12)
        if head[:3] != b"ID3" or len(head) < 10:
            break
        begin += 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
    return begin > 0, head


def _samples(sound: _Stream, kind: str, most_seconds: float) -> Floats:
    rate = sound.samplerate
    if not RATES[0] <= rate <= RATES[1] or sound.channels > MOST_CHANNELS:
        raise AudioError(
            f"the {kind} file has {sound.channels} channels at {rate} Hz: 1 to {MOST_CHANNELS} at {RATES[0]} to "
            f"{RATES[1]} Hz work"
        )
    resampler = soxr.ResampleStream(rate, RATE, 1, dtype="float32")
    pieces: list[Floats] = []
    num_frames = 0
    is_last = False
    while not is_last:
        block = sound.read(BLOCK, dtype="float32", always_2d=True)
        num_frames += len(block)
        is_last = len(block) < BLOCK
        if num_frames > most_seconds * rate:
            raise AudioError(
                f"the {kind} file is longer than {most_seconds:g} seconds (--max-audio-seconds)", is_too_long=True
            )
        pieces.append(resampler.resample_chunk(block.mean(axis=1), last=is_last))
    if num_frames == 0:
        raise AudioError(f"the {kind} file has no samples")
    if kind != "MP3" and num_frames < sound.frames:  # an MP3's frames are an estimate
        raise AudioError(f"the {kind} file is cut short: it says that it has {sound.frames} samples, {num_frames} came")
    samples: Floats = np.concatenate(pieces)
    if not np.isfinite(samples).all():
        raise AudioError(f"the {kind} file has samples that are no finite numbers")
    return samples
