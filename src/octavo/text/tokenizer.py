"""Text to token ids and back, with the `tokenizers` library alone: no torch and no transformers at start.

tokenizer.json is used as it stands, and where there is none, MarianMT's own files are (marian.py);
tokenizer_config.json adds the named special tokens, add_bos_token and add_eos_token, with the meaning that
transformers 5 gives them. `token_bytes` returns the exact bytes that one token stands for; the incremental detokenizer
and the `bytes` of a logprob are built from it.
"""

from __future__ import annotations

import base64
import functools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Backend

from octavo.quant.model_files import ANEW, CheckpointError, check_regular, read_object_if_any
from octavo.quant.printable import shown
from octavo.text.charsmap import CharsMapError, check_charsmap
from octavo.text.marian import TwoLanguages, is_marian, read_marian
from octavo.text.sentencepiece_file import SentencePieceError

logger = logging.getLogger(__name__)

ADDED_TOKEN_KEYS = {"content": str, "single_word": bool, "lstrip": bool, "rstrip": bool, "normalized": bool}
ADDED_TOKEN_KEYS |= {"special": bool}
NAMED_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerError(ValueError):
    """The checkpoint's tokenizer is missing or broken, or is of a kind that can't be decoded token by token."""


class _ConfigError(ValueError):
    """A bad value in tokenizer_config.json; `Tokenizer.open` adds the file's name."""


class EncodingError(ValueError):
    """The tokenizer can't encode this text; the message says why."""


@dataclass(frozen=True)
class DecodeRules:
    """How a token's string becomes bytes, and what is dropped at the beginning of a text.

    byte_level     each character is one byte, in GPT-2's alphabet
    byte_fallback  a token `<0xE2>` is that byte
    replacements   (from, to) within a token
    strip_left     how many leading spaces of the whole text are dropped
    continuation   what a token begins with that goes on a word (WordPiece); each other one begins with a space. Spaces
                   that WordPiece leaves out before punctuation are not: only whole texts are told of encoders
    """

    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    strip_left: int = 0
    continuation: str = ""

    @classmethod
    def of(cls, backend: Backend) -> DecodeRules:
        """Read the rules from the tokenizer's decoder. Raises TokenizerError for an unknown kind."""
        if backend.decoder is None:
            raise TokenizerError("tokenizer.json has no decoder, so token ids can't be turned into text")
        state = json.loads(backend.decoder.__getstate__())
        byte_level = byte_fallback = False
        replacements: list[tuple[str, str]] = []
        strip_left = 0
        continuation = ""
        for part in state["decoders"] if state["type"] == "Sequence" else [state]:
            match part:
                case {"type": "ByteLevel"}:
                    byte_level = True
                case {"type": "ByteFallback"}:
                    byte_fallback = True
                case {"type": "Fuse"}:
                    pass
                case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                    replacements.append((old, new))
                case {"type": "Strip", "content": " ", "start": int(start), "stop": 0}:
                    strip_left = start
                case {"type": "WordPiece", "prefix": str(continuation)} if continuation:
                    strip_left = 1
                case {"type": "Metaspace", "replacement": str(old)}:
                    replacements.append((old, " "))
                    strip_left = 0 if part.get("prepend_scheme") == "never" else 1
                case _:
                    raise TokenizerError(
                        f"tokenizer.json: decoder {shown(part)} is not supported; ByteLevel, ByteFallback, Fuse, "
                        "Metaspace, Replace of a string, Strip of leading spaces and WordPiece are"
                    )
        return cls(byte_level, byte_fallback, tuple(replacements), strip_left, continuation)


