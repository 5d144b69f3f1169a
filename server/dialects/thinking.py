"""How a model's reasoning is switched where a dialect says "think" or "don't": by a variable of its chat template."""

from __future__ import annotations

from typing import Any

from octavo.server.errors import bad_request
from octavo.server.served_model import ServedModel

EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}  # templates know three


def switched(model: ServedModel, field: str, *, wants: bool) -> dict[str, Any]:
    """The template's variables for a model that should think, or should not. Raises ApiError, which blames `field`."""
    reasoning = model.formats.found.reasoning
    if reasoning is None:
        return {}
    if not wants and not reasoning.can_disable:
        raise bad_request(f"{field}: this model's thinking can't be switched off", field.partition(".")[0])
    if reasoning.switch in ("enable_thinking", "thinking"):
        return {reasoning.switch: wants}
    return {"reasoning_effort": "none"} if not wants and reasoning.switch is not None else {}


def takes_effort(model: ServedModel) -> bool:
    """Whether the template has a variable for how much the model thinks."""
    reasoning = model.formats.found.reasoning
    return reasoning is not None and reasoning.switch == "reasoning_effort"
