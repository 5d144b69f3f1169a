"""Memory that a step frees and the next one asks for again: activations, and logits of 30 MB and more.

glibc gives large pieces back to the system at once, and gets them anew at the next step, zeroed page by page: 15,000
page faults a step for Gemma 3's 262,144 logits of 32 sequences. Told so, it keeps them (mallopt(3)).
"""

from __future__ import annotations

import contextlib
import ctypes

_M_TRIM_THRESHOLD = -1  # malloc.h
_M_MMAP_THRESHOLD = -3
_MOST_KEPT = 1 << 30
_LARGEST_PIECE = 32 << 20  # the most that older ones know


def keep_freed_memory() -> None:
    """From now on, in this process. Another C library goes on as it does."""
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        if not mallopt(_M_MMAP_THRESHOLD, _MOST_KEPT):
            mallopt(_M_MMAP_THRESHOLD, _LARGEST_PIECE)
        mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT)


def give_back_freed_memory() -> None:
    """All that is kept so far."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
