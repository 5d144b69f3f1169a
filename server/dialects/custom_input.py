"""Tools that are called with free text: to a model they are functions of one string, which is undone in the answer."""

from __future__ import annotations

import json
import re
from typing import Any

Json = dict[str, Any]

_BEGIN = re.compile(r'\s*\{\s*"input"\s*:\s*"')
_HIGH = r"\\u[dD][89abAB][0-9a-fA-F]{2}"  # half of a character, which another half must follow
_LOW = r"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_ALONE = rf"{_HIGH}(?=[^\\]|\\[^u]|\\u[^dD]|\\u[dD][^c-fC-F])"
_WHOLE = re.compile(rf'(?:[^"\\]|\\["\\/bfnrt]|{_HIGH}{_LOW}|{_ALONE}|\\u(?![dD][89abAB])[0-9a-fA-F]{{4}})*')


def input_schema(pattern: str | None) -> Json:
    """The parameters of the function that stands for such a tool. pattern: of the whole text."""
    text: Json = {"type": "string"}
    if pattern is not None:
        text["pattern"] = f"^(?:{pattern})$"
    return {"type": "object", "properties": {"input": text}, "required": ["input"], "additionalProperties": False}


def wrapped(text: str) -> str:
    """The arguments that stand for a text."""
    return json.dumps({"input": text}, ensure_ascii=False)


class InputText:
    """The text within arguments that come piece by piece."""

    def __init__(self) -> None:
        self._raw = ""
        self._has_begun = False

    def take(self, piece: str) -> str:
        """What of the text is certain by now, and was not before."""
        self._raw += piece
        if not self._has_begun:
            begin = _BEGIN.match(self._raw)
            if begin is None:
                return ""
            self._has_begun = True
            self._raw = self._raw[begin.end() :]
        found = _WHOLE.match(self._raw)
        assert found is not None
        self._raw = self._raw[found.end() :]  # behind the text's end it begins with a quote, and stays so
        text: str = json.loads(f'"{found[0]}"', strict=False)
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
