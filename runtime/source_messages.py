"""What requests for a model with an encoder say beside what all requests do, and what such a model says of itself."""

from __future__ import annotations

import msgspec


class AnswerRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What an answer keeps to, beside its logits (runtime/worker/answer_rules.py).

    starts: of the first tokens, which ones each may be; the likeliest of those is taken, whatever else the request
    says. last_id: what the token is that max_tokens ends the answer with; None: any. The others are Whisper's rules.
    never_first: what can't come right behind the starts. first_timestamp: the token of the time 0, where the answer
    has timestamps, which are the tokens from there on; None: it has none, and the other fields mean nothing.
    latest_start: the last timestamp that it may begin with; None: any. end_id: what ends it; only smaller ids are text.
    """

    starts: tuple[tuple[int, ...], ...] = ()
    never_first: tuple[int, ...] = ()
    first_timestamp: int | None = None
    latest_start: int | None = None
    end_id: int = 0
    last_id: int | None = None


class AudioSource(msgspec.Struct, frozen=True, tag="audio"):
    """An encoder that reads features beside a prompt: `rows` numbers of each of `length` moments, [rows, length].

    positions: what the encoder makes of them, to which tokens attend. places: how many of these are kept at once, so
    that as many requests run.
    """

    rows: int
    length: int
    positions: int
    places: int

    @property
    def num_bytes(self) -> int:
        """Of float32."""
        return 4 * self.rows * self.length


class TextSource(msgspec.Struct, frozen=True, tag="text"):
    """An encoder that reads a text's tokens, `positions` of them at most, before a decoder writes. places: as above.

    padding: the token that no text may have, since it has no position in one; None: there is no such token.
    """

    positions: int
    places: int
    padding: int | None = None


Source = AudioSource | TextSource
