"""One record of a data set, whatever its dialect, as a document: a text, a conversation, or both.

Knows JSON values, and neither files nor tokenizers. The dialects are those that data sets on the Hub are written in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]  # OpenAI's: "role", "content" and whatever else a chat template may look at

KNOWN_KEYS = ("messages", "conversations", "text", "prompt", "completion", "instruction", "input", "output")
ACCEPTED = (
    '"text", "messages" (role and content), "conversations" (from and value), "prompt" with "completion", or '
    '"instruction" with "output"'
)
ROLES = {  # of ShareGPT's "from"
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


class RecordError(ValueError):
    """A record that is no document; the message says why, and the reader of the file adds where it stands."""


@dataclass(frozen=True)
class Document:
    """messages, where there are any, go through the model's chat template; text stands in where it has none.

    A conversation in its own right has no text: without a chat template it can't be used.
    """

    text: str | None
    messages: tuple[Message, ...] = ()

    @property
    def is_empty(self) -> bool:
        return not self.messages and not (self.text and self.text.strip())


def parse_record(record: object) -> Document:
    """A document out of a text or a JSON object with one of the known keys; a null is no value."""
    if isinstance(record, str):
        return Document(record)
    if not isinstance(record, Mapping):
        raise RecordError(f"{type(record).__name__} is not an object with {ACCEPTED}")
    known = [key for key in KNOWN_KEYS if key in record]
    given = {key: record[key] for key in known if record[key] is not None}
    if known and not given:
        return Document("")
    if "messages" in given:
        return Document(None, _openai(given["messages"], "messages"))
    if "conversations" in given:
        return Document(None, _sharegpt(given["conversations"]))
    if "text" in given:
        return Document(_string(given["text"], "text"))
    if "prompt" in given and "completion" in given:
        return _completion(given["prompt"], given["completion"])
    if "instruction" in given and "output" in given:
        return _instruction(given)
    raise RecordError(f"the keys are {_names(record)}; needed is one of {ACCEPTED}")


def _completion(prompt: object, completion: object) -> Document:
    if isinstance(prompt, str) and isinstance(completion, str):
        return Document(prompt + completion, _turns(prompt, completion))
    return Document(None, _openai(prompt, "prompt") + _openai(completion, "completion"))


def _instruction(given: Mapping[str, object]) -> Document:
    """Alpaca's; "input" is what the instruction is about."""
    instruction, output = (_string(given[key], key) for key in ("instruction", "output"))
    context = _string(given.get("input", ""), "input")
    question = f"{instruction}\n\n{context}" if context else instruction
    return Document(f"{question}\n\n{output}", _turns(question, output))


def _turns(question: str, answer: str) -> tuple[Message, ...]:
    if not (question.strip() and answer.strip()):
        return ()
    return {"role": "user", "content": question}, {"role": "assistant", "content": answer}


def _openai(messages: object, key: str) -> tuple[Message, ...]:
    return tuple(_openai_message(message, f"{key}[{i}]") for i, message in enumerate(_list(messages, key)))


def _openai_message(message: object, where: str) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RecordError(f'{where} is not an object with a "role" and a "content"')
    content = message.get("content")  # None where an assistant only calls tools
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise RecordError(f"{where} has a part of type {kind!r}; only text can be calibrated on")
    elif content is not None and not isinstance(content, str):
        raise RecordError(f"{where}.content is {type(content).__name__}, not a string")
    return {key: value for key, value in message.items() if value is not None or key == "content"}


def _sharegpt(messages: object) -> tuple[Message, ...]:
    found: list[Message] = []
    for i, message in enumerate(_list(messages, "conversations")):
        where = f"conversations[{i}]"
        if isinstance(message, Mapping) and "role" in message:  # the name of one dialect with the content of the other
            found.append(_openai_message(message, where))
            continue
        if not isinstance(message, Mapping) or "from" not in message:
            raise RecordError(f'{where} is not an object with "from" and "value"')
        role = ROLES.get(str(message["from"]))
        if role is None:
            raise RecordError(f"{where} is from {message['from']!r}; known are {', '.join(ROLES)}")
        found.append({"role": role, "content": _string(message.get("value"), f"{where}.value")})
    return tuple(found)


def _list(value: object, key: str) -> list[object]:
    if not isinstance(value, list | tuple):
        raise RecordError(f'"{key}" is {type(value).__name__}, not a list of messages')
    return list(value)


def _string(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f'"{key}" is {type(value).__name__}, not a string')
    return value


def _names(record: Mapping[Any, Any], most: int = 8) -> str:
    keys = [repr(str(key)) for key in record]
    return (", ".join(keys[:most]) or "none") + (f" and {len(keys) - most} more" if len(keys) > most else "")
