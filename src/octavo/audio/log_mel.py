"""Log-mel features, as Whisper reads them (arXiv 2212.04356, section 2.2): samples at 16 kHz to [num_mels, moments].

A moment is 10 ms. Powers of a Hann-windowed Fourier transform of 25 ms around it go through triangular filters that lie
evenly on Slaney's mel scale (Auditory Toolbox, 1998), each of area one. Their logarithms are clipped 8 decades of ten
below the piece's largest, and scaled.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from octavo.audio.facts import HOP, RATE, WIDTH

LEAST_POWER = 1e-10
RANGE = 8.0  # powers of ten below the largest
LINEAR_MELS = 15.0  # up to 1 kHz the scale is linear, a mel every 200 / 3 Hz; above, 27 mels are a factor of 6.4
LOG_STEP = float(np.log(6.4)) / 27

Floats = NDArray[np.float32]


def log_mel(samples: Floats, num_mels: int, moments: int) -> Floats:
    """[num_mels, moments] of samples, which are followed by silence where they are fewer than moments * HOP."""
    whole = np.zeros(moments * HOP, np.float32)
    count = min(len(samples), len(whole))
    whole[:count] = samples[:count]
    padded = np.pad(whole, WIDTH // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, WIDTH)[::HOP][:moments]
    spectrum = np.fft.rfft(frames * _hann())
    powers = spectrum.real**2 + spectrum.imag**2
    logs = np.log10(np.maximum(powers @ _filters(num_mels), LEAST_POWER)).T
    scaled: Floats = ((np.maximum(logs, logs.max() - RANGE) + 4.0) / 4.0).astype(np.float32)
    return scaled


@cache
def _hann() -> NDArray[np.float64]:
    """[WIDTH], periodic."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WIDTH) / WIDTH)


@cache
def _filters(num_mels: int) -> NDArray[np.float64]:
    """[WIDTH / 2 + 1, num_mels]: the share of each frequency in each filter."""
    edges = _hertz(np.linspace(0.0, _mels(RATE / 2), num_mels + 2))
    frequencies = np.linspace(0.0, RATE / 2, WIDTH // 2 + 1)[:, None]
    rising = (frequencies - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - frequencies) / np.diff(edges)[1:]
    return np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (edges[2:] - edges[:-2]))


def _mels(hertz: float) -> float:
    """Of a frequency above 1 kHz."""
    return LINEAR_MELS + float(np.log(hertz / 1000.0)) / LOG_STEP


def _hertz(mels: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(mels < LINEAR_MELS, mels * 200.0 / 3.0, 1000.0 * np.exp((mels - LINEAR_MELS) * LOG_STEP))
