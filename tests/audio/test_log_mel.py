"""Features against transformers' WhisperFeatureExtractor, which is OpenAI's code rewritten."""

from __future__ import annotations

import numpy as np
import pytest
import transformers
from tiny_whisper import tones

from octavo.audio.facts import HOP, RATE
from octavo.audio.log_mel import log_mel


@pytest.mark.parametrize("num_mels", [80, 128])
@pytest.mark.parametrize("seconds", [0.013, 3.7, 30.0, 33.0])
def test_features_are_those_of_transformers(num_mels: int, seconds: float) -> None:
    samples = tones(seconds, 1)
    theirs = transformers.WhisperFeatureExtractor(feature_size=num_mels)
    truth = theirs(samples, sampling_rate=RATE, return_tensors="np", do_normalize=False).input_features[0]
    own = log_mel(samples, num_mels, 30 * RATE // HOP)
    assert own.shape == truth.shape == (num_mels, 3000)
    assert own.dtype == np.float32
    # theirs are float32's, whose rounding shows where there is next to nothing, eight decades below the loudest
    np.testing.assert_allclose(own, truth, atol=2e-4)


def test_silence_has_features_too() -> None:
    own = log_mel(np.zeros(100, np.float32), 80, 100)
    truth = transformers.WhisperFeatureExtractor(chunk_length=1)(np.zeros(100), sampling_rate=RATE).input_features[0]
    np.testing.assert_allclose(own, truth, atol=1e-6)
