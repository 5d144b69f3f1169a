"""From a request's choices to what the model says in them: the engine's outputs as parts, and counted.

`generate` yields what each step brought; a streaming response sends that on, any other one folds it. Whoever stops
reading closes the generator, and its one `finally` aborts what still runs. No dialect is known here.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

from octavo.runtime.constraint import FAILED
from octavo.runtime.messages import AddRequest, Logprobs, TokenOutput
from octavo.server.admission import Ticket
from octavo.server.dialects.fields import GenerationRequest
from octavo.server.draft_metrics import DraftMetrics, request_metrics
from octavo.server.engine_client import EngineDeadError
from octavo.server.errors import ApiError, bad_request
from octavo.server.fleet.fleet import Fleet
from octavo.server.media.images import WITHOUT_IMAGE
from octavo.server.message.constrain import constraint_field
from octavo.server.message.parse import FormatParser, Machine, Parser
from octavo.server.message.parts import Part, append_parts
from octavo.server.metrics import Metrics, Timeline
from octavo.server.options import FairBy
from octavo.server.prompts import Prompt, Wanted, check_room, sampling_params, stop_patterns
from octavo.server.reading import Reading, constrained
from octavo.server.served_model import ServedModel
from octavo.text.detokenizer import Detokenizer, IncrementalDecoder, MarkingDecoder

MAX_WHOLE = 1 << 22  # tokens and log-probabilities of an answer that isn't streamed; as objects they take 300 MB

LOWEST_PRIORITY = 2**31 - 1

_unique = itertools.count()


@dataclass(slots=True)
class Delta:
    """What one step brought for one choice.

    offsets: where each token's text begins in the answer, in characters. finish_reason comes with the last delta of a
    choice; stop_reason is then the stop string or the stop token that ended it, if one of the client's did.
    prompt_logprobs come with the first delta, where they were asked for.
    """

    index: int
    parts: list[Part]
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
        append_parts(self.parts, later.parts)
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.offsets += later.offsets
        self.finish_reason = later.finish_reason
        self.stop_reason = later.stop_reason


Steps = AsyncGenerator[list[Delta], None]


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a whole HTTP request; a prompt counts once, however many answers it gets.

    reasoning_tokens: those of completion_tokens that the model thought with; None where it knows no reasoning.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int | None = None

    def as_json(self) -> dict[str, object]:
        """OpenAI's shape."""
        thought: dict[str, object] = {}
        if self.reasoning_tokens is not None:
            thought["completion_tokens_details"] = {"reasoning_tokens": self.reasoning_tokens}
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            **thought,
        }


@dataclass(slots=True)
class Choice:
    """One answer under way: the engine's request, and how far the answer is.

    sent is the request as the engine gets it, for this answer and the others to the same prompt.
    num_wanted is 0 where only a prompt's log-probabilities were asked for: the engine's one token is dropped then.
    own_stops are the stop tokens that the client named, beside the model's own end tokens.
    length_penalty: that of a beam search; None: it is sampled.
    blamed: the field that an error about the answer's grammar names; "" where there is no grammar.
    drafted: how its drafts fared; None where that is not told.
    """

    index: int
    request: AddRequest
    sent: AddRequest
    parser: Parser | FormatParser
    num_wanted: int
    show_stop: bool
    own_stops: frozenset[int]
    timeline: Timeline
    length_penalty: float | None = None
    blamed: str = ""
    num_cached: int = 0
    num_tokens: int = 0
    drafted: DraftMetrics | None = None
    finish_reason: str | None = None

    def take(self, output: TokenOutput) -> Delta:
        """Turn the engine's output into parts. Raises ApiError where the engine says that it can't go on."""
        if output.finish_reason == "error":
            raise self._failure(output)
        is_first = output.num_cached_tokens is not None  # comes once, with the first token
        if output.num_cached_tokens is not None:
            self.num_cached = output.num_cached_tokens
        if self.drafted is not None and output.checked is not None:
            self.drafted.count(output.checked)
        token_ids: list[int] = []
        logprobs: list[Logprobs] = []
        offsets: list[int] = []
        parser = self.parser
        if self.num_wanted:
            for position, token_id in enumerate(output.token_ids):
                token_ids.append(token_id)
                offsets.append(parser.length)
                if output.logprobs:
                    logprobs.append(output.logprobs[position])
                parser.push(token_id, silent=token_id == output.stop_token_id and not self.show_stop)
                if parser.stopped_by is not None:
                    break
            self.num_tokens += len(token_ids)
        stop_reason = None
        if output.finish_reason is not None or parser.stopped_by is not None:
            stop_reason = self._end(output)
        return Delta(
            self.index,
            parser.take(),
            token_ids,
            logprobs,
            offsets,
            self.finish_reason,
            stop_reason,
            is_first,
            output.prompt_logprobs,
        )

    def _failure(self, output: TokenOutput) -> ApiError:
        """The engine's error, with the field that it is about where that is the grammar."""
        text = output.error or "the engine failed on this request"
        if output.is_refused and self.blamed and text.startswith(FAILED):
            return bad_request(f"{self.blamed}: {text}", self.blamed.partition(".")[0])
        return ApiError(400 if output.is_refused else 500, text)

    def _end(self, output: TokenOutput) -> str | int | None:
        """Note how the answer has ended; returns the stop string or the client's stop token that ended it."""
        parser = self.parser
        if parser.stopped_by is None:
            parser.finish(is_cut=output.finish_reason != "stop" or output.stop_token_id in self.own_stops)
        if parser.stopped_by is not None:
            self.finish_reason = "stop"
            return parser.stopped_by
        self.finish_reason = output.finish_reason if self.num_wanted else "length"
        if self.finish_reason == "repetition":
            return "repetition_detected"
        return output.stop_token_id if output.stop_token_id in self.own_stops else None


