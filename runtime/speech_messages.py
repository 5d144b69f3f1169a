"""What requests for a speech model say beside what all requests do, and what such a model says of itself."""

from __future__ import annotations

import msgspec


class SpeechRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What an answer of a speech model keeps to, beside its logits: Whisper's rules (runtime/worker/speech_rules.py).

    starts: of the first tokens, which ones each may be; the likeliest of those is taken, whatever else the request
    says. never_first: what can't come right behind them. first_timestamp: the token of the time 0, where the answer
    has timestamps, which are the tokens from there on; None: it has none, and the other fields mean nothing.
    latest_start: the last timestamp that it may begin with; None: any. end_id: what ends it; only smaller ids are text.
    """

    starts: tuple[tuple[int, ...], ...] = ()
    never_first: tuple[int, ...] = ()
    first_timestamp: int | None = None
    latest_start: int | None = None
    end_id: int = 0


class SourceShape(msgspec.Struct, frozen=True):
    """What a model with an encoder reads beside a prompt: `rows` numbers of each of `length` moments, [rows, length].

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