class Tokenizer:
    """A tokenizer with its named special tokens. `config` is tokenizer_config.json as read.

    languages: what turns texts into ids, where that isn't the backend.
    """

    def __init__(self, backend: Backend, config: dict[str, Any], languages: TwoLanguages | None = None) -> None:
        _check_charsmaps(backend)
        backend.no_truncation()
        backend.no_padding()
        self.config = config
        self.special_tokens = {name: text for name in NAMED_SPECIAL_TOKENS if (text := _content(config.get(name)))}
        self._backend = backend
        self._languages = languages
        self._add_missing_tokens()
        self._set_bos_and_eos()
        self._rules = DecodeRules.of(backend)
        self._bytes: dict[int, bytes] = {}
        self.special_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        vocabulary = backend.get_vocab()
        if not backend.get_vocab_size(with_added_tokens=False):
            raise TokenizerError("tokenizer.json has no tokens in its vocabulary")
        self.num_tokens: int = max(vocabulary.values()) + 1  # ids run from 0; some may be unused
        self.max_token_bytes = self._max_token_bytes(vocabulary)

    @classmethod
    def open(cls, directory: Path, *, trust_remote_code: bool = False) -> Tokenizer:
        """Read a checkpoint's tokenizer. Raises TokenizerError when there is none that can be used, and
        CheckpointError for a tokenizer_config.json that can't be read.
        """
        if not directory.is_dir():
            raise TokenizerError(f"{directory}: no such directory, so no tokenizer")
        config_file = directory / "tokenizer_config.json"
        config = read_object_if_any(config_file)
        backend = _backend_from_file(directory / "tokenizer.json")
        languages = None
        if backend is None and is_marian(directory):
            try:
                backend, languages, config = read_marian(directory, config)
            except SentencePieceError as error:
                raise TokenizerError(f"{directory}: {error}") from None
        if backend is None:
            logger.warning(
                "no tokenizer.json in %s: transformers converts its tokenizer, which is slow to start", directory
            )
            backend = _backend_from_transformers(directory, trust_remote_code)
        try:
            _check_config(config)
            return cls(backend, config, languages)
        except _ConfigError as error:
            raise TokenizerError(f"{config_file}: {error}") from None
        except TokenizerError as error:
            raise TokenizerError(f"{directory}: {error}") from None

    @property
    def strip_left(self) -> int:
        """How many leading spaces of a decoded text are not part of it (sentencepiece's dummy prefix)."""
        return self._rules.strip_left

    @property
    def eos_id(self) -> int | None:
        """The id of the end-of-sequence token, or None when there is none."""
        return self.token_id(self.special_tokens.get("eos_token"))

    def token_id(self, token: str | None) -> int | None:
        """The id of one token's string, or None."""
        return None if token is None else self._backend.token_to_id(token)

    def encode(self, text: str, *, add_special_tokens: bool = True, is_answer: bool = False) -> list[int]:
        """Token ids of a text. Special tokens spelled out in the text become special tokens, as in transformers.

        is_answer: it is what the model writes, which may be in another language than what it reads.
        Raises EncodingError.
        """
        try:
            if self._languages is not None:
                return self._languages.encode(text, add_special_tokens=add_special_tokens, is_answer=is_answer)
            # of the library's methods only this one releases the GIL; `encode` would stop every other stream
            ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except (UnicodeEncodeError, TypeError):  # which one depends on the version of tokenizers
            raise EncodingError("half a surrogate pair is not text") from None
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            # a Rust panic, which is not an Exception: one of the tokenizer's patterns has reached its limit of steps
            raise EncodingError(f"the tokenizer gives up on this text: {_first_line(error)}") from None
        return ids

    @functools.cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """The special tokens before and behind a text."""
        plain = self.encode("a", add_special_tokens=False)
        (before, behind) = _around([plain], self.encode("a"))
        return before, behind

    @functools.cached_property
    def pair_frame(self) -> tuple[list[int], list[int], list[int]]:
        """The special tokens before, between and behind two texts that are read together."""
        plain = self.encode("a", add_special_tokens=False)
        before, between, behind = _around([plain, plain], self._backend.encode("a", "a").ids)
        return before, between, behind

    @functools.cached_property
    def pairs_have_types(self) -> bool:
        """Whether the tokens of the second of two texts have another type than those of the first."""
        return any(self._backend.encode("a", "a").type_ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The whole text of these ids, as transformers decodes it. Unused ids give no text."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def to_json(self) -> str:
        """The tokenizer as tokenizer.json has it, with all of its tokens."""
        text: str = self._backend.to_str()
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that this token adds to a text; none for an unused id."""
        known = self._bytes.get(token_id)
        if known is None:
            token = self._backend.id_to_token(token_id)
            known = self._bytes[token_id] = b"" if token is None else self._to_bytes(token)
        return known

    def token_name(self, token_id: int) -> str:
        """The vocabulary's own string for a token, such as `Ġis`; empty for an unused id."""
        return self._backend.id_to_token(token_id) or ""

    def token_text(self, token_id: int) -> str:
        """A name for one token: its text, or `bytes:\\xe2\\x82` if it isn't whole characters (OpenAI's notation)."""
        raw = self.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _to_bytes(self, token: str) -> bytes:
        rules = self._rules
        if rules.byte_level:
            try:
                return bytes(_BYTE_OF_CHARACTER[character] for character in token)
            except KeyError:  # an added token with characters outside the alphabet stands for itself
                return token.encode()
        if rules.byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass  # it only looks like a byte token
        for old, new in rules.replacements:
            token = token.replace(old, new)
        if rules.continuation:
            token = token.removeprefix(rules.continuation) if token.startswith(rules.continuation) else f" {token}"
        return token.encode()

    def _max_token_bytes(self, vocabulary: dict[str, int]) -> int | None:
        """The most bytes of a text that one token can stand for; None if there is no such limit.

        There is a limit if every byte of a text ends up in a token: with BPE over all 256 bytes, and no step before it
        that drops text. NFC writes at most three bytes as one.
        """
        alphabet = _BYTE_OF_CHARACTER if self._rules.byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
        if type(self._backend.model).__name__ != "BPE" or not all(byte in vocabulary for byte in alphabet):
            return None
        if any(token.lstrip or token.rstrip for token in self._backend.get_added_tokens_decoder().values()):
            return None  # such a token swallows all whitespace next to it
        normalizers = _steps(self._backend.normalizer, "normalizers")
        if not all(map(_keeps_text, [*normalizers, *_steps(self._backend.pre_tokenizer, "pretokenizers")])):
            return None
        longest = max(map(len, vocabulary))  # in characters, of which each is four bytes at most
        sizes = [len(self._to_bytes(token)) for token in vocabulary if 4 * len(token) >= longest]
        return max(4, *sizes) * (3 if any(step["type"] == "NFC" for step in normalizers) else 1)

    def _add_missing_tokens(self) -> None:
        """Add the tokens that only tokenizer_config.json names, as in old checkpoints."""
        known = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        listed = sorted((self.config.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0]))
        tokens = [
            AddedToken(**{key: value for key, value in token.items() if key in ADDED_TOKEN_KEYS}) for _, token in listed
        ]
        tokens += [AddedToken(text, special=True, normalized=False) for text in self.special_tokens.values()]
        for token in tokens:
            if token.content not in known:
                known.add(token.content)
                self._backend.add_tokens([token])

    def _set_bos_and_eos(self) -> None:
        """Let tokenizer_config.json's add_bos_token and add_eos_token, if either is there, replace tokenizer.json's."""
        if "add_bos_token" not in self.config and "add_eos_token" not in self.config:
            return
        names = {
            side: self.special_tokens.get(f"{side}_token") if self.config.get(f"add_{side}_token") else None
            for side in ("bos", "eos")
        }
        bos = names["bos"]
        eos = names["eos"]
        for token in (bos, eos):
            if token is not None and token.startswith("$"):
                raise _ConfigError(f"{shown(token)} can't begin or end a text: in a template `$` stands for the text")
        try:
            self._backend.post_processor = processors.TemplateProcessing(
                single=[*([bos] if bos else []), "$A", *([eos] if eos else [])],
                special_tokens=[(token, self.token_id(token)) for token in {bos, eos} if token],
            )
        except Exception as error:  # the library raises nothing narrower
            raise _ConfigError(f"bos_token {shown(bos)} and eos_token {shown(eos)} make no template: {error}") from None


