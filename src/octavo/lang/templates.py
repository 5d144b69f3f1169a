"""Turns as text, for servers that don't render chat templates themselves, and for programs over chat APIs.

octavo's server renders its model's own template, and needs none of these (native.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, slots=True)
class RoleTexts:
    """What stands before and behind each role's turn, and the strings at which an assistant's turn ends."""

    around: Mapping[str, tuple[str, str]]
    stop: Sequence[str] = field(default=())

    def text(self, messages: Sequence[Mapping[str, Any]], role: str | None, turn: str) -> str:
        """Closed turns, <image> for each of theirs, and the open one. Raises ValueError for a role that isn't known."""
        closed = [_shown(it["content"]).join(self._of(it["role"])) for it in messages]
        return "".join(closed) + ("" if role is None else self._of(role)[0] + turn)

    def _of(self, role: str) -> tuple[str, str]:
        if role not in self.around:
            raise ValueError(f"role {role!r} is none of {', '.join(self.around)}, which this chat template has")
        return self.around[role]


def _shown(content: str | Sequence[Mapping[str, Any]]) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "<image>") for part in content)


PLAIN = RoleTexts(
    MappingProxyType({"system": ("SYSTEM: ", "\n"), "user": ("USER: ", "\n"), "assistant": ("ASSISTANT: ", "\n")})
)
"""How `text()` shows the turns of a program over a chat API, which doesn't tell what it makes of them."""

NAMED: dict[str, RoleTexts] = {
    "plain": PLAIN,
    "chatml": RoleTexts(
        {role: (f"<|im_start|>{role}\n", "<|im_end|>\n") for role in ("system", "user", "assistant")}, ("<|im_end|>",)
    ),
    "llama-3-instruct": RoleTexts(
        {
            role: (f"<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>")
            for role in ("system", "user", "assistant")
        },
        ("<|eot_id|>",),
    ),
    "gemma-it": RoleTexts(
        {
            "user": ("<start_of_turn>user\n", "<end_of_turn>\n"),
            "assistant": ("<start_of_turn>model\n", "<end_of_turn>\n"),
        },
        ("<end_of_turn>",),
    ),
}


def named(template: str | RoleTexts) -> RoleTexts:
    """A template, or the one of this name. Raises ValueError."""
    if isinstance(template, RoleTexts):
        return template
    if template not in NAMED:
        raise ValueError(f"chat_template_name {template!r} is none of {', '.join(NAMED)}; a RoleTexts says any other")
    return NAMED[template]
