"""Drafts out of a request's own text and of finished answers: what followed where its last tokens stood (suffixes).

As suffix decoding (arXiv 2411.04975) has it, with the last places of each run of tokens in place of a tree of counts:
the places of the longest match say by their majority what follows, as far as it is likely enough, and the longer the
match, the further.
"""

from __future__ import annotations

from collections import OrderedDict

from octavo.runtime.scheduling.sequence import Sequence
from octavo.runtime.speculation.config import SpeculativeConfig
from octavo.runtime.speculation.ngram import LONG_RUN, following, run_sizes
from octavo.runtime.speculation.ngrams import SEPARATOR, NgramIndex, match_length

MOST_PLACES = 4  # the last ones in each text that are compared for the longest match, and that vote
MOST_TOKENS = 1 << 18  # of finished answers, of all owners: some 64 MB
MOST_OWNERS = 256  # whose answers are kept

Owner = tuple[str, str]  # and the cache's salt


class SuffixDrafter:
    """Makes drafts for each sequence out of its own text, and of the answers that its owner has had before.

    Drafts show in the time that an answer takes, so that an owner could find out what others were told. shares: owners
    don't mind; salts keep requests apart in any case.
    """

    def __init__(self, config: SpeculativeConfig, *, shares: bool = False) -> None:
        self._config = config
        self._shares = shares
        self._answers = Answers(config.suffix_decoding_max_cached_requests)

    def begin(self, sequence: Sequence) -> SuffixText:
        """What follows one sequence."""
        owner = ("" if self._shares else sequence.owner, sequence.cache_salt)
        return SuffixText(self._config, self._answers, owner, sequence.num_prompt)


class Answers:
    """Finished answers by owner; where there are too many, older ones go, of whoever has asked for nothing longest."""

    def __init__(self, most: int, most_tokens: int = MOST_TOKENS) -> None:
        self._most = most
        self._most_tokens = most_tokens
        self._of: OrderedDict[Owner, _Generations] = OrderedDict()

    @property
    def num_tokens(self) -> int:
        """Of all that is kept."""
        return sum(kept.num_tokens for kept in self._of.values())

    def of(self, owner: Owner) -> tuple[NgramIndex, ...]:
        """The texts in which this owner's answers stand, one behind another."""
        kept = self._of.get(owner)
        return () if kept is None else (kept.young, kept.old)

    def add(self, owner: Owner, answer: list[int]) -> None:
        """Keep one more."""
        if not self._most or len(answer) > self._most_tokens // 2:
            return
        kept = self._of.setdefault(owner, _Generations())
        self._of.move_to_end(owner)
        kept.young.extend([*answer, SEPARATOR])
        kept.num_young += 1
        if kept.num_young > self._most // 2 or len(kept.young.tokens) > self._most_tokens // 2:
            kept.turn()
        while len(self._of) > MOST_OWNERS or self.num_tokens > self._most_tokens:
            first = next(iter(self._of))
            self._of[first].turn()
            if not self._of[first].num_tokens:
                del self._of[first]


class _Generations:
    """Answers in two texts, of which the older one goes as a whole: nothing is ever taken out of an index."""

    def __init__(self) -> None:
        self.young = NgramIndex(LONG_RUN)
        self.old = NgramIndex(LONG_RUN)
        self.num_young = 0

    @property
    def num_tokens(self) -> int:
        return len(self.young.tokens) + len(self.old.tokens)

    def turn(self) -> None:
        self.old = self.young
        self.young = NgramIndex(LONG_RUN)
        self.num_young = 0


class SuffixText:
    """A prompt and its answer, as far as it has been read.

    The places of the longest match stay as long as the text goes on as it does there, as no other one would be longer.
    They are looked up when none is left. kind: how long the match is; 0: there is none.
    """

    def __init__(self, config: SpeculativeConfig, answers: Answers, owner: Owner, num_prompt: int) -> None:
        self._config = config
        self._answers = answers
        self._owner = owner
        self._num_prompt = num_prompt
        self._index = NgramIndex(*run_sizes(1))
        self._places: list[tuple[list[int], int]] = []  # texts, and where the match ends in each
        self.kind = 0

    def read(self, new: list[int]) -> None:
        """Take the next tokens."""
        self._index.extend(new)
        count = len(new)
        self._places = [(text, at + count) for text, at in self._places if text[at : at + count] == new]
        self.kind = min(self.kind + count, self._config.suffix_decoding_max_tree_depth)

    def drafts(self) -> list[int]:
        """What may follow; nothing where nothing matches."""
        if not self._places:
            self._look_up()
        if not self._places:
            return []
        count = int(self.kind * self._config.suffix_decoding_max_spec_factor)
        count = min(count, self._config.num_speculative_tokens)
        voices = [_until_end(following(text, at, count)) for text, at in self._places]
        if len(voices) == 1 or all(voice == voices[0] for voice in voices):
            return voices[0]
        return _majority(voices, self._config.suffix_decoding_min_token_prob)

    def end(self) -> None:
        """The answer is complete, and of use for others."""
        self._answers.add(self._owner, self._index.tokens[self._num_prompt :])

    def _look_up(self) -> None:
        own = self._index.tokens
        depth = self._config.suffix_decoding_max_tree_depth
        found = [(own, at) for at in self._index.earlier(MOST_PLACES)]
        for index in self._answers.of(self._owner):
            found += [(index.tokens, at) for at in index.ends(own, MOST_PLACES)]
        lengths = [match_length(text, at, own, len(own), depth) for text, at in found]
        self.kind = max(lengths, default=0)
        self._places = [place for place, length in zip(found, lengths, strict=True) if length == self.kind]


def _until_end(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(SEPARATOR)] if SEPARATOR in tokens else tokens


def _majority(voices: list[list[int]], least: float) -> list[int]:
    """Token by token what most of those say who have been right so far, as long as that is likely enough."""
    found: list[int] = []
    chance = 1.0
    while len(voices) > 1:
        place = len(found)
        said: dict[int, list[list[int]]] = {}
        for voice in voices:
            if len(voice) > place:
                said.setdefault(voice[place], []).append(voice)
        if not said:
            return found
        token = max(said, key=lambda each: len(said[each]))
        chance *= len(said[token]) / len(voices)
        if chance < least:
            return found
        voices = said[token]
        found.append(token)
    return voices[0]
