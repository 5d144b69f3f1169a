"""An answer that is under way: where it is, and what of it has come, so that another engine can go on with it."""

from __future__ import annotations

from array import array

import msgspec

from octavo.runtime.messages import AddRequest, TokenOutput
from octavo.server.fleet.stream import Stream


class Placed:
    """Answers to one prompt that an engine got together, under one key; num_open of them are under way."""

    __slots__ = ("engine", "key", "num_open")

    def __init__(self, engine: int, key: str, num_open: int) -> None:
        self.engine = engine
        self.key = key
        self.num_open = num_open


class OpenAnswer:
    """One answer that an engine works on, or will.

    sent, number  the request, and which of its answers this is
    tokens        all that have come
    placed        where it is; None while no engine is there that could have it
    is_silent     the engine that has it has said nothing about it yet
    num_deaths    of engines that had it in their batch
    """

    __slots__ = ("_number", "_sent", "has_begun", "is_silent", "num_deaths", "placed", "request_id", "stream", "tokens")

    def __init__(self, sent: AddRequest, number: int, stream: Stream) -> None:
        self._sent = sent
        self._number = number
        self.request_id = sent.request_ids[number]
        self.stream = stream
        self.tokens = array("i")
        self.placed: Placed | None = None
        self.is_silent = True
        self.has_begun = False
        self.num_deaths = 0

    def rest(self) -> AddRequest:
        """The request for what is still to come: the answer so far stands behind the prompt.

        The prompt's log-probabilities have come with the first output, and are not asked for again.
        """
        request = self._sent.answer(self._number)
        if not self.has_begun:
            return request
        return msgspec.structs.replace(
            request,
            token_ids=[*request.token_ids, *self.tokens],
            num_prompt=len(request.token_ids),
            params=msgspec.structs.replace(request.params, prompt_logprobs=None),
        )

    def first_output(self, output: TokenOutput) -> TokenOutput:
        """What the reader is told with the first output of an engine: what comes with an answer's first token, once."""
        self.is_silent = False
        if not self.has_begun:
            self.has_begun = True
            return output
        return msgspec.structs.replace(
            output, num_cached_tokens=None, scheduled_time=None, first_token_time=None, prompt_logprobs=None
        )


def in_batch(answers: list[OpenAnswer], num_waiting: int) -> set[str]:
    """Which of an engine's answers, in the order in which it got them, may have been in its last batch.

    Those of which something has come, and of the others all but the last ones: as many as waited after its last step.
    Those that it was to go on with, for an engine that had died, were before all that had not begun.
    """
    in_order = sorted(answers, key=lambda answer: not answer.has_begun)
    silent = [answer.request_id for answer in in_order if answer.is_silent]
    waiting = set(silent[max(0, len(silent) - num_waiting) :])
    return {answer.request_id for answer in answers} - waiting
