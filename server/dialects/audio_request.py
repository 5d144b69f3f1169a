"""The fields of OpenAI's audio forms, which are texts, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from starlette.datastructures import FormData

from octavo.server.errors import bad_request
from octavo.server.served_model import ServedModel
from octavo.server.speech_text import SpeechText, Task
from octavo.server.transcription import Asked

Format = Literal["json", "text", "srt", "verbose_json", "vtt"]
GRANULARITIES = "timestamp_granularities[]"
_BOTH = ("file", "model", "language", "prompt", "response_format", "temperature", "seed", "stream")
FIELDS: dict[Task, tuple[str, ...]] = {
    "transcribe": (*_BOTH, GRANULARITIES, "timestamp_granularities", "chunking_strategy"),
    "translate": _BOTH,
}
HIGHEST_TEMPERATURE = 1.0
LONGEST_PROMPT = 1 << 16  # characters


@dataclass(frozen=True)
class AudioForm:
    """What a form asks for, its file aside."""

    model: str | None
    response_format: Format
    stream: bool
    asked: Asked


def read_fields(form: FormData, task: Task, speech: SpeechText, model: ServedModel) -> AudioForm:
    """The fields of a form. Raises ApiError."""
    fields = _texts(form)
    chosen = fields.get("response_format") or "json"
    if chosen not in get_args(Format):
        raise bad_request(
            f"response_format: octavo does not support the value {chosen[:80]!r}; supported: "
            f"{', '.join(get_args(Format))}",
            "response_format",
        )
    stream = _flag(fields.get("stream"))
    if stream and chosen not in ("json", "text"):
        raise bad_request(f"stream: events carry text; response_format {chosen} is sent as a whole", "stream")
    _check_granularities(form, chosen)
    if (strategy := fields.get("chunking_strategy")) not in (None, "", "auto"):
        raise bad_request(
            f"chunking_strategy: octavo does not support the value {strategy[:80]!r}; supported: 'auto'",
            "chunking_strategy",
        )
    if task == "translate" and "translate" not in speech.tasks:
        raise bad_request(f"the model {model.name!r} writes down one language, and translates none", "model")
    asked = Asked(
        task,
        _language(fields.get("language"), speech),
        _before(fields.get("prompt") or "", model),
        _temperature(fields.get("temperature")),
        has_times=chosen in ("srt", "verbose_json", "vtt"),
        measures=chosen == "verbose_json",
        seed=_seed(fields.get("seed")),
    )
    return AudioForm(fields.get("model") or None, chosen, stream, asked)  # type: ignore[arg-type]  # checked above


def _texts(form: FormData) -> dict[str, str]:
    """The fields that are texts, each there once."""
    fields: dict[str, str] = {}
    for name, value in form.multi_items():
        if name == "file" or name.startswith("timestamp_granularities"):
            continue
        if not isinstance(value, str):
            raise bad_request(f"{name}: this field is a text, and no file", name)
        if name in fields:
            raise bad_request(f"{name}: this field is there twice", name)
        fields[name] = value
    return fields


def _check_granularities(form: FormData, chosen: str) -> None:
    wanted = [*form.getlist(GRANULARITIES), *form.getlist("timestamp_granularities")]
    for one in wanted:
        if one == "word":
            raise bad_request("timestamp_granularities: octavo has times of segments, and of no words", GRANULARITIES)
        if one != "segment":
            raise bad_request("timestamp_granularities: 'segment' is supported", GRANULARITIES)
    if wanted and chosen != "verbose_json":
        raise bad_request("timestamp_granularities: response_format must be verbose_json", GRANULARITIES)


def _language(code: str | None, speech: SpeechText) -> str | None:
    if not code:
        return None
    known = speech.languages or {"en": 0}
    if code not in known:
        some = ", ".join(sorted(known))
        raise bad_request(f"language: {code[:40]!r} is none of this model's languages: {some}", "language")
    return code if speech.languages else None


def _before(prompt: str, model: ServedModel) -> tuple[int, ...]:
    """The end of a text that came before, in half of the context at most, as Whisper has it."""
    text = prompt.strip()
    if not text:
        return ()
    if len(text) > LONGEST_PROMPT:
        raise bad_request(f"prompt: {len(text)} characters; {LONGEST_PROMPT} may be sent", "prompt")
    ids = model.tokenizer.encode(f" {text}", add_special_tokens=False)
    return tuple(ids[-(model.max_model_len // 2 - 1) :])


def _temperature(text: str | None) -> float:
    if not text:
        return 0.0
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= HIGHEST_TEMPERATURE:  # false for NaN too
        raise bad_request(f"temperature: {text[:40]!r} is no number from 0 to {HIGHEST_TEMPERATURE:g}", "temperature")
    return value


def _seed(text: str | None) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise bad_request(f"seed: {text[:40]!r} is no whole number of at most 18 digits", "seed")
    return int(text)


def _flag(text: str | None) -> bool:
    values = {None: False, "": False, "false": False, "0": False, "true": True, "1": True}
    found = values.get(text if text is None else text.lower())
    if found is None:
        raise bad_request(f"stream: {(text or '')[:40]!r} is neither true nor false", "stream")
    return found
