"""From an HTTP request's choices to their text: the engine's outputs, detokenized, cut at stop strings, counted.

`generate` yields what each step brought; a streaming response sends that on, any other one folds it. Whoever stops
reading closes the generator, and its one `finally` aborts what still runs.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from octavo.runtime.messages import AddRequest, Logprobs, TokenOutput
from octavo.server.dialects.protocol import GenerationRequest
from octavo.server.engine_client import EngineClient, EngineDeadError
from octavo.server.errors import ApiError
from octavo.server.metrics import Metrics, Timeline
from octavo.server.served_model import ServedModel
from octavo.text.detokenizer import Detokenizer, IncrementalDecoder


@dataclass(slots=True)
class Delta:
    """What one step brought for one choice.

    offsets: where each token's text begins in the answer, in characters. finish_reason comes with the last delta of a
    choice; stop_reason is then the stop string or the stop token that ended it, if one of the client's did.
    prompt_logprobs come with the first delta, where they were asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[Logprobs]
    offsets: list[int]
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    is_first: bool = False
    prompt_logprobs: list[Logprobs | None] | None = None

    @property
    def size(self) -> int:
        """Tokens and log-probabilities: what it takes to keep it."""
        entries = self.logprobs + (self.prompt_logprobs or [])
        return len(self.token_ids) + sum(1 + len(entry.top_ids) for entry in entries if entry is not None)

    def extend(self, later: Delta) -> None:
        """Become both: how a whole answer is made of its deltas."""
        self.text += later.text
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.offsets += later.offsets
        self.finish_reason = later.finish_reason
        self.stop_reason = later.stop_reason


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a whole HTTP request; a prompt counts once, however many answers it gets."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def as_json(self) -> dict[str, object]:
        """OpenAI's shape."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(slots=True)
class Choice:
    """One answer under way: the engine's request, and its text so far.

    sent is the request as the engine gets it, for this answer and the others to the same prompt.
    num_wanted is 0 where only a prompt's log-probabilities were asked for: the engine's one token is dropped then.
    own_stops are the stop tokens that the client named, beside the model's own end tokens.
    """

    index: int
    request: AddRequest
    sent: AddRequest
    detokenizer: Detokenizer
    num_wanted: int
    show_stop: bool
    own_stops: frozenset[int]
    timeline: Timeline
    num_cached: int = 0
    num_tokens: int = 0
    finish_reason: str | None = None

    def take(self, output: TokenOutput) -> Delta:
        """Turn the engine's output into text. Raises ApiError where the engine says that it can't go on."""
        if output.finish_reason == "error":
            raise ApiError(500, output.error or "the engine failed on this request")
        delta = Delta(self.index, "", [], [], [], prompt_logprobs=output.prompt_logprobs)
        if output.num_cached_tokens is not None:  # comes once, with the first token
            self.num_cached = output.num_cached_tokens
            delta.is_first = True
        for position, token_id in enumerate(output.token_ids if self.num_wanted else ()):
            self._push(token_id, output, position, delta)
            if self.detokenizer.stopped_by is not None:
                break
        self._end(output, delta)
        return delta

    def _push(self, token_id: int, output: TokenOutput, position: int, delta: Delta) -> None:
        self.num_tokens += 1
        delta.token_ids.append(token_id)
        delta.offsets.append(self.detokenizer.length)
        if output.logprobs:
            delta.logprobs.append(output.logprobs[position])
        silent = token_id == output.stop_token_id and not self.show_stop
        delta.text += self.detokenizer.push(token_id, silent=silent)

    def _end(self, output: TokenOutput, delta: Delta) -> None:
        if self.detokenizer.stopped_by is None:
            if output.finish_reason is None:
                return
            delta.text += self.detokenizer.finish()
        if self.detokenizer.stopped_by is not None:
            delta.finish_reason = "stop"
            delta.stop_reason = self.detokenizer.stopped_by
        else:
            delta.finish_reason = output.finish_reason if self.num_wanted else "length"
            if output.stop_token_id in self.own_stops:
                delta.stop_reason = output.stop_token_id
        self.finish_reason = delta.finish_reason


def make_choice(
    index: int,
    request: AddRequest,
    sent: AddRequest,
    options: GenerationRequest,
    model: ServedModel,
    *,
    num_wanted: int,
) -> Choice:
    """A choice at its beginning."""
    decoder = IncrementalDecoder(model.tokenizer, request.token_ids, skip_special_tokens=options.skip_special_tokens)
    show_stop = options.include_stop_str_in_output
    return Choice(
        index=index,
        request=request,
        sent=sent,
        detokenizer=Detokenizer(decoder, options.stops, include_stop=show_stop, min_tokens=options.min_tokens),
        num_wanted=num_wanted,
        show_stop=show_stop,
        own_stops=frozenset(options.stop_token_ids or ()),
        timeline=Timeline(request.arrival_time, len(request.token_ids)),
    )


async def generate(
    choices: Sequence[Choice], client: EngineClient, metrics: Metrics
) -> AsyncGenerator[list[Delta], None]:
    """What each step brings, until every choice has ended. Raises ApiError when the engine fails or is dead."""
    by_id = {choice.request.request_id: choice for choice in choices}
    num_open = len(choices)
    outcome = "abort"
    try:
        prompts = {id(choice.sent): choice.sent for choice in choices}
        async with client.open(prompts.values()) as stream:
            while num_open:
                deltas = []
                for output in await stream.next():
                    choice = by_id[output.request_id]
                    if choice.finish_reason is not None:
                        continue  # a stop string ended it, and the engine did not know yet
                    delta = choice.take(output)
                    metrics.tokens(choice.timeline, output, len(delta.token_ids))
                    if delta.finish_reason is not None:
                        num_open -= 1
                        metrics.end(choice.timeline, delta.finish_reason, choice.num_tokens)
                        if output.finish_reason is None:
                            stream.end([output.request_id])
                    deltas.append(delta)
                yield deltas
    except EngineDeadError as error:
        outcome = "error"
        raise ApiError(503, str(error)) from error
    except Exception:
        outcome = "error"
        raise
    finally:
        for choice in choices:
            if choice.finish_reason is None:
                metrics.end(choice.timeline, outcome, choice.num_tokens)
        longest = max(choice.num_tokens for choice in choices)
        metrics.end_all(len(choices), choices[0].request.params.max_tokens, longest)


def usage_of(choices: Sequence[Choice]) -> Usage:
    """The counts so far. Answers to one prompt stand side by side in `choices` and share its token list."""
    prompts = {id(choice.request.token_ids): choice for choice in reversed(choices)}
    return Usage(
        prompt_tokens=sum(len(choice.request.token_ids) for choice in prompts.values()),
        completion_tokens=sum(choice.num_tokens for choice in choices),
        cached_tokens=sum(choice.num_cached for choice in prompts.values()),
    )
