"""Whisper base out of packages that ship it: what it hears of spoken sentences is, word for word, what transformers'
Whisper hears with the same weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest
import soundfile
import torch
import transformers
import whisper_base
from octavo_server import serving

from octavo.audio.decode import decode

pytestmark = pytest.mark.slow  # 145 MB are fetched


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("base")
    whisper_base.make_model(made, tmp_path_factory.mktemp("packages"))
    return made


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("spoken")
    speaker = whisper_base.Speaker(place)
    sentences = {"en": whisper_base.ENGLISH, "de": whisper_base.GERMAN}
    return {voice: speaker.say(text, voice, place / f"{voice}.wav") for voice, text in sentences.items()}


def truth_of(directory: Path, file: Path, **how: Any) -> str:
    """Of transformers' own features and decoding, in float32."""
    model = transformers.WhisperForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    with file.open("rb") as content:
        samples = decode(content, 60.0)
    heard = transformers.WhisperFeatureExtractor()(samples, sampling_rate=16000, return_tensors="pt").input_features
    said = model.generate(heard, return_dict_in_generate=True, force_unique_generate_call=True, **how).sequences[0]
    text: str = tokenizer.decode([token for token in said.tolist() if token < 50257])
    return text.strip()


def test_transcripts_are_whispers_own(directory: Path, spoken: dict[str, Path]) -> None:
    with (
        serving("--served-model-name", "base", model=directory) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client,
    ):
        english = client.audio.transcriptions.create(model="base", file=spoken["en"])
        assert english.text == truth_of(directory, spoken["en"], task="transcribe")
        assert "lazy dog" in english.text
        german = client.audio.transcriptions.create(model="base", file=spoken["de"])
        assert german.text == truth_of(directory, spoken["de"], task="transcribe")
        with pytest.warns(DeprecationWarning, match="deprecated"):
            translated = client.audio.translations.create(model="base", file=spoken["de"])
        assert translated.text == truth_of(directory, spoken["de"], task="translate")
        verbose = client.audio.transcriptions.create(model="base", file=spoken["en"], response_format="verbose_json")
        timed = truth_of(directory, spoken["en"], task="transcribe", language="en", return_timestamps=True)
        assert verbose.text == timed
        assert verbose.language == "en"
        length = soundfile.info(spoken["en"]).duration
        assert verbose.segments is not None
        assert 0 <= verbose.segments[0].start < verbose.segments[-1].end <= length + 0.02
