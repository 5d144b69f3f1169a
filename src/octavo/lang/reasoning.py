"""Thoughts apart from what a model says after them, by the marks that it puts around them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Marks:
    """begin and end of a model's thoughts. always: it thinks in any case, its prompt may have begun the thoughts."""

    begin: str
    end: str
    always: bool = False

    def split(self, text: str) -> tuple[str, str]:
        """(thoughts, what was said beside them), each without the white space around it.

        Thoughts that were cut before their end are all that there is.
        """
        before, end, after = text.partition(self.end)
        lead, begin, thoughts = before.partition(self.begin)
        if begin:
            return thoughts.strip(), f"{lead}{after}".strip()
        return (before.strip(), after.strip()) if end or self.always else ("", text)


MARKS = {
    "deepseek-r1": Marks("<think>", "</think>", always=True),
    "deepseek-v3": Marks("<think>", "</think>"),
    "qwen3": Marks("<think>", "</think>"),
    "qwen3-thinking": Marks("<think>", "</think>", always=True),
    "kimi_k2": Marks("◁think▷", "◁/think▷"),
}
"""By SGLang's names of reasoning parsers. gpt-oss marks thoughts by special tokens, which /generate leaves out."""


def check_type(model_type: str | None) -> str:
    """The name, if it is known. Raises ValueError."""
    if model_type not in MARKS:
        raise ValueError(f"separate_reasoning: model_type {model_type!r} is none of {', '.join(MARKS)}")
    return model_type