def make_choices(
    prompts: Sequence[Prompt],
    request: GenerationRequest,
    wanted: Wanted,
    model: ServedModel,
    reading: Reading | None = None,
) -> list[Choice]:
    """n choices for each prompt, side by side. A seed is the first one's; the others count up from it."""
    arrival = time.time()
    rooms = [prompt.room(model) for prompt in prompts]
    constraint, reading = constrained(request, model, reading)
    params = sampling_params(request, wanted, model, min(rooms), constraint)
    has_tools = reading is not None and reading.calls is not None and bool(reading.calls.tools)
    adapter = model.adapter(request.model)
    if adapter is None and request.model is not None and not model.serves(request.model):
        raise ApiError(404, f"the model {request.model[:80]!r} is not served here any more", param="model")
    blamed = constraint_field(request) or ("tools" if has_tools else "")
    choices: list[Choice] = []
    for prompt, room in zip(prompts, rooms, strict=True):
        own = msgspec.structs.replace(params, max_tokens=wanted.limit(room, model))
        check_room(own.max_tokens, room, wanted, model)
        first, *others = (f"{model.server_name}request-{next(_unique)}" for _ in range(request.num_choices))
        salt = request.cache_salt or ""
        begin = prompt.begin(model)
        sent = AddRequest(first, begin, own, arrival, salt, others, request.priority or 0, request.user_name)
        if model.encoder is not None:
            forbidden = own.forbidden + model.encoder.forbidden
            own = msgspec.structs.replace(own, rules=model.encoder.rules(begin), forbidden=forbidden)
            sent = msgspec.structs.replace(sent, source_ids=prompt.token_ids, params=own)
        if adapter is not None:
            sent = msgspec.structs.replace(sent, adapter=adapter.digest)
        if prompt.images:
            if request.use_beam_search:
                raise bad_request("use_beam_search: prompts with images are not searched", "use_beam_search")
            sent = msgspec.structs.replace(sent, images=prompt.images)
        elif model.images is not None and model.images.wants_one:
            raise bad_request(WITHOUT_IMAGE)
        num_wanted = 0 if wanted.max_tokens == 0 else own.max_tokens
        for answer in sent.answers():
            parser = (
                text_parser(answer, request, model) if reading is None else _parser(answer, request, model, reading)
            )
            choice = _make_choice(len(choices), answer, sent, request, num_wanted, parser)
            choice.blamed = blamed
            choice.drafted = model.draft_reports.begin()
            choices.append(choice)
    return choices


