"""From what each step brings to RequestOutput: answers that grow, and what is told of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from octavo.inputs import Given
from octavo.offline.requests import Asked
from octavo.outputs import (
    BeamSearchOutput,
    BeamSearchSequence,
    CompletionOutput,
    Logprob,
    LogprobsOnePosition,
    PromptLogprobs,
    RequestOutput,
    RequestStateStats,
    ToolCall,
)
from octavo.runtime.messages import Logprobs
from octavo.sampling_params import BeamSearchParams, RequestOutputKind
from octavo.server.generation import Choice, Delta, text_parser
from octavo.server.message.parse import Parser
from octavo.server.message.parts import Part, append_parts, calls_of, reasoning_of, text_of
from octavo.server.reading import Reading
from octavo.server.served_model import ServedModel


class TokenTexts(dict[int, str]):
    """Each token's own text, made when it is asked for first; half a character is a replacement character."""

    def __init__(self, model: ServedModel) -> None:
        super().__init__()
        self._bytes = model.tokenizer.token_bytes

    def __missing__(self, token_id: int) -> str:
        text = self[token_id] = self._bytes(token_id).decode("utf-8", "replace")
        return text


def plain_parsers(choices: Sequence[Choice], asked: Asked, model: ServedModel, reading: Reading | None) -> list[Parser]:
    """What reads all of these answers as text, beside what tells them apart; none where they are text anyway."""
    return [] if reading is None else [text_parser(choice.request, asked.request, model) for choice in choices]


class GrowingRequest:
    """The answers to one prompt under way. choices: side by side, in the order of their indexes.

    plain: where answers are told apart, `plain_parsers`; else None.
    """

    def __init__(
        self,
        request_id: str,
        given: Given,
        asked: Asked,
        choices: Sequence[Choice],
        texts: TokenTexts,
        plain: Sequence[Parser] | None = None,
    ) -> None:
        self._plain = plain
        self._parts: list[list[Part]] = [[] for _ in choices]
        self.choices = choices
        self._texts = texts if asked.decodes else None
        self._asked = asked
        self._first = choices[0].index
        self._whole = [self._said(Delta(choice.index, [], [], [], [])) for choice in choices]
        self._num_open = len(choices)
        request = choices[0].request
        self._output = RequestOutput(request_id, given.text, request.token_ids, None, self._whole, finished=False)
        if request.source_ids:
            self._output.prompt = None if given.decoder is None else given.decoder.text
            self._output.encoder_prompt = given.text
            self._output.encoder_prompt_token_ids = request.source_ids
        self._output.lora_request = asked.adapter

    @property
    def is_finished(self) -> bool:
        """Whether all answers have ended."""
        return self._num_open == 0

    def add(self, delta: Delta) -> CompletionOutput:
        """Take what a step brought for one answer; returns that alone."""
        said = self._said(delta)
        whole = self._whole[said.index]
        if self._plain is not None:
            self._tell_apart(delta, said)
        if whole.cumulative_logprob is not None and said.cumulative_logprob is not None:
            said.cumulative_logprob += whole.cumulative_logprob
        _extend(whole, said)
        self._num_open -= said.finish_reason is not None
        output = self._output
        if delta.prompt_logprobs is not None and output.prompt_logprobs is None:
            output.prompt_logprobs = self._of_prompt(delta.prompt_logprobs)
        if delta.is_first:
            output.num_cached_tokens = self.choices[said.index].num_cached
        return said

    def whole(self) -> RequestOutput:
        """All so far, in the values that go on growing."""
        output = self._output
        output.finished = self.is_finished
        if output.finished and output.metrics is None:
            output.metrics = _stats_of(self.choices[0])
        return output

    def told(self, deltas: Sequence[CompletionOutput], kind: RequestOutputKind) -> RequestOutput:
        """What a stream of this kind tells of a step, in values of its own; deltas: what it brought."""
        whole = self.whole()
        if kind is RequestOutputKind.DELTA:
            joined: dict[int, CompletionOutput] = {}  # of one answer several, where the reader was slower than steps
            for delta in deltas:
                if delta.index in joined:
                    _extend(joined[delta.index], delta)
                else:
                    joined[delta.index] = delta
            return replace(whole, outputs=list(joined.values()))
        news = {delta.index for delta in deltas}
        outputs = [_copy(output) for output in self._whole if output.index in news or self.is_finished]
        return replace(whole, outputs=outputs)

    def _said(self, delta: Delta) -> CompletionOutput:
        logprobs = None
        total = None
        if self._asked.logprobs is not None:
            is_ranked = not self._asked.request.logprob_token_ids
            logprobs = [self._position(entry, is_ranked=is_ranked) for entry in delta.logprobs]
            total = sum(entry.logprob for entry in delta.logprobs)
        index = delta.index - self._first
        text = "" if self._texts is None else self._all_of(index, delta) if self._plain else text_of(delta.parts)
        reasons = (delta.finish_reason, delta.stop_reason)
        said = CompletionOutput(index, text, delta.token_ids, total, logprobs, *reasons, self._asked.adapter)
        if delta.finish_reason is not None:
            said.spec_decode_metrics = self.choices[index].drafted
        return said

    def _all_of(self, index: int, delta: Delta) -> str:
        """The text of an answer's tokens, whatever it is."""
        assert self._plain is not None
        choice = self.choices[index]
        parser = self._plain[index]
        for token_id in delta.token_ids:
            ends = delta.finish_reason == "stop" and token_id in choice.request.params.stop_token_ids
            parser.push(token_id, silent=ends and not choice.show_stop)
        if delta.finish_reason is not None and parser.stopped_by is None:
            parser.finish()
        return text_of(parser.take())

    def _tell_apart(self, delta: Delta, said: CompletionOutput) -> None:
        """With the end of an answer, what it says as reasoning, as content and as calls."""
        parts = self._parts[said.index]
        append_parts(parts, delta.parts)
        if delta.finish_reason is None or self._texts is None:
            return
        calls = calls_of(parts)
        said.reasoning = reasoning_of(parts) or None
        said.content = text_of(parts)
        said.tool_calls = [ToolCall(call.call_id, call.name, call.arguments) for call in calls]

    def _of_prompt(self, entries: Sequence[Logprobs | None]) -> PromptLogprobs:
        return [None if entry is None else self._position(entry, is_ranked=True) for entry in entries]

    def _position(self, entry: Logprobs, *, is_ranked: bool) -> LogprobsOnePosition:
        """The token that stands there first. is_ranked: the others are the likeliest, and not those that are named."""
        texts = self._texts
        token_id = entry.token_id
        found = {token_id: Logprob(entry.logprob, entry.rank, None if texts is None else texts[token_id])}
        for rank, (other, logprob) in enumerate(zip(entry.top_ids, entry.top_logprobs, strict=True), start=1):
            if other not in found:
                found[other] = Logprob(logprob, rank if is_ranked else None, None if texts is None else texts[other])
        return found


