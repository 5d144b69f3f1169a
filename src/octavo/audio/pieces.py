"""Sound of any length as what a speech model reads: pieces of its length at most, cut where it is quiet.

As vLLM has it, and unlike Whisper's own sequential way: a piece ends in the middle of the quietest tenth of a second of
its last second, whatever the transcript of the pieces before it says. So all pieces of a recording are transcribed at
once, and none can lead the next one astray; what is lost is the text before it as a prompt.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from octavo.audio.facts import HOP, RATE, Piece
from octavo.audio.log_mel import Floats, log_mel

SEARCHED = RATE  # samples at the end of a piece in which a quiet place is looked for
QUIET = RATE // 10  # samples of such a place


def pieces_of(samples: Floats, rows: int, length: int) -> list[Piece]:
    """The pieces of samples at 16 kHz, in order, as features of `length` moments."""
    cuts = [0, *cuts_in(samples, length * HOP), len(samples)]
    return [
        Piece(begin / RATE, (end - begin) / RATE, log_mel(samples[begin:end], rows, length).astype("<f4").tobytes())
        for begin, end in pairwise(cuts)
    ]


def cuts_in(samples: Floats, most: int) -> list[int]:
    """Where samples are cut into pieces of `most` samples at most; none where they are one piece."""
    searched = min(SEARCHED, most // 2)
    quiet = min(QUIET, searched // 4)
    cuts: list[int] = []
    begin = 0
    while len(samples) - begin > most:
        first = begin + most - searched
        energy = np.cumsum(np.square(samples[first : begin + most], dtype=np.float64))
        sums = energy[quiet:] - energy[:-quiet]
        begin = first + int(sums.argmin()) + quiet // 2 + 1
        cuts.append(begin)
    return cuts
