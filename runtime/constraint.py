"""Grammars of constrained answers, compiled beside the step loop; runtime/following.py follows them token by token.

A grammar is llguidance's. What is forced by it is tokenized as the model would write it, so the vocabulary comes with
the tokenizer. All of it crosses from the server once, as a `Vocabulary`; compiling is done in one thread, and a request
whose grammar isn't ready yet is passed over by the scheduler meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

from octavo.runtime.messages import Vocabulary

if TYPE_CHECKING:  # imported where it is used: a start must not wait for it
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MAX_COMPILED = 256  # grammars that are kept; one takes some 100 KB
MAX_GRAMMAR = 100_000  # symbols. Limits are in fuel and not in time, so that a verdict is the same on every machine
LEXER_FUEL = 100_000  # of a grammar's first mask; llguidance's own million is seconds, in which nobody gets a token
FAILED = "the answer's grammar"  # how an engine's error about a grammar begins: the server puts the field in front
_MARK = "\x02"  # in front of a text whose tokenizer would put a space there


class GrammarError(ValueError):
    """A grammar that is refused, or that has become too complex to go on with."""


class Grammar(NamedTuple):
    """A compiled grammar at its beginning, the model's own end tokens, and the bytes of all tokens.

    matcher: None for an answer of which only the reasoning has a limit. spaces: the tokens of nothing but whitespace.
    """

    matcher: LLMatcher | None
    end_ids: list[int]
    tokens: Sequence[bytes]
    spaces: Sequence[int] = ()


class Compiled(NamedTuple):
    """What became of one request's grammar: `error` says why there is none."""

    request_id: str
    grammar: Grammar | None
    error: str = ""


class Grammars:
    """The grammars of one engine.

    ready  a file descriptor: readable when `finished` has something to give
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self.ready, self._bell = os.pipe()
        os.set_blocking(self.ready, False)
        weakref.finalize(self, _close, self.ready, self._bell)
        self._finished: SimpleQueue[Compiled] = SimpleQueue()
        self._prototypes: OrderedDict[str, Grammar] = OrderedDict()
        self._vocabulary: Vocabulary | None = None
        self._spaces: list[int] = []
        self._tokenizer: LLTokenizer | None = None
        self._num_compiling = 0
        self._thread = ThreadPoolExecutor(1, "octavo-grammars")

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Take the server's tokens; what is asked to be compiled afterwards is compiled with them.

        They are only kept: the first grammar makes llguidance's form of them, which many engines never need, and in
        which up to half a second passes at a time without another thread's Python.
        """
        self._vocabulary = vocabulary
        self._tokenizer = None

    def without_rules(self) -> Grammar:
        """What stands for the grammar of a request that has none: the tokens alone."""
        return Grammar(None, [], () if self._vocabulary is None else self._vocabulary.tokens)

    def compile(self, request_id: str, text: str) -> None:
        """Begin to compile a request's grammar; it comes out of `finished`."""
        self._num_compiling += 1
        self._thread.submit(self._compile, request_id, text)

    def finished(self) -> list[Compiled]:
        """What has been compiled since the last call."""
        found: list[Compiled] = []
        if self._num_compiling:  # asked in every step, for most of which there is no system call then
            with contextlib.suppress(BlockingIOError):
                found += [self._finished.get() for _ in os.read(self.ready, MAX_COMPILED)]
            self._num_compiling -= len(found)
        return found

    def _compile(self, request_id: str, text: str) -> None:
        try:
            self._finished.put(Compiled(request_id, self._prototype(text)))
        except Exception as error:  # whatever it is, the request waits for an answer
            self._finished.put(Compiled(request_id, None, str(error)))
        os.write(self._bell, b".")

    def _prototype(self, text: str) -> Grammar:
        prototype = self._prototypes.pop(text, None)
        if prototype is None:
            if self._vocabulary is None:
                raise GrammarError("the engine has no vocabulary to compile it with")
            tokens = self._vocabulary.tokens
            if self._tokenizer is None:
                self._tokenizer = ll_tokenizer(self._vocabulary, self._vocab_size)
                self._spaces = [i for i, token in enumerate(tokens[: self._vocab_size]) if token.isspace()]
            prototype = compiled(self._tokenizer, text, tokens)._replace(spaces=self._spaces)
        self._prototypes[text] = prototype
        if len(self._prototypes) > MAX_COMPILED:
            self._prototypes.popitem(last=False)
        return prototype


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def compiled(tokenizer: LLTokenizer, text: str, tokens: Sequence[bytes]) -> Grammar:
    """Raises GrammarError."""
    from llguidance import LLMatcher

    matcher = LLMatcher(tokenizer, text, log_level=0, limits=parser_limits())
    if matcher.is_error():
        raise GrammarError(first_line(matcher.get_error()))
    return Grammar(matcher, tokenizer.eos_tokens, tokens)


def parser_limits() -> LLParserLimits:
    """How large a grammar may be, wherever one is compiled."""
    from llguidance import LLParserLimits

    return LLParserLimits(max_grammar_size=MAX_GRAMMAR, initial_lexer_fuel=LEXER_FUEL)


def ll_tokenizer(vocabulary: Vocabulary, vocab_size: int) -> LLTokenizer:
    """llguidance's own form of a vocabulary: a trie of all tokens, in 0.1 to 1.3 seconds of one core.

    Ids beyond the tokenizer's, as in padded heads, are no tokens; tokens beyond the head can't come.
    """
    from llguidance import LLTokenizer, TokenizerWrapper

    end_ids = [token_id for token_id in vocabulary.end_ids if token_id < vocab_size]
    if not end_ids:
        raise GrammarError("the model has no end token, which a grammar's end needs")
    tokens = [*vocabulary.tokens[:vocab_size], *[b""] * (vocab_size - len(vocabulary.tokens))]
    return LLTokenizer(
        TokenizerWrapper(_Canonical(vocabulary, tokens, end_ids[0])), n_vocab=vocab_size, eos_token=end_ids
    )


class _Canonical:
    """What llguidance asks of a tokenizer: the tokens' bytes, and how the model would write a text."""

    def __init__(self, vocabulary: Vocabulary, tokens: list[bytes], end_id: int) -> None:
        from tokenizers import Tokenizer as Backend

        self.tokens = tokens
        self.special_token_ids = [token_id for token_id in vocabulary.special_ids if token_id < len(tokens)]
        self.eos_token_id = end_id
        self.bos_token_id = None
        self._backend = Backend.from_str(vocabulary.tokenizer)
        self._mark = self._ids(_MARK)

    def __call__(self, text: str) -> list[int]:
        ids = self._ids(_MARK + text)
        return ids[len(self._mark) :] if ids[: len(self._mark)] == self._mark else self._ids(text)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids


def first_line(text: str) -> str:
    """What llguidance says, without the grammar and the backtrace that follow."""
    return text.strip().partition("\n")[0][:300]
