"""What a program is written with, under SGLang's names: expressions, turns, and the decorator."""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack, overload

from octavo.lang.backend import AnyBackend, chosen
from octavo.lang.choices import ChoicesSamplingMethod, token_length_normalized
from octavo.lang.ir import (
    CONSTRAINTS,
    Expression,
    Gen,
    GenOptions,
    Image,
    Joined,
    RoleBegin,
    RoleEnd,
    Select,
    StringOptions,
    checked,
    joined,
    parts_of,
)
from octavo.lang.native import RuntimeEndpoint
from octavo.lang.reasoning import check_type
from octavo.lang.run import SglFunction

GREEDY = 1e-5  # a temperature up to which SGLang selects


@overload
def function(func: Callable[..., Any], num_api_spec_tokens: None = None) -> SglFunction: ...
@overload
def function(
    func: None = None, num_api_spec_tokens: int | None = None
) -> Callable[[Callable[..., Any]], SglFunction]: ...
def function(func: Callable[..., Any] | None = None, num_api_spec_tokens: int | None = None) -> Any:
    """Make a program of a function whose first parameter is `s`."""
    if num_api_spec_tokens is not None:
        raise ValueError(
            "num_api_spec_tokens: an answer is not guessed ahead over several gens; leave it out, and each gen is a "
            "request of its own"
        )
    return function if func is None else SglFunction(func)


def gen(
    name: str | None = None,
    max_tokens: int | None = None,
    min_tokens: int | None = None,
    n: int | None = None,
    stop: str | Sequence[str] | None = None,
    *,
    choices: Sequence[str] | None = None,
    choices_method: ChoicesSamplingMethod | None = None,
    **options: Unpack[GenOptions],
) -> Expression:
    """Text that the model writes, which is the variable `name` afterwards. With choices, see `select`.

    n: so many answers, of which the first goes on; the variable is their list. dtype, regex, json_schema: what the text
    must be. Options that are left out are those of `run`. Raises TypeError and ValueError.
    """
    given = {"max_new_tokens": max_tokens, "min_new_tokens": min_tokens, "n": n, "stop": stop, **options}
    found = checked(given, "gen")
    if choices is None:
        if choices_method is not None:
            raise ValueError("gen: choices_method goes with choices")
        return Gen(name, found)
    wrong = [each for each in (*CONSTRAINTS, "n") if each in found]
    if wrong:
        raise ValueError(f"gen: {wrong[0]} does not go with choices, of which the text is one")
    return select(name, choices, found.get("temperature", 0.0), choices_method or token_length_normalized)


def gen_int(
    name: str | None = None,
    max_tokens: int | None = None,
    n: int | None = None,
    stop: str | Sequence[str] | None = None,
    **options: Unpack[StringOptions],
) -> Expression:
    """An integer, as text."""
    return gen(name, max_tokens, None, n, stop, dtype=int, **options)


def gen_string(
    name: str | None = None,
    max_tokens: int | None = None,
    n: int | None = None,
    stop: str | Sequence[str] | None = None,
    **options: Unpack[StringOptions],
) -> Expression:
    """Text between double quotes, with them."""
    return gen(name, max_tokens, None, n, stop, dtype=str, **options)


def select(
    name: str | None = None,
    choices: Sequence[str] | None = None,
    temperature: float = 0.0,
    choices_method: ChoicesSamplingMethod = token_length_normalized,
) -> Expression:
    """The choice that the model finds likeliest, as choices_method counts it. Raises ValueError and TypeError."""
    if not choices or isinstance(choices, str):
        raise ValueError(f"select: choices {choices!r} is no list of texts to choose from")
    if not all(isinstance(choice, str) for choice in choices):
        raise TypeError(f"select: choices {list(choices)!r} are not all texts")
    if temperature > GREEDY:
        raise ValueError(f"select: temperature {temperature:g}; the likeliest choice is taken: leave it out, or give 0")
    return Select(name, tuple(choices), choices_method)


def system(expression: Expression | str | None = None) -> Expression:
    """A system's turn."""
    return _turn("system", expression)


def user(expression: Expression | str | None = None) -> Expression:
    """A user's turn."""
    return _turn("user", expression)


def assistant(expression: Expression | str | None = None) -> Expression:
    """An assistant's turn."""
    return _turn("assistant", expression)


def system_begin() -> Expression:
    """Where a system's turn begins."""
    return RoleBegin("system")


def system_end() -> Expression:
    """Where it ends."""
    return RoleEnd("system")


def user_begin() -> Expression:
    """Where a user's turn begins."""
    return RoleBegin("user")


def user_end() -> Expression:
    """Where it ends."""
    return RoleEnd("user")


def assistant_begin() -> Expression:
    """Where an assistant's turn begins."""
    return RoleBegin("assistant")


def assistant_end() -> Expression:
    """Where it ends."""
    return RoleEnd("assistant")


def separate_reasoning(expression: Expression | None = None, model_type: str | None = None) -> Expression:
    """The same, with each gen's thoughts not in the text, but in a variable `name` + `_reasoning_content`.

    model_type: how the model marks them, by the names of SGLang's reasoning parsers. Raises ValueError.
    """
    kind = check_type(model_type)
    parts = () if expression is None else parts_of(expression)
    return joined(replace(part, reasoning=kind) if isinstance(part, Gen) else part for part in parts)


def image(path: str | Path | bytes) -> Expression:
    """A picture, in a turn: a file's, which is read now, or its bytes; or an address (data:, http:, https:).

    Raises OSError, and ValueError for a file whose name doesn't say what it is.
    """
    if isinstance(path, bytes):
        return Image(_data_url(path, "image/png"))
    if str(path).startswith(("data:", "http://", "https://")):
        return Image(str(path))
    kind = mimetypes.guess_type(str(path))[0] or ""
    if not kind.startswith("image/"):
        raise ValueError(f"image: the name of {str(path)!r} ends as no image's does, such as .png or .jpg")
    return Image(_data_url(Path(path).read_bytes(), kind))


def _data_url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def video(path: str, num_frames: int) -> Expression:
    """Raises NotImplementedError."""
    raise NotImplementedError(f"video({path!r}, {num_frames}): octavo's server takes no videos; leave it out")


def flush_cache(backend: AnyBackend | None = None) -> None:
    """Let the server forget all prefixes that no running request holds."""
    _endpoint(backend, "flush_cache").flush_cache()


def get_server_info(backend: AnyBackend | None = None) -> dict[str, Any]:
    """What the server says of itself."""
    return _endpoint(backend, "get_server_info").get_server_info()


def _endpoint(backend: AnyBackend | None, asked: str) -> RuntimeEndpoint:
    found = chosen(backend)
    if not isinstance(found, RuntimeEndpoint):
        raise TypeError(f"{asked}: {type(found).__name__} is no RuntimeEndpoint, which alone has it")
    return found


def _turn(role: str, expression: Expression | str | None) -> Joined:
    parts = () if expression is None else parts_of(expression)
    return Joined((RoleBegin(role), *parts, RoleEnd(role)))