def _stats_of(choice: Choice) -> RequestStateStats:
    times = choice.timeline
    return RequestStateStats(
        num_generation_tokens=choice.num_tokens,
        num_preemptions=times.num_preemptions,
        arrival_time=times.arrival,
        queued_ts=times.arrival,
        scheduled_ts=times.scheduled,
        first_token_ts=times.first,
        last_token_ts=times.last,
        first_token_latency=max(0.0, times.first - times.arrival),
    )


def _extend(output: CompletionOutput, later: CompletionOutput) -> None:
    """Become both."""
    output.text += later.text
    output.token_ids += later.token_ids
    if output.logprobs is not None and later.logprobs is not None:
        output.logprobs += later.logprobs
    output.cumulative_logprob = later.cumulative_logprob
    output.finish_reason = later.finish_reason
    output.stop_reason = later.stop_reason
    output.reasoning = later.reasoning
    output.content = later.content
    output.tool_calls = later.tool_calls
    output.spec_decode_metrics = later.spec_decode_metrics


def _copy(output: CompletionOutput) -> CompletionOutput:
    logprobs = None if output.logprobs is None else list(output.logprobs)
    return replace(output, token_ids=list(output.token_ids), logprobs=logprobs)


def beams_of(output: RequestOutput, given: Given, params: BeamSearchParams, model: ServedModel) -> BeamSearchOutput:
    """The beams of one prompt, as vLLM tells them: tokens and text with the prompt's."""
    sequences = []
    prompt = {"prompt": given.text, "prompt_token_ids": output.prompt_token_ids}
    for beam in output.outputs:
        tokens = output.prompt_token_ids + beam.token_ids
        sequences.append(
            BeamSearchSequence(
                {name: value for name, value in prompt.items() if value is not None},
                tokens,
                beam.logprobs or [],
                output.lora_request,
                cum_logprob=beam.cumulative_logprob or 0.0,
                text=model.tokenizer.decode(tokens, skip_special_tokens=params.skip_special_tokens),
                finish_reason=beam.finish_reason,
                stop_reason=beam.stop_reason,
            )
        )
    return BeamSearchOutput(sequences)
