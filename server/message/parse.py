"""Tokens to Parts: an answer's tokens are detokenized, cut at stop strings, and told apart by kind."""

from __future__ import annotations

from octavo.server.message.parts import Part
from octavo.text.detokenizer import Detokenizer


class Parser:
    """One answer's parts: push the tokens of a step, take the parts that they complete. So far all parts are text.

    length: characters so far, sent or not, which is where the next token's text begins. stopped_by: the stop string
    that has ended the answer. Both are plain attributes, since they are read for each token.
    """

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._detokenizer = detokenizer
        self._text = ""
        self.length = 0
        self.stopped_by: str | None = None

    def push(self, token_id: int, *, silent: bool) -> None:
        """Take one token. A `silent` token (an end token) says nothing itself."""
        detokenizer = self._detokenizer
        self._text += detokenizer.push(token_id, silent=silent)
        self.length = detokenizer.length
        self.stopped_by = detokenizer.stopped_by

    def finish(self) -> None:
        """Take the text that was held back, now that the tokens have ended."""
        self._text += self._detokenizer.finish()
        self.length = self._detokenizer.length
        self.stopped_by = self._detokenizer.stopped_by

    def take(self) -> list[Part]:
        """The parts since the last call; none while nothing can be said yet."""
        if not self._text:
            return []
        parts = [Part("text", self._text)]
        self._text = ""
        return parts
