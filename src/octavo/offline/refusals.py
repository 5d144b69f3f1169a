"""What programs ask of vLLM's classes that octavo does not have, refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NEUTRAL: dict[str, tuple[object, ...]] = {  # arguments of vLLM's methods, and the values that ask for nothing
    "tokenization_kwargs": (None, {}),
    "mm_processor_kwargs": (None, {}),
    "chat_template_content_format": ("auto",),
    "reasoning_parser_kwargs": (None, {}),
    "trace_headers": (None, {}),
    "prompt_text": (None,),
    "data_parallel_rank": (None,),
}
MISSING = {
    "llm_engine": "what an engine does is LLM's generate and chat, or AsyncLLM's generate",
    "start_profile": "octavo has no profiler of its own; get_metrics tells what took how long",
    "stop_profile": "octavo has no profiler of its own; get_metrics tells what took how long",
    "add_lora": "an adapter is loaded when generate gets its LoRARequest",
    "collective_rpc": "no code of others runs in the engine",
    "apply_model": "no code of others runs in the engine",
    "renderer": "prompts are taken as text, token ids or messages",
}


def checked_reset(*, running: bool, connector: bool) -> None:
    """Raise ValueError for what of vLLM's reset_prefix_cache octavo does not have."""
    if running:
        raise ValueError(
            "reset_prefix_cache: reset_running_requests: what runs keeps its blocks; wait for it, or abort"
        )
    if connector:
        raise ValueError("reset_prefix_cache: reset_connector: the cache lies in the engine alone; leave it out")


def checked_others(method: str, others: Mapping[str, Any]) -> None:
    """Raise TypeError for an argument that is nobody's, and ValueError for vLLM's where it asks for something."""
    for name, value in others.items():
        if name not in NEUTRAL:
            raise TypeError(f"{method}() has no argument {name!r}")
        if value not in NEUTRAL[name]:
            raise ValueError(f"{method}: octavo does not support {name}={value!r}: leave it out")


def missing(kind: str, name: str) -> str:
    """What is said of an attribute that isn't there."""
    reason = MISSING.get(name)
    return f"octavo.{kind} has no {name!r}" + (f": {reason}" if reason else "")
