"""The output of a response: parts become items, and each step of an item an event.

Ids are made of the response's id and the item's place, so an item has one id wherever it is seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any

from octavo.runtime.messages import Logprobs
from octavo.server.dialects.custom_input import InputText
from octavo.server.dialects.logprobs import chat_logprobs
from octavo.server.dialects.responses_items import item_id, seal
from octavo.server.encoding import encode_json
from octavo.server.generation import Delta
from octavo.server.message.parts import Part
from octavo.text.tokenizer import Tokenizer

Json = dict[str, Any]

_KINDS = {"reasoning": "reasoning", "text": "message"}
_PART_EVENTS = {"reasoning": "reasoning_text", "message": "output_text"}


def event_bytes(event: Json) -> bytes:
    """One event as it is sent: named, as OpenAI's newer dialects do it."""
    kind: str = event["type"]
    return b"event: " + kind.encode() + b"\ndata: " + encode_json(event) + b"\n\n"


class Numbered:
    """Gives events their numbers, from 0 without a gap."""

    def __init__(self) -> None:
        self._next = 0

    def event(self, kind: str, **fields: Any) -> Json:
        number = self._next
        self._next += 1
        return {"type": f"response.{kind}", "sequence_number": number, **fields}


class Output:
    """The items of one response.

    namespaces: (namespace, name) of tools that the model calls by one name. customs: tools that take free text.
    seals: reasoning is also given as encrypted_content. tokenizer: names the tokens of log-probabilities; None where
    these were not asked for.
    """

    def __init__(
        self,
        response_id: str,
        numbered: Numbered,
        *,
        namespaces: Mapping[str, tuple[str, str]],
        customs: set[str],
        seals: bool,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.items: list[Json] = []
        self._id = response_id
        self._event = numbered.event
        self._namespaces = namespaces
        self._customs = customs
        self._seals = seals
        self._tokenizer = tokenizer
        self._logprobs: list[Logprobs] = []  # of tokens whose text has not come out yet
        self._open: Json | None = None
        self._pieces: list[str] = []  # of the open item's text
        self._input = InputText()  # of the open custom call

    def take(self, delta: Delta) -> Iterator[Json]:
        """The events that a delta makes."""
        if self._tokenizer is not None:
            self._logprobs += delta.logprobs
        for part in delta.parts:
            yield from self._part(part)

    def end(self, *, is_cut: bool) -> Iterator[Json]:
        """The events that close what is open. An answer without a word is an empty message."""
        if not self.items:
            yield from self._begin("message", {"role": "assistant", "content": []})
        is_call = self._open is not None and self._open["type"].endswith("_call")  # else it would have been closed
        yield from self._close("incomplete" if is_cut or is_call else "completed")

    def _part(self, part: Part) -> Iterator[Json]:
        match part.kind:
            case "call":
                yield from self._close("completed")
                yield from self._begin(*self._call_item(part))
            case "call_end":
                yield from self._close("completed")
            case "arguments":
                yield from self._add(part.text)
            case _:
                if not part.text:
                    return
                kind = _KINDS[part.kind]
                text = part.text
                if self._open is None or self._open["type"] != kind:
                    yield from self._close("completed")
                    empty: Json = {"summary": [], "content": []}
                    if kind == "message":
                        empty = {"role": "assistant", "content": []}
                    text = text.lstrip() if self.items else text  # items are apart without whitespace
                    yield from self._begin(kind, empty)
                yield from self._add(text)
        if part.kind != "text":
            self._logprobs = []

    def _call_item(self, part: Part) -> tuple[str, Json]:
        space, name = self._namespaces.get(part.text, ("", part.text))
        fields: Json = {"call_id": part.call_id, "name": name}
        if space:
            fields["namespace"] = space
        if part.text in self._customs:
            return "custom_tool_call", {**fields, "input": ""}
        return "function_call", {**fields, "arguments": ""}

    def _begin(self, kind: str, fields: Json) -> Iterator[Json]:
        """A new item, and its one part where it has parts."""
        place = f"{len(self.items):04x}"
        item = {"id": item_id(kind, self._id, place), "type": kind, "status": "in_progress", **fields}
        self.items.append(item)
        self._open = item
        self._pieces = []
        self._input = InputText()
        yield self._event("output_item.added", output_index=len(self.items) - 1, item=_copy(item))
        if kind in _PART_EVENTS:
            item["content"] = [_content(kind)]
            yield self._event("content_part.added", **self._place(content=True), part=_content(kind))

    def _place(self, *, content: bool) -> Json:
        assert self._open is not None
        place = {"item_id": self._open["id"], "output_index": len(self.items) - 1}
        return place | {"content_index": 0} if content else place

    def _add(self, text: str) -> Iterator[Json]:
        """More of the open item's text."""
        item = self._open
        if item is not None and item["type"] == "custom_tool_call":
            text = self._input.take(text)
        if item is None or not text:
            return
        self._pieces.append(text)
        kind = item["type"]
        match kind:
            case "message":
                logprobs = self._take_logprobs(text)
                item["content"][0]["logprobs"] += logprobs
                shown = [_short(entry) for entry in logprobs]
                yield self._event("output_text.delta", **self._place(content=True), delta=text, logprobs=shown)
            case "reasoning":
                yield self._event("reasoning_text.delta", **self._place(content=True), delta=text)
            case "function_call":
                yield self._event("function_call_arguments.delta", **self._place(content=False), delta=text)
            case _:
                yield self._event("custom_tool_call_input.delta", **self._place(content=False), delta=text)

    def _take_logprobs(self, text: str) -> list[Json]:
        """Those of the tokens that this text, which comes out now, is made of: the last ones that spell it."""
        tokenizer = self._tokenizer
        if tokenizer is None:
            return []
        entries = self._logprobs
        self._logprobs = []
        spelled = [tokenizer.token_bytes(entry.token_id) for entry in entries]
        said = text.encode()
        start = b"".join(spelled).rfind(said)
        if start >= 0:  # else a token's text is more than its own bytes, and all of them are taken
            ends = list(accumulate(map(len, spelled)))
            first = next(place for place, end in enumerate(ends) if end > start)
            last = next(place for place, end in enumerate(ends) if end >= start + len(said))
            entries = entries[first : last + 1]
        return list(chat_logprobs(entries, tokenizer))

    def _close(self, status: str) -> Iterator[Json]:
        """The end of the open item, if there is one."""
        item = self._open
        if item is None:
            return
        text = "".join(self._pieces)
        kind = item["type"]
        match kind:
            case "message":
                part = item["content"][0]
                part["text"] = text
                logprobs = [_short(entry) for entry in part["logprobs"]]
                yield self._event("output_text.done", **self._place(content=True), text=text, logprobs=logprobs)
                yield self._event("content_part.done", **self._place(content=True), part=part)
            case "reasoning":
                item["content"][0]["text"] = text
                if self._seals:
                    item["encrypted_content"] = seal(text)
                yield self._event("reasoning_text.done", **self._place(content=True), text=text)
                yield self._event("content_part.done", **self._place(content=True), part=item["content"][0])
            case "function_call":
                item["arguments"] = text
                place = self._place(content=False)
                yield self._event("function_call_arguments.done", **place, name=item["name"], arguments=text)
            case _:
                item["input"] = text
                yield self._event("custom_tool_call_input.done", **self._place(content=False), input=text)
        item["status"] = status
        yield self._event("output_item.done", output_index=len(self.items) - 1, item=_copy(item))
        self._open = None


def _content(kind: str) -> Json:
    """The one part of a message or of reasoning, empty."""
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": ""}
    return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}


def _short(entry: Json) -> Json:
    """A token's log-probability as events have it: without bytes."""
    tops = [{"token": top["token"], "logprob": top["logprob"]} for top in entry["top_logprobs"]]
    return {"token": entry["token"], "logprob": entry["logprob"], "top_logprobs": tops}


def _copy(item: Json) -> Json:
    """An item as it is now: it goes on changing, and a whole answer's events are encoded later or never."""
    return item if item["status"] != "in_progress" else {**item, "content": []} if "content" in item else dict(item)


def encoded(events: Iterable[Json]) -> list[bytes]:
    """Each event as it is sent."""
    return [event_bytes(event) for event in events]
