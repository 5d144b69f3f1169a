"""A format's markers as the reader of calls looks for them, and the grammar of calls writes them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from octavo.server.message.format import Strictness, ToolFormat, literals


@dataclass(frozen=True)
class Layout:
    """A format's markers, derived from its texts once.

    openers: what begins a section, or a call where there are no sections; `in_section` tells which. call: the pieces
    in front of a call's name, or of its object. ends: the pieces behind a call.
    """

    openers: tuple[str, ...]
    in_section: bool
    is_list: bool
    call: tuple[str, ...]
    name_ends: tuple[str, ...]
    ends: tuple[str, ...]
    section_end: tuple[str, ...]
    bare: str

    @property
    def section_stop(self) -> str:
        """The first piece of the section's end; "" if it has none."""
        return self.section_end[0] if self.section_end else ""


@functools.lru_cache(maxsize=64)
def layout_of(form: ToolFormat, strictness: Strictness = "loose") -> Layout:
    """The markers of a format; where it is read loosely, also those that models write in their place."""
    is_exact = strictness != "loose"
    call_begin = form.call_begin
    call_end = form.call_end
    if form.keys is not None:  # the object is read as JSON, whatever its whitespace and the order of its keys
        call_begin = call_begin[: call_begin.index("{")]
        call_end = call_end[call_end.index("}") + 1 :]
    section_begin = form.section_begin
    section_end = form.section_end
    if form.kind == "json_array" or (form.kind == "pythonic" and "[" in section_begin):
        section_begin = section_begin[: section_begin.rindex("[")] if "[" in section_begin else section_begin
        section_end = section_end[section_end.index("]") + 1 :] if "]" in section_end else section_end
    call = literals(call_begin)
    begin = section_begin.strip()
    openers = (begin,) if begin else call[:1]
    if begin and form.keys is None and form.kind in ("json", "params") and call and not is_exact:
        openers = (begin, call[0])  # a section whose beginning is missing
    if form.kind == "params" and not begin and len(call) == 2 and not is_exact:
        openers = call  # Qwen3-Coder now and then leaves out the outer one
    ends = literals(call_end)
    if form.kind == "pythonic":  # the bracket alone, and what may stand behind it
        ends = (call_end[:1] or ")", *literals(call_end[1:]))
    bare = ""
    # Qwen2.5-Coder and others of its size now and then write the object without its marker
    is_named_object = form.kind == "json" and form.keys not in (None, ("", ""))
    if form.may_be_bare or not openers or (is_named_object and strictness != "marked"):
        bare = "[" if form.kind in ("json_array", "pythonic") else "{"
    return Layout(
        openers=openers,
        in_section=bool(begin),
        is_list=form.kind == "json_array" or (form.kind == "pythonic" and (bool(begin) or not call)),
        call=call,
        name_ends=literals(form.name_to_arguments),
        ends=ends,
        section_end=literals(section_end),
        bare=bare,
    )