def _around(texts: list[list[int]], ids: list[int]) -> list[list[int]]:
    """What stands before, between and behind texts, which are all in ids, in this order."""
    found = []
    begin = 0
    for text in texts:
        place = next((i for i in range(begin, len(ids)) if ids[i : i + len(text)] == text), None)
        if place is None:
            raise TokenizerError("the tokenizer changes a text's tokens where special tokens stand around it")
        found.append(ids[begin:place])
        begin = place + len(text)
    return [*found, ids[begin:]]


def _steps(part: Any, name: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, as tokenizer.json writes them."""
    if part is None:
        return []
    state = json.loads(part.__getstate__())
    steps: list[dict[str, Any]] = state[name] if state["type"] == "Sequence" else [state]
    return steps


def _check_charsmaps(backend: Backend) -> None:
    """Raise TokenizerError for a damaged map, by which the library would panic at some texts."""
    for step in _steps(backend.normalizer, "normalizers"):
        if step["type"] == "Precompiled":
            try:
                check_charsmap(base64.b64decode(step["precompiled_charsmap"]))
            except CharsMapError as error:
                raise TokenizerError(f"tokenizer.json: its map of characters is damaged: {error}; {ANEW}") from None


def _keeps_text(step: dict[str, Any]) -> bool:
    """Whether a step before the model is known to drop no text."""
    match step:
        case {"type": "NFC" | "Prepend" | "ByteLevel" | "Metaspace" | "Digits"}:
            return True
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
            return len(new.encode()) >= len(old.encode())
        case {"type": "Split", "behavior": behavior}:
            return bool(behavior != "Removed")
    return False


def _content(token: object) -> str | None:
    """A special token's string. Configs hold the string itself, or an object with flags."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _check_config(config: dict[str, Any]) -> None:
    """Raise _ConfigError for a value of the wrong type among those that are read here."""
    for name in NAMED_SPECIAL_TOKENS:
        token = config.get(name)
        if token is not None and _content(token) is None:
            raise _ConfigError(f"{name} is {shown(token)}; a string, an object with a string as content, or null works")
    for name in ("add_bos_token", "add_eos_token"):
        if not isinstance(config.get(name), bool | None):
            raise _ConfigError(f"{name} is {shown(config[name])}; true, false or null works")
    listed = config.get("added_tokens_decoder")
    if not isinstance(listed, dict | None):
        raise _ConfigError(f"added_tokens_decoder is {shown(listed)}; an object of ids and tokens works")
    for token_id, token in (listed or {}).items():
        if not (token_id.isdecimal() and token_id.isascii() and len(token_id) < 11):
            raise _ConfigError(f"added_tokens_decoder has the id {shown(token_id)}; a number from 0 works")
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise _ConfigError(
                f"added_tokens_decoder: token {token_id} is {shown(token)}; an object with a string as content works"
            )
        for key, kind in ADDED_TOKEN_KEYS.items():
            if not isinstance(token.get(key, kind()), kind):
                raise _ConfigError(
                    f"added_tokens_decoder: {key} of token {token_id} is {shown(token[key])}; true or false works"
                )


def _backend_from_file(file: Path) -> Backend | None:
    """The tokenizer in a tokenizer.json; None if there is no such file. Raises TokenizerError if it is broken."""
    try:
        check_regular(file)
        return Backend.from_file(str(file))
    except FileNotFoundError:
        return None
    except CheckpointError as error:
        raise TokenizerError(str(error)) from None
    except BaseException as error:  # the library's errors are bare Exceptions, and Rust's panics not even that
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise TokenizerError(f"{file} is not a tokenizer.json: {_first_line(error)}; {ANEW}") from None


def _backend_from_transformers(directory: Path, trust_remote_code: bool) -> Backend:
    from transformers import AutoTokenizer  # slow, and may import torch: only for checkpoints without tokenizer.json

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=trust_remote_code)
    except Exception as error:
        raise TokenizerError(
            f"{directory}: no tokenizer.json, and transformers can't read its tokenizer: {_first_line(error)}"
        ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Backend):
        raise TokenizerError(
            f"{directory}: {type(tokenizer).__name__} is a tokenizer in Python, without a tokenizer.json; save a fast "
            "one into the directory with transformers first"
        )
    return backend


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's bijection of characters and bytes: printable bytes are themselves, the others are shifted to 256 up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()
