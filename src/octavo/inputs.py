"""Prompts as `octavo.LLM` and `octavo.AsyncLLM` take them, by vLLM's names: text, token ids, a dictionary of either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NotRequired, TypedDict, TypeGuard

KNOWN = ("prompt", "prompt_token_ids", "cache_salt", "multi_modal_data")
OF_BOTH = ("encoder_prompt", "decoder_prompt")


class TextPrompt(TypedDict):
    """A prompt as text. cache_salt: only prompts with the same one share cached prefixes.

    multi_modal_data: {"image": a PIL.Image.Image, or several}, for the placeholders that the text has, one for each.
    """

    prompt: str
    multi_modal_data: NotRequired[Mapping[str, Any]]
    cache_salt: NotRequired[str]


class TokensPrompt(TypedDict):
    """A prompt as token ids. prompt: its text, to be told in the output.

    multi_modal_data: as in TextPrompt, for placeholders among the ids: one for each image, or as many as it becomes.
    """

    prompt_token_ids: list[int]
    prompt: NotRequired[str]
    multi_modal_data: NotRequired[Mapping[str, Any]]
    cache_salt: NotRequired[str]


class ExplicitEncoderDecoderPrompt(TypedDict):
    """What an encoder-decoder's encoder reads, and what its decoder begins with; None: with what the model says."""

    encoder_prompt: str | list[int] | TextPrompt | TokensPrompt
    decoder_prompt: NotRequired[str | list[int] | TextPrompt | TokensPrompt | None]


PromptType = str | list[int] | TextPrompt | TokensPrompt | ExplicitEncoderDecoderPrompt


@dataclass(frozen=True, slots=True)
class Given:
    """One prompt: a text, or token ids and perhaps their text. images: as Pillow has them.

    names_encoder: it is said to be for an encoder. decoder: what its decoder begins with then; None: nothing is said.
    """

    text: str | None = None
    token_ids: list[int] | None = None
    cache_salt: str | None = None
    images: tuple[Any, ...] = ()
    names_encoder: bool = False
    decoder: Given | None = None


def prompts_of(prompts: object) -> list[Given]:
    """One prompt, or each of several. Raises ValueError, which names the place, for what is none."""
    if isinstance(prompts, str | Mapping) or (_is_list(prompts) and len(prompts) and _is_id(prompts[0])):
        return [_prompt_of(prompts, "prompts")]
    if not _is_list(prompts):
        raise ValueError(f"prompts: {type(prompts).__name__} is no prompt; a string, token ids or a dictionary is")
    return [_prompt_of(prompt, f"prompts[{number}]") for number, prompt in enumerate(prompts)]


def _prompt_of(prompt: Any, place: str) -> Given:
    if isinstance(prompt, str):
        return Given(prompt)
    if _is_list(prompt):
        return Given(token_ids=_token_ids(prompt, place))
    if not isinstance(prompt, Mapping):
        raise ValueError(f"{place}: {type(prompt).__name__} is no prompt; a string, token ids or a dictionary is")
    given = {key: value for key, value in prompt.items() if value not in (None, {})}
    if "encoder_prompt" in given:
        return _prompt_of_both(given, place)
    unknown = next((key for key in given if key not in KNOWN), None)
    if unknown is not None:
        raise ValueError(f"{place}: octavo does not support {unknown!r}; {', '.join(KNOWN)} work")
    for name in ("prompt", "cache_salt"):
        if not isinstance(given.get(name, ""), str):
            raise ValueError(f"{place}: {name!r} must be a string")
    token_ids = given.get("prompt_token_ids")
    if token_ids is None and "prompt" not in given:
        raise ValueError(f"{place}: a dictionary needs 'prompt' or 'prompt_token_ids'")
    if token_ids is not None:
        token_ids = _token_ids(token_ids, place)
    images = _images_of(given.get("multi_modal_data") or {}, place)
    return Given(given.get("prompt"), token_ids, given.get("cache_salt"), images)


def _images_of(data: Any, place: str) -> tuple[Any, ...]:
    """One image or several, whatever they are."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{place}: 'multi_modal_data' must be a dictionary, such as {{'image': a PIL.Image.Image}}")
    wanted = {key: value for key, value in data.items() if value is not None and not (_is_list(value) and not value)}
    if unknown := next((key for key in wanted if key != "image"), None):
        raise ValueError(f"{place}: multi_modal_data has {unknown!r}, and 'image' alone is read")
    images = wanted.get("image", ())
    return tuple(images) if _is_list(images) else (images,)


def _prompt_of_both(given: Mapping[str, Any], place: str) -> Given:
    unknown = next((key for key in given if key not in OF_BOTH), None)
    if unknown is not None:
        raise ValueError(
            f"{place}: octavo does not support {unknown!r} beside 'encoder_prompt'; 'decoder_prompt' works"
        )
    encoder, decoder = (
        None if given.get(key) is None else _prompt_of(given[key], f"{place}[{key!r}]") for key in OF_BOTH
    )
    assert encoder is not None
    if encoder.names_encoder or (decoder is not None and decoder.names_encoder):
        raise ValueError(f"{place}: a prompt in 'encoder_prompt' or 'decoder_prompt' has none of these itself")
    if decoder is not None and decoder.images:
        raise ValueError(f"{place}['decoder_prompt']: a decoder's beginning has no images")
    return replace(encoder, names_encoder=True, decoder=decoder)


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_id(value: object) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _token_ids(ids: Any, place: str) -> list[int]:
    """As a list of Python's own integers, whatever kind of integers they are."""
    if not _is_list(ids) or not all(map(_is_id, ids)):
        raise ValueError(f"{place}: token ids are a list of integers")
    found = [token.__index__() for token in ids]
    if found and min(found) < 0:
        raise ValueError(f"{place}: {min(found)} is no token id")
    return found
