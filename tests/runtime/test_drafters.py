"""Who makes drafts: what is found in a text, against a search through all of it; and how many drafts pay."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from toy_model import make_request

from octavo.runtime.scheduling.kv_groups import BlockTables
from octavo.runtime.scheduling.sequence import Sequence
from octavo.runtime.speculation.config import SpeculativeConfig, make_speculative, parse_speculative
from octavo.runtime.speculation.costs import GAIN, StepCosts
from octavo.runtime.speculation.ngram import OwnText, following
from octavo.runtime.speculation.ngrams import SEPARATOR, NgramIndex, match_length
from octavo.runtime.speculation.suffix import Answers, SuffixDrafter, SuffixText


def in_pieces(rng: random.Random, tokens: list[int]) -> list[list[int]]:
    pieces = []
    while tokens:
        count = rng.choice([1, 1, 1, 2, 5, 40])
        pieces.append(tokens[:count])
        tokens = tokens[count:]
    return pieces


def longest_match(text: list[int], least: int, longest: int) -> int:
    """The length of the longest run at the text's end that has stood before; 0 below `least`."""
    for length in range(min(longest, len(text) - 1), least - 1, -1):
        end = text[-length:]
        if any(text[at : at + length] == end for at in range(len(text) - length)):
            return length
    return 0


@pytest.mark.parametrize("seed", range(10))
def test_an_index_knows_all_places_of_a_run(seed: int) -> None:
    rng = random.Random(seed)
    sizes = rng.sample(range(1, 6), rng.randrange(1, 4))
    text = [rng.choice([0, 1, 2, SEPARATOR - 1]) for _ in range(200)]
    index = NgramIndex(*sizes)
    for piece in in_pieces(rng, text):
        index.extend(piece)
        known = index.tokens
        assert known == text[: len(known)]
        size = max((size for size in sizes if longest_match(known, size, size)), default=0)
        end = known[len(known) - size :]
        places = [at + size for at in range(len(known) - size) if size and known[at : at + size] == end]
        assert index.earlier(1000) == places[::-1]
        assert index.earlier(2) == places[::-1][:2]
        if len(known) >= max(sizes):
            assert index.ends(known, 1) == [len(known)]
    assert index.ends([5] * 5, 10) == []


@pytest.mark.parametrize("seed", range(10))
def test_own_drafts_follow_a_longest_match(seed: int) -> None:
    rng = random.Random(seed)
    least = rng.randrange(1, 5)
    longest = least + rng.randrange(5)
    text = OwnText(4, least, longest)
    assert text.kind == 0
    said: list[int] = []
    found = 0
    tokens = [rng.randrange(30) for _ in range(60)]
    for piece in in_pieces(rng, [*tokens, *tokens[5:40], *[1] * 20, *tokens]):
        text.read(piece)
        said += piece
        drafts = text.drafts()
        length = longest_match(said, least, longest)
        assert bool(drafts) == (length > 0)
        assert bool(text.kind) == bool(drafts)
        if drafts:
            found += 1
            assert len(drafts) == 4
            ends = [at for at in range(length, len(said)) if said[at - length : at] == said[-length:]]
            assert drafts in [following(said, at, 4) for at in ends]
    assert found


def test_a_text_that_repeats_itself_goes_on_so() -> None:
    text = OwnText(7, 3, 32)
    text.read([9, 1, 2, 1, 2, 1, 2])
    assert text.drafts() == [1, 2, 1, 2, 1, 2, 1]


def suffix(answers: Answers, owner: str = "", num_prompt: int = 0, **keys: Any) -> SuffixText:
    given = {"suffix_decoding_max_spec_factor": 1.0, "suffix_decoding_min_token_prob": 0.1, **keys}
    return SuffixText(SpeculativeConfig("suffix", **given), answers, (owner, ""), num_prompt)


def test_suffixes_are_found_in_answers_of_their_owner_alone() -> None:
    answers = Answers(10)
    told = suffix(answers, "me", num_prompt=2)
    told.read([5, 6, 1, 2, 3, 4, 5, 6])
    told.end()
    mine = suffix(answers, "me")
    mine.read([8, 1, 2, 3])
    assert mine.drafts() == [4, 5, 6], "the answer ends there"
    mine.read([4])
    assert mine.drafts() == [5, 6]
    others = suffix(answers, "another")
    others.read([8, 1, 2, 3])
    assert others.drafts() == []
    prompt = suffix(answers, "me")
    prompt.read([5, 6, 1])
    assert prompt.drafts() == [], "prompts are not told"