def _make_choice(
    index: int,
    request: AddRequest,
    sent: AddRequest,
    options: GenerationRequest,
    num_wanted: int,
    parser: Parser | FormatParser,
) -> Choice:
    """A choice at its beginning."""
    return Choice(
        index=index,
        request=request,
        sent=sent,
        parser=parser,
        num_wanted=num_wanted,
        show_stop=options.include_stop_str_in_output,
        own_stops=frozenset(options.stop_token_ids or ()),
        length_penalty=(1.0 if options.length_penalty is None else options.length_penalty)
        if options.use_beam_search
        else None,
        timeline=Timeline(request.arrival_time, len(request.prompt_ids)),
    )


def text_parser(request: AddRequest, options: GenerationRequest, model: ServedModel) -> Parser:
    """What turns this answer's tokens into text, whatever that says."""
    skips = options.skip_special_tokens
    decoder = IncrementalDecoder(model.tokenizer, request.token_ids, skip_special_tokens=skips)
    return Parser(_detokenizer(decoder, options))


def _parser(request: AddRequest, options: GenerationRequest, model: ServedModel, reading: Reading) -> FormatParser:
    """What turns this answer's tokens into parts."""
    skips = options.skip_special_tokens
    marks = reading.formats.marks
    decoder = MarkingDecoder(model.tokenizer, request.token_ids, marks=marks, skip_special_tokens=skips)
    machine = Machine(
        reading.formats,
        reasoning_is_open=reading.reasoning_is_open,
        call_is_open=reading.call_is_open,
        goes_on=reading.goes_on,
        tools=reading.tools,
        num_before=reading.num_before,
        strictness=reading.strictness,
        must_call=reading.calls is not None and reading.calls.mode == "required",
        trims=reading.trims,
        skip_special_tokens=skips,
    )
    return FormatParser(_detokenizer(decoder, options), machine, only_one=reading.only_one)


def _detokenizer(decoder: IncrementalDecoder, options: GenerationRequest) -> Detokenizer:
    return Detokenizer(
        decoder,
        options.stops,
        include_stop=options.include_stop_str_in_output,
        min_tokens=options.min_tokens,
        patterns=stop_patterns(options),
    )


def put_last(choices: Sequence[Choice]) -> None:
    """Let these answers wait behind all others, where the engine goes by priority."""
    _change_sent(choices, priority=LOWEST_PRIORITY)


def set_owner(choices: Sequence[Choice], fair_by: FairBy, key_owner: str) -> None:
    """Say whose these answers are, of whom each gets a fair share: an API key's, or a user's of that key."""
    user = choices[0].sent.owner
    owner = fair_owner(fair_by, key_owner, user)
    if owner != user:
        _change_sent(choices, owner=owner)


def fair_owner(fair_by: FairBy, key_owner: str, user: str) -> str:
    """Who gets a fair share, of a user's request that carried this key."""
    return {"none": "", "key": key_owner, "user": f"{key_owner}/{user}" if key_owner or user else ""}[fair_by]


def _change_sent(choices: Sequence[Choice], **fields: Any) -> None:
    """Send the engine's requests with these fields; answers to one prompt go on sharing theirs."""
    sent = {id(choice.sent): msgspec.structs.replace(choice.sent, **fields) for choice in choices}
    for choice in choices:
        choice.sent = sent[id(choice.sent)]


def by_prompt(choices: Sequence[Choice]) -> list[list[Choice]]:
    """The answers to each prompt."""
    found: dict[int, list[Choice]] = {}
    for choice in choices:
        found.setdefault(id(choice.sent), []).append(choice)
    return list(found.values())


def count_end(choice: Choice, finish_reason: str, metrics: Metrics) -> None:
    """Tell the metrics how this answer has ended, and how many of its calls could not be read."""
    metrics.end(choice.timeline, finish_reason, choice.num_tokens)
    metrics.unparsed_calls(choice.parser.num_malformed, choice.timeline.engine)


@contextmanager
def ending(tell: Callable[[str], object]) -> Iterator[None]:
    """Tell at the end how it came to what has not ended by itself. Raises ApiError where the engine is dead."""
    outcome = "abort"
    try:
        yield
    except EngineDeadError as error:
        outcome = "error"
        raise ApiError(503, str(error)) from error
    except Exception:
        outcome = "error"
        raise
    finally:
        tell(outcome)


