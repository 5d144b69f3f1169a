"""Harmony, gpt-oss's format: an answer is messages, each with a header that names its channel and its recipient.

    <|channel|>analysis<|message|>thought<|end|><|start|>assistant<|channel|>final<|message|>text<|return|>
    <|channel|>commentary to=functions.name <|constrain|>json<|message|>{"key": 1}<|call|>

The recipient may stand in front of the channel. The markers are the fields of the ToolFormat: section_begin, key_begin
(the channel), name_to_arguments (the message), section_end, call_end and value_end (the three ends of a message).
"""

from __future__ import annotations

import re
from collections.abc import Generator

from octavo.server.message.calls import CallReader
from octavo.server.message.format import ToolFormat
from octavo.server.message.parts import Kind
from octavo.server.message.scan import MARKS, CutError, MalformedError, Scanner, stops_for

_RECIPIENT = re.compile(rf"\bto=([^\s<{MARKS}]+)")
_CHANNEL = re.compile(r"\s*(\w+)")


def read_channels(scan: Scanner, form: ToolFormat, calls: CallReader) -> Generator[None, None, None]:
    """Every message of an answer, whose first header the prompt has begun."""
    start = form.section_begin.split("assistant")[0]
    header_ends = stops_for(form.name_to_arguments)
    body_ends = stops_for(form.section_end, form.call_end, form.value_end, start)
    if not (yield from _has_header(scan, (start, form.key_begin, "to="))):
        yield from scan.until(body_ends, "text")
    while True:
        scan.record()
        try:
            header, _ = yield from scan.read(header_ends)
        except MalformedError:  # no header at all
            scan.give_back()
            yield from scan.until(body_ends, "text")
            continue
        except CutError:
            begun = _RECIPIENT.search(scan.buffer)
            if scan.is_cut and begun is not None and begun.end() < len(scan.buffer):
                calls.cut_call(begun[1].removeprefix("functions."))
            raise
        scan.forget()
        recipient = _RECIPIENT.search(header)
        if recipient is not None and recipient[1] != "assistant":
            yield from calls.channel_call(recipient[1].removeprefix("functions."), body_ends)
        else:
            _, _, channel = header.partition(form.key_begin)
            found = _CHANNEL.match(channel)
            kind: Kind = "reasoning" if found is not None and found[1] == "analysis" else "text"
            scan.is_thinking = kind == "reasoning"
            yield from scan.until(body_ends, kind)
            scan.is_thinking = False


def _has_header(scan: Scanner, beginnings: tuple[str, ...]) -> Generator[None, None, bool]:
    yield from scan.space()
    while not scan.ended and any(text.startswith(scan.buffer) and text != scan.buffer for text in beginnings):
        yield
    return any(scan.buffer.startswith(text) for text in beginnings)