@pytest.mark.parametrize(("shares", "salts"), [(False, ("", "")), (True, ("", "")), (True, ("a", "b"))])
def test_shared_answers_are_everybody_s_with_the_same_salt(shares: bool, salts: tuple[str, str]) -> None:
    drafter = SuffixDrafter(SpeculativeConfig("suffix"), shares=shares)

    def begin(owner: str, salt: str) -> SuffixText:
        asked = msgspec.structs.replace(make_request("r", [1]), owner=owner, cache_salt=salt)
        return drafter.begin(Sequence(asked, 0, BlockTables([[]], [0])))

    told = begin("one", salts[0])
    told.read([9, 1, 2, 3, 4])
    told.end()
    text = begin("two", salts[1])
    text.read([1, 2, 3])
    assert text.drafts() == ([4] if shares and salts[0] == salts[1] else [])


def test_the_longer_the_match_the_more_drafts() -> None:
    text = suffix(Answers(0))
    text.read([*range(20), 50, 2, 3, 4])
    assert text.drafts() == [5, 6, 7]
    text.read([5])
    assert text.drafts() == [6, 7, 8, 9]
    text.read([6, 7, 8, 9])
    assert text.drafts() == [10, 11, 12, 13, 14, 15, 16]


def test_most_places_say_what_follows() -> None:
    said = [7, 1, 2, 3, 4, 8, 1, 2, 3, 5, 6, 9, 1, 2, 3, 5, 7, 6, 1, 2, 3]
    text = suffix(Answers(0), suffix_decoding_min_token_prob=0.3)
    text.read(said)
    assert text.drafts() == [5, 7, 6], "of equals the last one"
    text = suffix(Answers(0), suffix_decoding_min_token_prob=0.5)
    text.read(said)
    assert text.drafts() == [5]
    text = suffix(Answers(0), suffix_decoding_min_token_prob=0.9)
    text.read(said)
    assert text.drafts() == []


def test_kept_answers_are_bounded() -> None:
    answers = Answers(100, most_tokens=1000)
    for i in range(200):
        answers.add((f"owner {i % 3}", ""), [i] * 40)
        assert answers.num_tokens <= 1000
    kept = {token for owner in range(3) for index in answers.of((f"owner {owner}", "")) for token in index.tokens}
    assert {199, 198} <= kept
    assert len(kept) < 30
    answers = Answers(10)
    for i in range(50):
        answers.add(("", ""), [i] * 3)
    assert len({token for index in answers.of(("", "")) for token in index.tokens} - {SEPARATOR}) <= 11
    answers = Answers(0)
    answers.add(("", ""), [1, 2, 3])
    assert not answers.num_tokens


def test_a_match_is_no_longer_than_its_texts() -> None:
    assert match_length([1, 2, 3], 3, [9, 2, 3], 3, 10) == 2
    assert match_length([2, 3], 2, [1, 2, 3], 3, 10) == 2
    assert match_length([1, 2, 3], 3, [1, 2, 3], 3, 2) == 2


def costs(seconds: dict[int, float]) -> StepCosts:
    found = StepCosts()
    for tokens, each in seconds.items():
        for _ in range(3):
            found.observe(tokens, each)
    return found


def rate(it: StepCosts, chances: list[list[float]], num_sequences: int, counts: list[int]) -> float:
    gained = num_sequences + sum(sum(row[:count]) for row, count in zip(chances, counts, strict=True))
    return gained / float(it.seconds([num_sequences + sum(counts)])[0])


@pytest.mark.parametrize("seed", range(20))
def test_as_many_drafts_are_checked_as_bring_most_tokens_a_second(seed: int) -> None:
    """Against all choices."""
    rng = random.Random(seed)
    step = costs({1: 1.0, 2: 1.0 + rng.random() / 2, 4: 1.6 + rng.random(), 8: 2.6 + 2 * rng.random()})
    chances = [sorted((rng.random() for _ in range(3)), reverse=True) for _ in range(2)]
    counts = step.choose(chances, 2)
    rates = {(i, j): rate(step, chances, 2, [i, j]) for i in range(4) for j in range(4)}
    best = max(rates.values())
    assert rates[counts[0], counts[1]] == pytest.approx(best if best >= GAIN * rates[0, 0] else rates[0, 0])


