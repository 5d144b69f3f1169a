"""The toy model behind grammars: each of its tokens is a character."""

from __future__ import annotations

import select
import string

from llguidance import LLMatcher
from tokenizers import Tokenizer, models
from toy_model import VOCAB, ToyModel, make_engine

from octavo.runtime.engine import Engine
from octavo.runtime.messages import AddRequest, Constraint, Reasoning, TokenOutput, Triggers, Vocabulary
from octavo.runtime.speculation.speculation import Speculation

END = VOCAB - 1
ALPHABET = (string.ascii_lowercase + string.ascii_uppercase + '{}":,0 ')[: VOCAB - 2]


def vocabulary() -> Vocabulary:
    """A token for each character, then an unused id, and the end."""
    ids = {character: number for number, character in enumerate(ALPHABET)}
    backend = Tokenizer(models.BPE(ids, []))
    return Vocabulary([*(c.encode() for c in ALPHABET), b"", b"<end>"], [END], [END], backend.to_str())


def one_of(words: list[str], reasoning: Reasoning | None = None, triggers: Triggers | None = None) -> Constraint:
    alternatives = " | ".join(f'"{word}"' for word in words)
    return Constraint(LLMatcher.grammar_from_lark(f"start: {alternatives}"), reasoning, triggers)


def run(engine: Engine, requests: list[AddRequest]) -> dict[str, list[TokenOutput]]:
    """As `run_to_end`, with the waits for grammars that the engine's process has."""
    outputs: dict[str, list[TokenOutput]] = {request.request_id: [] for request in requests}
    open_ids = set(outputs)

    def take(found: list[TokenOutput]) -> None:
        for output in found:
            outputs[output.request_id].append(output)
            if output.finish_reason is not None:
                open_ids.discard(output.request_id)

    for request in requests:
        take(engine.add(request))
    while open_ids:
        take(engine.take_grammars())
        if engine.has_work:
            take(engine.step())
        elif open_ids:
            select.select([engine.grammars.ready], [], [])
    return outputs


def constrained_engine(
    model: ToyModel | None = None, *, overlaps: bool = True, speculation: Speculation | None = None, **limits: int
) -> Engine:
    engine = make_engine(model, overlaps=overlaps, speculation=speculation, **limits)
    engine.grammars.set_vocabulary(vocabulary())
    return engine