@contextmanager
def counted_ends(choices: Sequence[Choice], metrics: Metrics) -> Iterator[None]:
    """Tell the metrics of each prompt's answers together, and how each ended that has not ended by itself.

    Raises ApiError where the engine is dead.
    """

    def count(outcome: str) -> None:
        for choice in choices:
            if choice.finish_reason is None:
                metrics.end(choice.timeline, outcome, choice.num_tokens)
        for alike in by_prompt(choices):
            longest = max(choice.num_tokens for choice in alike)
            metrics.end_all(alike[0].timeline, len(alike), alike[0].request.params.max_tokens, longest)

    with ending(count):
        yield


async def generate(choices: Sequence[Choice], client: Fleet, metrics: Metrics, ticket: Ticket) -> Steps:
    """The deltas of each step, until every choice has ended. Raises ApiError when the engine fails or is dead."""
    by_id = {choice.request.request_id: choice for choice in choices}
    num_open = len(choices)
    with ticket, counted_ends(choices, metrics):
        await ticket.within_time(client.resumed(), has_begun=False)
        prompts = {id(choice.sent): choice.sent for choice in choices}
        async with client.open(prompts.values(), ticket.key_owner, ticket.name) as stream:
            ticket.open()
            for choice in choices:
                choice.timeline.engine = stream.engine_of[choice.request.request_id]
            num_silent = len(choices)
            while num_open:
                deltas = []
                for output in await ticket.within_time(stream.next(), has_begun=not num_silent):
                    choice = by_id[output.request_id]
                    if choice.finish_reason is not None:
                        continue  # a stop string ended it, and the engine did not know yet
                    delta = choice.take(output)
                    choice.timeline.engine = stream.engine_of[output.request_id]
                    metrics.tokens(choice.timeline, output, len(delta.token_ids))
                    if delta.finish_reason is not None:
                        num_open -= 1
                        count_end(choice, delta.finish_reason, metrics)
                        if output.finish_reason is None:
                            stream.end([output.request_id])
                    num_silent -= delta.is_first
                    deltas.append(delta)
                yield deltas


async def in_batches(steps: Steps, interval: int) -> Steps:
    """The same deltas, joined until a choice has `interval` new tokens; its first and its last come at once."""
    waiting: dict[int, Delta] = {}
    async with aclosing(steps):
        async for deltas in steps:
            ready: list[Delta] = []
            for delta in deltas:
                joined = waiting.pop(delta.index, None)
                if joined is None:
                    joined = delta
                else:
                    joined.extend(delta)
                if joined.is_first or joined.finish_reason is not None or len(joined.token_ids) >= interval:
                    ready.append(joined)
                else:
                    waiting[delta.index] = joined
            if ready:
                yield ready


async def fold(steps: Steps, num_choices: int) -> list[Delta]:
    """All deltas of each choice joined, in the order of the choices, when all steps are there."""
    whole: dict[int, Delta] = {}
    size = 0
    async with aclosing(steps):
        async for deltas in steps:
            size += sum(delta.size for delta in deltas)
            if size > MAX_WHOLE:
                raise bad_request(
                    f"the answer has more than {MAX_WHOLE} tokens and logprobs; ask for it as a stream", "stream"
                )
            for delta in deltas:
                if delta.index in whole:
                    whole[delta.index].extend(delta)
                else:
                    whole[delta.index] = delta
    return [whole[index] for index in range(num_choices)]


def drafted_of(choices: Sequence[Choice]) -> dict[str, Any]:
    """vLLM's entry `metrics` of a whole HTTP request; nothing where --per-request-spec-decode-metrics is none."""
    return request_metrics([choice.drafted for choice in choices])


def usage_of(choices: Sequence[Choice]) -> Usage:
    """The counts so far. Answers to one prompt stand side by side in `choices` and share its token list."""
    prompts = {id(choice.request.prompt_ids): choice for choice in reversed(choices)}
    thought = [count for choice in choices if (count := choice.parser.num_reasoning) is not None]
    return Usage(
        prompt_tokens=sum(len(choice.request.prompt_ids) for choice in prompts.values()),
        completion_tokens=sum(choice.num_tokens for choice in choices),
        cached_tokens=sum(choice.num_cached for choice in prompts.values()),
        reasoning_tokens=None if not thought else sum(thought),
    )
