"""The prompt of a request, as far as a router without a tokenizer reads it: four bytes of its JSON are a token.

Equal prompts of one dialect and client have equal JSON from the beginning on, and that is all that a prefix needs.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import msgspec

from octavo.runtime.scheduling.block_pool import salted_root
from octavo.server.fleet.prefix_index import piece_names

BYTES_PER_TOKEN = 4
# Where the dialects have what the model reads, in the order in which most chat templates render it.
PROMPT_FIELDS = ("tools", "system", "instructions", "messages", "prompt", "input", "text", "input_ids")


@dataclass(frozen=True)
class Prompt:
    """What the router has to know of a request. It travels to the replica too, without the names."""

    key: str
    num_tokens: int
    names: tuple[bytes, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        return (Prompt, (self.key, self.num_tokens, ()))


def read_prompt(body: bytes) -> Prompt:
    """The prompt of a request's body; one of no length where there is none, or the body is no JSON object."""
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw]) if body else {}
        salt = str(msgspec.json.decode(fields["cache_salt"])) if "cache_salt" in fields else ""
    except msgspec.DecodeError:
        return Prompt(uuid4().hex, 0, ())
    text = b"\n".join(bytes(fields[name]) for name in PROMPT_FIELDS if name in fields)
    tokens = array("I", text[: len(text) // BYTES_PER_TOKEN * BYTES_PER_TOKEN])
    return Prompt(uuid4().hex, len(tokens), tuple(piece_names(tokens, salted_root(salt))))