def test_drafts_that_cost_more_than_they_bring_are_not_checked() -> None:
    step = costs({1: 1.0, 2: 2.0, 8: 8.0})
    assert [step.choose([[0.9] * 7], 1) for _ in range(99)] == [[0]] * 99
    step.observe(1, 1.0)
    assert step.choose([[0.9] * 7], 1) == [2], "now and then it is seen whether what was measured first still holds"
    for _ in range(2):
        step.observe(3, 1.1)
    assert step.choose([[0.9] * 7], 1) == [2]
    assert costs({1: 1.0, 8: 1.1}).choose([[0.01] * 7], 1) == [0]
    assert costs({1: 1.0, 8: 1.4}).choose([[0.9**i for i in range(1, 8)]], 1) == [7]


def test_what_was_never_measured_is_tried() -> None:
    step = costs({1: 1.0})
    assert step.choose([[0.5] * 7], 1) == [7]
    step.observe(8, 9.0)  # may be a hiccup
    assert step.choose([[0.5] * 7], 1) == [7]
    step.observe(8, 9.0)
    assert step.choose([[0.5] * 7], 1) == [0]


def test_large_steps_are_not_taken_to_be_free_before_they_are_measured() -> None:
    assert costs({8: 1.0}).choose([[0.2] * 7] * 8, 8) == [0] * 8
    assert costs({8: 1.0}).choose([[0.9] * 7] * 8, 8) == [7] * 8


def test_a_hiccup_changes_nothing() -> None:
    step = costs({1: 1.0, 8: 1.4})
    for _ in range(3):
        step.observe(8, 1.4)
    step.observe(8, 50.0)
    assert step.choose([[0.9] * 7], 1) == [7]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ('{"method": "eagle"}', "method 'eagle': drafts are made by ngram, suffix, auto, draft_model, eagle3, mtp"),
        ('{"method": "eagle3"}', "method 'eagle3' without a model: model names its directory"),
        ('{"method": "draft_model"}', "method 'draft_model' without a model: model names its directory"),
        ('{"model": "small", "prompt_lookup_max": 3}', "'prompt_lookup_max' is no key of method 'draft_model'"),
        ('{"model": "small", "draft_tensor_parallel_size": 2}', "'draft_tensor_parallel_size' is no key"),
        (
            '{"method": "ngram", "num_speculative_tokens_per_batch_size": [[1, 2, 5], [4, 8, 3]]}',
            "num_speculative_tokens_per_batch_size .4, 8, 3.: its first number is 3",
        ),
        (
            '{"method": "ngram", "num_speculative_tokens_per_batch_size": [[1, 2, 65]]}',
            "num_speculative_tokens_per_batch_size ..1, 2, 65..: Expected `int` <= 64",
        ),
        ('{"num_speculative_tokens": 3}', "no method is named"),
        ('{"method": "ngram", "suffix_decoding_max_tree_depth": 5}', "'suffix_decoding_max_tree_depth' is no key of"),
        ('{"method": "suffix", "prompt_lookup_min": 5}', "'prompt_lookup_min' is no key of method 'suffix'; method, "),
        ('{"method": "ngram", "num_speculative_tokens": 0}', "^num_speculative_tokens 0: Expected `int` >= 1$"),
        (
            '{"method": "ngram", "prompt_lookup_min": 5, "prompt_lookup_max": 4}',
            "4 is less than prompt_lookup_min 5",
        ),
        ('{"method": "ngram", "draft_tensor_parallel_size": 1}', "'draft_tensor_parallel_size' is no key"),
        ("[]", r"\[\] is not a JSON object"),
        ("{", "{ is not JSON"),
    ],
)
def test_what_is_not_known_is_refused(given: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as raised:
        parse_speculative(given)
    assert "\n" not in str(raised.value)


def test_configurations_of_vllm_are_read() -> None:
    assert parse_speculative('{"model": "[ngram]", "num_speculative_tokens": 5, "prompt_lookup_max": 4}') == (
        SpeculativeConfig("ngram", num_speculative_tokens=5, prompt_lookup_max=4)
    )
    assert make_speculative({"model": "small", "draft_tensor_parallel_size": 1, "num_speculative_tokens": 3}) == (
        SpeculativeConfig("draft_model", num_speculative_tokens=3, model="small")
    )
    rows = make_speculative({"method": "suffix", "num_speculative_tokens_per_batch_size": [[1, 2, 9], [3, 8, 2]]})
    assert [rows.most_of(count) for count in (1, 2, 3, 8, 9)] == [7, 7, 2, 2, 7]
    assert make_speculative({"method": "ngram", "prompt_lookup_max": 2}).prompt_lookup_min == 1
    assert make_speculative({"method": "suffix", "num_speculative_tokens": None}) == SpeculativeConfig("suffix")
