"""What a grammar accepts, by llguidance itself, over a vocabulary of single bytes: no model, and no merges."""

from __future__ import annotations

import json
import random
from typing import Any

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from octavo.server.message.grammars import LIMITS

END = 256


class _Bytes:
    eos_token_id = END
    bos_token_id = None
    tokens = [*(bytes([value]) for value in range(256)), b"<end>"]  # noqa: RUF012 (llguidance reads it)
    special_token_ids = [END]  # noqa: RUF012

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


BYTES = LLTokenizer(TokenizerWrapper(_Bytes()), slices=[])


class ByteGrammar:
    """A compiled grammar."""

    def __init__(self, grammar: str) -> None:
        self._start = LLMatcher(BYTES, grammar, limits=LIMITS, log_level=0)
        assert not self._start.is_error(), self._start.get_error()

    def accepts(self, text: str) -> bool:
        """Whether the text may be a whole answer."""
        matcher = self._start.deep_copy()
        return all(matcher.try_consume_tokens([byte]) == 1 for byte in text.encode()) and matcher.is_accepting()

    def accepts_json(self, value: Any, names: dict[str, int]) -> bool:
        """Whether a value may be answered, with its names in its own order or in that of the schema."""
        return any(self.accepts(json.dumps(written, ensure_ascii=False)) for written in (value, _ordered(value, names)))

    def walk(self, seed: int, limit: int = 400) -> str | None:
        """A random answer under the mask, that ends as soon as it may every second time; None if it gets too long."""
        choose = random.Random(seed)
        matcher = self._start.deep_copy()
        text = bytearray()
        while len(text) < limit:
            mask = matcher.compute_bitmask()
            allowed = [token for token in range(END) if mask[token // 8] >> token % 8 & 1]
            if matcher.is_accepting() and (not allowed or choose.random() < 0.5):
                return text.decode()
            assert allowed, "nothing is allowed, and the answer is not complete"
            closing = [token for token in allowed if token in b'"}],:']
            token = choose.choice(closing if closing and choose.random() < 0.5 else allowed)
            assert matcher.consume_token(token)
            text.append(token)
        return None


def names_in_order(schema: Any) -> dict[str, int]:
    """The names of properties, by where a schema mentions them first."""
    found: dict[str, int] = {}
    waiting = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            for keyword in ("properties", "required"):
                for name in node[keyword] if isinstance(node.get(keyword), (dict, list)) else ():
                    if isinstance(name, str):
                        found.setdefault(name, len(found))
        children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        waiting.extend(reversed(list(children)))
    return found


def _ordered(value: Any, names: dict[str, int]) -> Any:
    if isinstance(value, dict):
        return {name: _ordered(value[name], names) for name in sorted(value, key=lambda name: names.get(name, 1 << 30))}
    return [_ordered(item, names) for item in value] if isinstance(value, list) else value
