"""/v1/audio over a real socket, with the official client, against transformers on the same tiny weights."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import soundfile
import tiny_whisper
import tokenizers
import torch
import transformers
from octavo_server import Server, serving
from tiny_whisper import END, FIRST_TIME, IDS

from octavo.audio.facts import RATE
from octavo.audio.pieces import cuts_in

TRANSCRIPTIONS = "/v1/audio/transcriptions"
TRANSLATIONS = "/v1/audio/translations"
LENGTH = 64  # of an answer with its marks


def tone(seed: int, seconds: float) -> np.ndarray:
    at = np.arange(int(seconds * RATE)) / RATE
    noise = np.random.default_rng(seed).standard_normal(len(at))
    return (0.3 * np.sin(2 * np.pi * (150 + 170 * seed) * at) + 0.02 * noise).astype(np.float32)


def wav(samples: np.ndarray, rate: int = RATE) -> bytes:
    """In float32, so that nothing is rounded."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


@dataclass
class Truth:
    """What transformers says."""

    directory: Path
    model: transformers.WhisperForConditionalGeneration

    @cached_property
    def tokenizer(self) -> Any:
        return tokenizers.Tokenizer.from_file(str(self.directory / "tokenizer.json"))

    def heard(self, samples: np.ndarray) -> torch.Tensor:
        return tiny_whisper.heard(samples)[None]

    def tokens(self, samples: np.ndarray, **how: Any) -> list[int]:
        """Those behind the marks, without the end."""
        asked = {"language": "en", "task": "transcribe", "return_timestamps": False} | how
        made = self.model.generate(
            self.heard(samples), return_dict_in_generate=True, force_unique_generate_call=True, **asked
        )
        said = made.sequences[0].tolist()
        marks = said.index(IDS["startoftranscript"]) + (3 if asked["return_timestamps"] else 4)
        return [token for token in said[marks:] if token != END]

    def text(self, samples: np.ndarray, **how: Any) -> str:
        return self.written(self.tokens(samples, **how)).strip()

    def written(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode([token for token in tokens if token < END])
        return text


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    directory = tmp_path_factory.mktemp("whisper")
    return Truth(directory, tiny_whisper.make_whisper(directory))


@pytest.fixture(scope="module")
def hearing(truth: Truth) -> Iterator[Server]:
    limits = ("--max-audio-bytes", "200KB", "--max-audio-seconds", "4")
    with serving("--served-model-name", "tiny", "--max-num-seqs", "3", *limits, model=truth.directory) as running:
        yield running


@pytest.fixture(scope="module")
def official(hearing: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{hearing.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(hearing: Server) -> Iterator[httpx.Client]:
    with hearing.client() as client:
        yield client


def posted(http: httpx.Client, path: str, content: bytes, **fields: Any) -> httpx.Response:
    return http.post(path, files={"file": ("sound", content)}, data={"model": "tiny"} | fields)


def test_a_transcript_is_that_of_transformers(official: openai.OpenAI, truth: Truth) -> None:
    samples = tone(1, 0.8)
    found = official.audio.transcriptions.create(model="tiny", file=("a.wav", wav(samples)), language="en")
    assert found.text == truth.text(samples)
    assert len(found.text) > 10
    assert found.usage is not None
    assert found.usage.to_dict() == {"type": "duration", "seconds": 1}


def test_the_language_is_heard_where_none_is_named(official: openai.OpenAI, truth: Truth) -> None:
    samples = tone(2, 1.0)
    found = official.audio.transcriptions.create(model="tiny", file=("a.wav", wav(samples)))
    assert found.text == truth.text(samples, language=None)


def test_a_translation_has_its_own_mark(official: openai.OpenAI, truth: Truth) -> None:
    differ = []
    for seed in range(4):
        samples = tone(seed, 0.7)
        with pytest.warns(DeprecationWarning, match="deprecated"):  # OpenAI gives the route up, and its client says so
            found = official.audio.translations.create(model="tiny", file=("a.wav", wav(samples)))
        assert found.text == truth.text(samples, language=None, task="translate")
        differ.append(found.text != truth.text(samples, language=None))
    assert any(differ)


def test_a_prompt_stands_before(official: openai.OpenAI, truth: Truth) -> None:
    """What came before, by the token that says so; of a long one the end, half of the context."""
    samples = tone(4, 0.9)
    before = [IDS["startofprev"], *truth.tokenizer.encode(" before it").ids]
    found = official.audio.transcriptions.create(
        model="tiny", file=("a.wav", wav(samples)), language="en", prompt="before it"
    )
    assert found.text == truth.text(samples, prompt_ids=torch.tensor(before))[: len(found.text)]
    assert found.text != truth.text(samples)[: len(found.text)]
    long = official.audio.transcriptions.create(
        model="tiny", file=("a.wav", wav(samples)), language="en", prompt="x" * 500
    )
    assert len(long.text) > 3


def test_many_at_once_are_each_as_alone(official: openai.OpenAI, truth: Truth) -> None:
    """More than there are places for audio."""
    sounds = [tone(seed, 0.5 + 0.05 * seed) for seed in range(8)]

    def ask(samples: np.ndarray) -> str:
        return official.audio.transcriptions.create(model="tiny", file=("a", wav(samples)), language="de").text

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, sounds))
    assert found == [truth.text(samples, language="de") for samples in sounds]


def test_segments_have_times_and_measures(http: httpx.Client, truth: Truth) -> None:
    samples = tone(5, 0.9)
    given = {"response_format": "verbose_json", "language": "en", "timestamp_granularities[]": "segment"}
    found = posted(http, TRANSCRIPTIONS, wav(samples), **given).json()
    tokens = truth.tokens(samples, return_timestamps=True)
    assert found["text"] == truth.written(tokens).strip()
    assert (found["task"], found["language"], found["duration"]) == ("transcribe", "en", 0.9)
    segments = found["segments"]
    assert [token for one in segments for token in one["tokens"]] == [token for token in tokens if token < END]
    times = [0.02 * (token - FIRST_TIME) for token in tokens if token >= FIRST_TIME]
    assert segments[0]["start"] == pytest.approx(times[0], abs=1e-3)
    assert all(one["start"] <= one["end"] <= 0.9 for one in segments)
    marks = [IDS["startoftranscript"], IDS["en"], IDS["transcribe"]]
    ids = [*marks, *tokens]
    with torch.inference_mode():
        logits = truth.model(input_features=truth.heard(samples), decoder_input_ids=torch.tensor([ids])).logits[0]
    log_probabilities = logits.log_softmax(dim=-1)
    own = log_probabilities[torch.arange(2, len(ids) - 1), torch.tensor(tokens)]
    assert len(ids) == LENGTH  # it was cut, and has no end
    assert segments[0]["avg_logprob"] == pytest.approx(float(own.mean()), abs=1e-3)
    assert segments[0]["no_speech_prob"] == pytest.approx(float(log_probabilities[0, IDS["nospeech"]].exp()), rel=1e-3)
    assert {"id", "seek", "text", "temperature", "compression_ratio"} <= segments[0].keys()


def test_subtitles_are_the_segments(http: httpx.Client) -> None:
    content = wav(tone(6, 0.9))
    whole = posted(http, TRANSCRIPTIONS, content, response_format="verbose_json", language="en").json()
    srt = posted(http, TRANSCRIPTIONS, content, response_format="srt", language="en")
    vtt = posted(http, TRANSCRIPTIONS, content, response_format="vtt", language="en")
    text = posted(http, TRANSCRIPTIONS, content, response_format="text", language="en")
    assert srt.headers["content-type"].startswith("text/plain")
    first = whole["segments"][0]
    clock = r"(\d\d):(\d\d):(\d\d)[,.](\d{3})"
    for said, begin in ((srt.text, r"1\n"), (vtt.text, r"WEBVTT\n\n")):
        found = re.match(f"{begin}{clock} --> {clock}\n", said)
        assert found is not None
        numbers = [int(group) for group in found.groups()]
        assert [numbers[2] + numbers[3] / 1000, numbers[6] + numbers[7] / 1000] == [first["start"], first["end"]]
        assert len(re.findall(" --> ", said)) == len(whole["segments"])
    plain = posted(http, TRANSCRIPTIONS, content, language="en").json()["text"]
    assert text.text == f"{plain}\n"


def test_a_long_recording_is_the_text_of_its_pieces(http: httpx.Client, truth: Truth) -> None:
    """In the language of the first one; told piece by piece, and segments count from the beginning."""
    samples = np.concatenate([tone(7, 0.95), np.zeros(1600, np.float32), tone(8, 0.9), tone(9, 0.4)])
    cuts = [0, *cuts_in(samples, RATE), len(samples)]
    pieces = [samples[begin:end] for begin, end in pairwise(cuts)]
    assert len(pieces) == 3
    language = {IDS[code]: code for code in ("en", "de", "haw")}[
        int(truth.model.detect_language(truth.heard(pieces[0]))[0])
    ]
    answers = [truth.written(truth.tokens(piece, language=language)) for piece in pieces]
    content = wav(samples)
    whole = posted(http, TRANSCRIPTIONS, content).json()
    assert whole["text"] == "".join(answers).strip()
    streamed = list(events(posted(http, TRANSCRIPTIONS, content, stream="true").text))
    assert [one["type"] for one in streamed] == ["transcript.text.delta"] * (len(streamed) - 1) + [
        "transcript.text.done"
    ]
    assert "".join(one["delta"] for one in streamed[:-1]).strip() == whole["text"] == streamed[-1]["text"].strip()
    verbose = posted(http, TRANSCRIPTIONS, content, response_format="verbose_json").json()
    assert verbose["duration"] == len(samples) / RATE
    starts = [one["start"] for one in verbose["segments"]]
    assert starts == sorted(starts)
    assert starts[-1] >= cuts[2] / RATE - 1e-3
    assert verbose["language"] == language


def events(text: str) -> Iterator[Any]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return map(json.loads, lines[:-1])


def test_a_stream_is_the_official_clients(official: openai.OpenAI, truth: Truth) -> None:
    samples = tone(1, 0.8)
    text = ""
    with official.audio.transcriptions.create(
        model="tiny", file=("a.wav", wav(samples)), language="en", stream=True
    ) as stream:
        for one in stream:
            if one.type == "transcript.text.delta":
                text += one.delta
            elif one.type == "transcript.text.done":
                assert one.text == text
    assert text.strip() == truth.text(samples)


def test_sampling_depends_on_the_seed(http: httpx.Client) -> None:
    content = wav(tone(1, 0.8))
    texts = [
        posted(http, TRANSCRIPTIONS, content, temperature="1", seed=seed, language="en").json()["text"]
        for seed in ("7", "7", "8")
    ]
    assert texts[0] == texts[1] != texts[2]


GOOD = wav(tone(1, 0.5))
REFUSED: dict[str, tuple[bytes, dict[str, str], int, str]] = {
    "no sound": (b"hello", {}, 400, "no WAV, FLAC, OGG or MP3"),
    "nothing": (b"", {}, 400, "empty"),
    "cut short": (GOOD[: len(GOOD) // 2], {}, 400, "cut short"),
    "too large": (bytes(300_000), {}, 413, "--max-audio-bytes"),
    "another model": (GOOD, {"model": "other"}, 404, "other"),
    "a language": (GOOD, {"language": "fr"}, 400, "de, en, haw"),
    "a format": (GOOD, {"response_format": "diarized_json"}, 400, "verbose_json"),
    "words": (GOOD, {"response_format": "verbose_json", "timestamp_granularities[]": "word"}, 400, "of no words"),
    "segments of plain text": (GOOD, {"timestamp_granularities[]": "segment"}, 400, "must be verbose_json"),
    "subtitles as a stream": (GOOD, {"response_format": "srt", "stream": "true"}, 400, "stream"),
    "a flag": (GOOD, {"stream": "perhaps"}, 400, "neither true nor false"),
    "a temperature": (GOOD, {"temperature": "nan"}, 400, "from 0 to 1"),
    "a seed": (GOOD, {"seed": "-1"}, 400, "seed"),
    "an unknown field": (GOOD, {"include[]": "logprobs"}, 400, "include"),
    "chunks": (GOOD, {"chunking_strategy": "server_vad"}, 400, "auto"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused_by_name(http: httpx.Client, name: str) -> None:
    content, fields, status, said = REFUSED[name]
    found = posted(http, TRANSCRIPTIONS, content, **fields)
    assert found.status_code == status, found.text
    assert said in found.json()["error"]["message"]


def test_a_long_recording_in_few_bytes_is_refused(http: httpx.Client) -> None:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(60 * RATE), RATE, format="FLAC")
    assert len(file.getvalue()) < 100_000
    found = posted(http, TRANSCRIPTIONS, file.getvalue())
    assert found.status_code == 413
    assert "--max-audio-seconds" in found.json()["error"]["message"]


def test_forms_that_are_none_are_refused(http: httpx.Client) -> None:
    assert http.post(TRANSCRIPTIONS, json={"model": "tiny"}).status_code == 400
    assert http.post(TRANSCRIPTIONS, data={"model": "tiny"}, files={"other": b"x"}).status_code == 400
    assert http.post(TRANSCRIPTIONS, data={"model": "tiny", "file": "x"}).status_code == 400
    broken = {"content-type": "multipart/form-data; boundary=x"}
    assert http.post(TRANSCRIPTIONS, content=b"--y\r\nnothing", headers=broken).status_code == 400
    undefined = {"content-type": "multipart/form-data; boundary=x; charset=undefined"}  # a codec that decodes nothing
    form = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\ntiny\r\n--x--\r\n'
    assert http.post(TRANSCRIPTIONS, content=form, headers=undefined).status_code == 400


def test_other_routes_say_what_works(http: httpx.Client, client: httpx.Client) -> None:
    """A speech model reads no text, and a text model hears nothing."""
    for route, body in (("/v1/completions", {"prompt": "a"}), ("/v1/embeddings", {"input": "a"})):
        found = http.post(route, json={"model": "tiny"} | body)
        assert found.status_code == 400
        assert "writes down what it hears; POST /v1/audio/transcriptions works" in found.json()["error"]["message"]
    deaf = posted(client, TRANSCRIPTIONS, GOOD)
    assert deaf.status_code == 400
    assert "hears nothing" in deaf.json()["error"]["message"]
    assert http.get("/health_generate").status_code == 200
    assert posted(http, TRANSLATIONS, GOOD, **{"timestamp_granularities[]": "segment"}).status_code == 400
