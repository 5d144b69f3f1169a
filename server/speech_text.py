"""The text side of a speech model: the tokens that say what is wanted of it, and those that it may not say.

Read from the tokenizer, where Whisper's marks have fixed names, and from generation_config.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from octavo.audio.facts import HOP, RATE, WIDTH, missing_libraries
from octavo.quant.model_files import read_object_if_any
from octavo.runtime.source_messages import AudioSource
from octavo.text.tokenizer import Tokenizer

Task = Literal["transcribe", "translate"]
NO_SPEECH = ("<|nospeech|>", "<|nocaptions|>")  # the older name stands behind the newer one
READS = {"sampling_rate": RATE, "hop_length": HOP, "n_fft": WIDTH}


@dataclass(frozen=True)
class SpeechText:
    """Ids of tokens, and what else requests are made with.

    source        what the engine reads
    start, end    of every answer; ids below `end` are text
    previous      in front of text that came before
    tasks         by name; languages: by code. Both empty: the model writes down one language
    no_speech     whose probability, first of all, is that nobody speaks; None: there is none
    no_times      says that there are no timestamps; those begin behind it
    latest_start  the last timestamp that an answer may begin with; None: any
    suppressed    never said; never_first: not said first
    """

    source: AudioSource
    start: int
    end: int
    previous: int
    tasks: Mapping[str, int]
    languages: Mapping[str, int]
    no_speech: int | None
    no_times: int
    latest_start: int | None
    suppressed: tuple[int, ...]
    never_first: tuple[int, ...]

    def text_tokens(self, token_ids: Iterable[int]) -> list[int]:
        """Those that are text: no marks and no timestamps."""
        return [token for token in token_ids if token < self.end]

    @property
    def first_time(self) -> int:
        return self.no_times + 1

    @property
    def seconds_a_time(self) -> float:
        """From one timestamp to the next."""
        return self.source.length * HOP / RATE / self.source.positions


def read_speech_text(directory: Path, source: AudioSource, tokenizer: Tokenizer) -> SpeechText:
    """Read what there is. Raises ValueError, which names the file or the library, where requests can't be made."""
    if missing := missing_libraries():
        raise ValueError(f"a speech model needs {' and '.join(missing)}: pip install 'octavo[audio]'")
    file = directory / "preprocessor_config.json"
    preprocessor = read_object_if_any(file)
    for key, value in READS.items():
        if preprocessor.get(key, value) != value:
            raise ValueError(f"{file}: {key} is {preprocessor[key]!r}; features are made with {value}")
    config = read_object_if_any(directory / "generation_config.json")
    marks = {name: _mark(tokenizer, f"<|{name}|>", directory) for name in ("startoftranscript", "endoftext")}
    marks |= {name: _mark(tokenizer, f"<|{name}|>", directory) for name in ("startofprev", "notimestamps")}
    tasks = {task: tokenizer.token_id(f"<|{task}|>") for task in ("transcribe", "translate")}
    languages = _languages(tokenizer, marks["startoftranscript"])
    speaks_several = bool(config.get("is_multilingual", bool(languages))) and None not in tasks.values()
    latest = config.get("max_initial_timestamp_index", 50)  # a second, as Whisper's own code has it
    if latest is not None and (type(latest) is not int or latest < 0):
        raise ValueError(f"{directory / 'generation_config.json'}: max_initial_timestamp_index {latest!r} is no index")
    return SpeechText(
        source,
        start=marks["startoftranscript"],
        end=marks["endoftext"],
        previous=marks["startofprev"],
        tasks={task: token for task, token in tasks.items() if token is not None} if speaks_several else {},
        languages=languages if speaks_several else {},
        no_speech=next((token for name in NO_SPEECH if (token := tokenizer.token_id(name)) is not None), None),
        no_times=marks["notimestamps"],
        latest_start=None if latest is None else marks["notimestamps"] + 1 + latest,
        suppressed=_tokens(config, "suppress_tokens", directory, tokenizer.num_tokens),
        never_first=_tokens(config, "begin_suppress_tokens", directory, tokenizer.num_tokens),
    )


def _mark(tokenizer: Tokenizer, name: str, directory: Path) -> int:
    token = tokenizer.token_id(name)
    if token is None:
        raise ValueError(f"{directory}: the tokenizer has no token {name}, which a speech model is asked with")
    return token


def _languages(tokenizer: Tokenizer, start: int) -> dict[str, int]:
    """Those whose marks follow the beginning's, up to a task's."""
    found: dict[str, int] = {}
    for token in range(start + 1, tokenizer.num_tokens):
        name = tokenizer.token_name(token).removeprefix("<|").removesuffix("|>")
        if not (2 <= len(name) <= 3 and name.isascii() and name.islower()):
            break
        found[name] = token
    return found


def _tokens(config: Mapping[str, Any], key: str, directory: Path, num_tokens: int) -> tuple[int, ...]:
    listed = config.get(key) or []
    if not isinstance(listed, list) or not all(type(token) is int and token < num_tokens for token in listed):
        raise ValueError(
            f"{directory / 'generation_config.json'}: {key} must be a list of token ids, below {num_tokens}"
        )
    return tuple(token for token in listed if token >= 0)
