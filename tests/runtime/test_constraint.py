"""Constrained answers on the toy model: the best of what a grammar allows, token by token, however it is scheduled.

The truth is brute force: languages are finite lists of strings, and a token is allowed where the text with it begins
one of them.
"""

from __future__ import annotations

import json
import random
import re
import select
import string
import threading
from typing import Any

import numpy as np
import pytest
from constrained_toy import ALPHABET, END, constrained_engine, one_of, run, vocabulary
from llguidance import LLMatcher
from torch import Tensor
from toy_model import VOCAB, ToyModel, logits_after, make_engine, make_request, run_to_end, tokens_of

from octavo.kernels.attention.cache import LayerCache
from octavo.kernels.attention.step import StepInputs
from octavo.runtime.constraint import Grammar, compiled, ll_tokenizer, parser_limits
from octavo.runtime.following import Masks, Progress
from octavo.runtime.messages import AddRequest, Constraint, Reasoning, Triggers

END_OF_CALL = "qz"
WORDS = ["ab", "abc", "abcd", "xyz", "xy", "quite long, is it not", "Q", "abba"]


def encode(text: str) -> list[int]:
    return [ALPHABET.index(character) for character in text]


def decode(tokens: list[int]) -> str:
    return "".join(ALPHABET[token] for token in tokens if token != END)


def expected(request: AddRequest, words: list[str]) -> tuple[str, str]:
    """(text, finish reason) of the greedy choice among what may come; the end token counts where a word is complete."""
    text = ""
    while text not in words or any(word.startswith(text) and word != text for word in words):
        if len(text) == request.params.max_tokens:
            return text, "length"
        following = {ALPHABET.index(word[len(text)]) for word in words if word.startswith(text) and word != text}
        if text in words and END in request.params.stop_token_ids:
            following.add(END)
        logits = logits_after([*request.token_ids, *encode(text)])
        best = max(following, key=lambda token: float(logits[token]))
        if best == END:
            break
        text += ALPHABET[best]
    return text, "stop"


@pytest.mark.parametrize("seed", range(20))
def test_an_answer_is_the_best_that_its_grammar_allows(seed: int) -> None:
    """In any company, with preemptions, chunked prompts and prefix hits; neighbors without a grammar are as alone."""
    rng = random.Random(seed)
    requests = []
    languages: dict[str, list[str]] = {}
    for number in range(10):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 30))]
        settings = {"max_tokens": rng.randrange(1, 24), "stop_token_ids": (END,) if rng.random() < 0.7 else ()}
        if rng.random() < 0.7:
            languages[f"r{number}"] = words = rng.sample(WORDS, rng.randrange(1, len(WORDS)))
            settings["constraint"] = one_of(words)
        requests.append(make_request(f"r{number}", prompt, **settings))
    block_size = rng.choice([1, 4, 16])
    engine = constrained_engine(
        block_size=block_size,
        max_model_len=64,
        num_blocks=-(-64 // block_size) + rng.randrange(24 // block_size + 1),
        max_num_seqs=rng.randrange(1, 10),
        max_num_batched_tokens=rng.choice([1, 8, 256]),
        jumps_forward=rng.random() < 0.5,
        overlaps=rng.random() < 0.5,
    )
    outputs = run(engine, requests)
    for request in requests:
        mine = outputs[request.request_id]
        if request.request_id in languages:
            found = (decode(tokens_of(mine)), mine[-1].finish_reason)
            assert found == expected(request, languages[request.request_id])
        else:
            assert tokens_of(mine) == tokens_of(run_to_end(make_engine(), [request])[request.request_id])
    engine.scheduler.pool.check([])


class _Counting(ToyModel):
    num_steps = 0

    def forward(self, inputs: StepInputs, caches: list[LayerCache], *_: object) -> Tensor:
        self.num_steps += 1
        return super().forward(inputs, caches)


@pytest.mark.parametrize("overlaps", [True, False])
@pytest.mark.parametrize(
    ("params", "num_steps"),
    [
        ({}, 1),  # its first token, which tells the words apart, and then all others
        ({"presence_penalty": 1.0, "temperature": 2.0, "seed": 1}, 1),
        ({"max_tokens": 5}, 1),
        ({"logprobs": 0}, 25),  # each token's log-probability takes the model's logits
        ({"allowed_token_ids": tuple(range(VOCAB))}, 25),  # which may forbid what the grammar forces
        ({"forbidden": ((0, 0),)}, 25),
    ],
)
def test_forced_tokens_take_no_step_of_their_own(params: dict[str, Any], num_steps: int, *, overlaps: bool) -> None:
    word = "quite long, is it not now"
    found = []
    for jumps in (True, False):
        model = _Counting()
        engine = constrained_engine(model, overlaps=overlaps, jumps_forward=jumps)
        settings = {"max_tokens": 40, "stop_token_ids": (END,), "constraint": one_of([word, "Quite another"])} | params
        outputs = run(engine, [make_request("r", [1, 2, 3], **settings)])["r"]
        found.append((decode(tokens_of(outputs)), outputs[-1].finish_reason))
        if jumps:
            assert model.num_steps == num_steps
    assert found[0] == found[1]


def test_drawn_answers_obey_too_and_a_seed_gives_the_same_ones() -> None:
    requests = [
        make_request(
            f"r{seed}",
            [1, 2],
            temperature=5.0,
            seed=seed,
            max_tokens=40,
            stop_token_ids=(END,),
            constraint=one_of(WORDS),
        )
        for seed in range(40)
    ]
    first, second = (run(constrained_engine(max_num_seqs=seats), requests) for seats in (3, 32))
    texts = {name: decode(tokens_of(outputs)) for name, outputs in first.items()}
    assert set(texts.values()) <= set(WORDS)
    assert len(set(texts.values())) > 3
    assert texts == {name: decode(tokens_of(outputs)) for name, outputs in second.items()}


@pytest.mark.parametrize("stops", [(), (END,)])
def test_a_complete_answer_ends_whatever_else_is_asked(stops: tuple[int, ...]) -> None:
    """ignore_eos leaves no stop tokens; min_tokens would forbid them: there is nothing else to say."""
    request = make_request("a", [3], max_tokens=30, min_tokens=20, stop_token_ids=stops, constraint=one_of(["ab"]))
    outputs = run(constrained_engine(), [request])["a"]
    assert (decode(tokens_of(outputs)), outputs[-1].finish_reason) == ("ab", "stop")
    assert outputs[-1].stop_token_id is None


def test_a_stop_token_of_the_client_s_may_come_where_the_grammar_is_complete() -> None:
    stop = ALPHABET.index("z")
    bias = {stop: 100.0}
    request = make_request("a", [3], stop_token_ids=(stop,), logit_bias=bias, constraint=one_of(["ab", "abc"]))
    outputs = run(constrained_engine(), [request])["a"]
    assert decode(tokens_of(outputs)) == "abz"
    assert (outputs[-1].finish_reason, outputs[-1].stop_token_id) == ("stop", stop)


def free_text(length: int) -> list[int]:
    """What the model says without a constraint, behind the prompt that the tests below have."""
    return tokens_of(run_to_end(make_engine(), [make_request("free", [9, 9, 9], max_tokens=length)])["free"])


def constrained_text(constraint: Constraint, **settings: Any) -> list[int]:
    request = make_request("a", [9, 9, 9], constraint=constraint, **{"max_tokens": 40} | settings)
    return tokens_of(run(constrained_engine(), [request])["a"])


def test_a_grammar_begins_behind_the_reasoning() -> None:
    text = free_text(12)
    for place in (2, 5):
        reasoning = Reasoning((text[place],), is_open=True)
        end = text.index(text[place]) + 1
        assert constrained_text(one_of(["xyz"], reasoning)) == text[:end] + encode("xyz")


def test_reasoning_that_the_model_begins_itself() -> None:
    """By its first token, which may come beside what the grammar allows."""
    text = free_text(12)
    end = text.index(text[6], 2) + 1
    assert constrained_text(one_of(["xyz"], Reasoning((text[6],), begin=(text[0],)))) == text[:end] + encode("xyz")
    unlike = next(token for token in range(len(ALPHABET)) if token != text[0])
    bias = {unlike: -100.0, encode(" ")[0]: -100.0}
    answer = constrained_text(one_of(["xyz"], Reasoning((text[6],), begin=(unlike,))), logit_bias=bias)
    assert answer == encode("xyz")


@pytest.mark.parametrize("budget", [0, 1, 4])
def test_reasoning_ends_when_its_budget_is_spent(budget: int) -> None:
    text = free_text(12)
    closing = (*encode("so"), END)
    reasoning = Reasoning((END,), is_open=True, budget=budget, closing=closing)
    bias = {END: -100.0}
    expected_end = text[:budget] + list(closing)
    assert constrained_text(one_of(["xyz"], reasoning), logit_bias=bias) == [*expected_end, *encode("xyz")]
    alone = constrained_text(Constraint(reasoning=reasoning), logit_bias=bias, max_tokens=10)
    assert alone[: budget + 3] == expected_end
    assert len(alone) == 10


def test_reasoning_that_ends_in_time_is_left_alone() -> None:
    text = free_text(12)
    end = text.index(text[3])
    reasoning = Reasoning((text[end],), is_open=True, budget=11, closing=(END,))
    assert constrained_text(Constraint(reasoning=reasoning), max_tokens=12) == text


def progress_of(constraint: Constraint, said: str = "") -> Progress:
    grammar = Grammar(None, [], vocabulary().tokens)
    if constraint.grammar:
        grammar = compiled(ll_tokenizer(vocabulary(), VOCAB), constraint.grammar, vocabulary().tokens)
        grammar = grammar._replace(spaces=encode(" "))
    return Progress(constraint, grammar, encode(said))


def may_follow(progress: Progress) -> str:
    """The characters that may come next."""
    bits = Masks(VOCAB).fill([progress])
    progress.allow_ends(bits[0], [END])
    row = bits[0].view("uint32")
    return decode([token for token in range(len(ALPHABET)) if row[token // 32] >> (token % 32) & 1])


@pytest.mark.parametrize("spaces", ["", " ", "  "])
def test_reasoning_that_begins_behind_whitespace(spaces: str) -> None:
    """The grammar has no whitespace; what stands in front of the reasoning is none of its text."""
    [begin, end] = encode("TE")
    constraint = one_of(["xyz"], Reasoning((end,), begin=(begin,)))
    progress = progress_of(constraint, spaces)
    assert (progress.holds, set(may_follow(progress))) == (True, {"T", "x"} if spaces else {" ", "T", "x"})
    assert not progress_of(constraint, spaces + "T").holds
    behind = progress_of(constraint, spaces + "T no xyz E")
    assert (behind.holds, may_follow(behind)) == (True, "x")
    assert progress_of(constraint, spaces + "TExyz").is_complete
    without = progress_of(constraint, spaces + "xyz")
    assert (without.is_complete, without.is_over) == (True, True)
    limited = Constraint(reasoning=Reasoning((end,), begin=(begin,), budget=2, closing=(end,)))
    assert progress_of(limited, spaces + "Tab").forced == end
    assert progress_of(limited, spaces + "xTab").forced is None
    asleep = Constraint(constraint.grammar, constraint.reasoning, Triggers(start="x"))
    assert may_follow(progress_of(asleep, spaces + "TxE" + spaces + "x")) == "y"
    assert not progress_of(asleep, spaces + "Tx").holds


def test_reasoning_between_markers_of_several_tokens() -> None:
    closing = tuple(encode("so END"))
    limited = Constraint(reasoning=Reasoning(("END",), begin=("BE", *encode("G")), budget=3, closing=closing))
    spent = progress_of(limited, " BEGabc")
    forced = []
    while spent.forced is not None:
        forced.append(spent.forced)
        spent.accept(spent.forced)
    assert tuple(forced) == closing
    assert not spent.holds
    for text in ("BEG", "BEGab", "BEGENDabcdef", "BEGaENENDabc", "BExabcdef", "abcdefg"):
        assert progress_of(limited, text).forced is None, text
    assert progress_of(limited, "BEGEEN").forced == encode("s")[0]  # a marker that is not whole


def test_reasoning_that_the_grammar_describes() -> None:
    lark = 'start: (/[a-z]*/ "END")? ("{" | "x")'
    reasoning = Reasoning(("END",), is_open=True, budget=2, closing=tuple(encode("END")), in_grammar=True)
    constraint = Constraint(LLMatcher.grammar_from_lark(lark), reasoning)
    assert set(may_follow(progress_of(constraint))) == {*string.ascii_lowercase, "E", "{"}
    assert [progress_of(constraint, text).forced for text in ("ab", "abE", "abEN", "abEND", "aE")] == [
        *encode("END"),
        None,
        encode("E")[0],
    ]
    assert may_follow(progress_of(constraint, "abEND")) == "x{"
    assert may_follow(progress_of(constraint, "aEND")) == "x{"
    assert progress_of(constraint, "abENDx").is_complete


def test_a_grammar_wakes_at_a_token_and_sleeps_again() -> None:
    """The token that wakes it is the first that it reads; what comes before and behind is free."""
    text = free_text(12)
    letter = decode([text[4]])
    place = text.index(text[4])
    triggers = Triggers(token_ids=(text[4],))
    words = [f"{letter}{END_OF_CALL}"]
    answer = constrained_text(one_of(words, triggers=triggers), max_tokens=30)
    assert answer[:place] == text[:place]
    shown = decode(answer)
    for found in re.finditer(re.escape(letter) + "(?s:.{0,3})", shown):
        if found.start() + len(words[0]) <= len(shown):
            assert shown[found.start() :].startswith(words[0])
    assert len(answer) == 30
    once = constrained_text(one_of(words, triggers=Triggers(token_ids=(text[4],), once=True)))
    assert once == text[:place] + encode(words[0])


def test_a_grammar_wakes_at_a_text() -> None:
    """However it comes about: the beginning of the text is free to be something else."""
    text = free_text(30)
    shown = decode(text)
    marker = shown[6:9]

    def waking(marker: str, *, once: bool) -> Constraint:
        lark = f'start: r "{END_OF_CALL}"\nr[lazy]: /(?s:.*)/ {json.dumps(marker)}'
        return Constraint(LLMatcher.grammar_from_lark(lark), triggers=Triggers(texts=(marker,), once=once))

    answer = constrained_text(waking(marker, once=True))
    end = shown.index(marker) + 3
    assert decode(answer) == shown[:end] + END_OF_CALL
    other = next(letter for letter in ALPHABET if letter not in shown)
    free = constrained_text(waking(marker + other, once=False), max_tokens=30)
    assert free == text


def test_a_grammar_wakes_at_the_first_visible_character() -> None:
    text = free_text(12)
    first = decode(text[:1])
    triggers = Triggers(start=first, once=True)
    assert decode(constrained_text(one_of([f"{first}{END_OF_CALL}"], triggers=triggers))) == first + END_OF_CALL
    other = next(letter for letter in ALPHABET if letter != first)
    assert constrained_text(one_of(["ab"], triggers=Triggers(start=other)), max_tokens=12) == text


def test_answers_to_one_prompt_each_follow_the_grammar() -> None:
    engine = constrained_engine()
    request = make_request("a", [5, 6], temperature=3.0, max_tokens=30, stop_token_ids=(END,), constraint=one_of(WORDS))
    several = AddRequest("a", request.token_ids, request.params, 0.0, other_ids=["b", "c"])
    engine.add(several)
    texts: dict[str, str] = dict.fromkeys("abc", "")
    ended = 0
    while ended < 3:
        engine.take_grammars()
        for output in engine.step():
            texts[output.request_id] += decode(output.token_ids)
            ended += output.finish_reason is not None
    assert set(texts.values()) <= set(WORDS)


def test_a_grammar_that_is_none_is_refused_and_the_others_go_on() -> None:
    bad = make_request("bad", [1], constraint=Constraint("{}"))
    good = make_request("good", [1], max_tokens=30, constraint=one_of(["ab"]))
    outputs = run(constrained_engine(), [bad, good])
    (refusal,) = outputs["bad"]
    assert (refusal.finish_reason, refusal.is_refused) == ("error", True)
    assert "grammar" in str(refusal.error)
    assert decode(tokens_of(outputs["good"])) == "ab"


def test_a_grammar_that_turns_out_to_be_too_complex_is_the_request_s_own_fault() -> None:
    """It passes the check, and its first masks say so; the others go on."""
    lark = "start: T\nT: (/a/{1000}){1000}"
    assert LLMatcher.validate_grammar_with_warnings(LLMatcher.grammar_from_lark(lark), limits=parser_limits()) == (
        False,
        [],
    )
    bad = make_request("bad", [1], max_tokens=30, constraint=Constraint(LLMatcher.grammar_from_lark(lark)))
    good = make_request("good", [1], max_tokens=30, constraint=one_of(["ab"]))
    outputs = run(constrained_engine(), [bad, good])
    refusal = outputs["bad"][-1]
    assert (refusal.finish_reason, refusal.is_refused) == ("error", True)
    assert "too many expressions" in str(refusal.error)
    assert decode(tokens_of(outputs["good"])) == "ab"


def test_a_mask_that_fails_is_no_fault_of_other_fields() -> None:
    """A grammar that fails while a mask is made allows no token; other fields of the request have no part in that."""
    constraint = Constraint(LLMatcher.grammar_from_lark("start: /((a{1,300}){1,300}){1,300}/"))
    first = make_request("first", [1], max_tokens=60, constraint=constraint, min_tokens=59)
    second = make_request("second", [1], max_tokens=60, constraint=constraint, min_tokens=59)
    engine = constrained_engine()
    for request in (first, second):
        refusal = run(engine, [request])[request.request_id][-1]
        assert (refusal.finish_reason, refusal.is_refused) == ("error", True)
        assert "too many expressions" in str(refusal.error)
        assert "allowed_token_ids" not in str(refusal.error)


def test_nothing_that_may_be_sampled_is_the_request_s_own_fault() -> None:
    impossible = make_request("a", [1], allowed_token_ids=(END,), constraint=one_of(["ab"]))
    refusal = run(constrained_engine(), [impossible])["a"][-1]
    assert (refusal.finish_reason, refusal.is_refused) == ("error", True)


def test_without_a_vocabulary_a_grammar_is_refused() -> None:
    (refusal,) = run(make_engine(), [make_request("a", [1], constraint=one_of(["ab"]))])["a"]
    assert "vocabulary" in str(refusal.error)


def test_nobody_waits_for_a_grammar_that_is_being_compiled() -> None:
    engine = constrained_engine()
    may_compile = threading.Event()
    engine.grammars._thread.submit(may_compile.wait)
    slow = make_request("slow", [1], max_tokens=30, constraint=one_of(["ab"]))
    quick = make_request("quick", [1], max_tokens=3)
    engine.add(slow)
    assert len(tokens_of(run(engine, [quick])["quick"])) == 3
    assert not engine.has_work
    may_compile.set()
    answer: list[int] = []
    while len(answer) < 2:
        engine.take_grammars()
        answer += tokens_of(engine.step())
    assert decode(answer) == "ab"


def test_a_request_that_is_aborted_before_its_grammar_is_there_is_gone() -> None:
    engine = constrained_engine()
    engine.add(make_request("a", [1], constraint=one_of(["ab"])))
    engine.scheduler.abort(["a"])
    select.select([engine.grammars.ready], [], [])
    assert engine.take_grammars() == []
    assert not engine.has_work


def test_masks_of_padded_vocabularies() -> None:
    """Ids beyond the tokenizer's can't come, nor can a token without text; a stop token of the client's can."""
    tokenizer = ll_tokenizer(vocabulary(), VOCAB + 20)
    grammar = compiled(tokenizer, LLMatcher.grammar_from_lark("start: /(.|\\n)*/"), vocabulary().tokens)
    following = [Progress(Constraint(""), grammar, []) for _ in range(2)]
    bits = Masks(VOCAB + 20).fill(following)
    following[0].allow_ends(bits[0], [])
    following[1].allow_ends(bits[1], [END, VOCAB + 3, VOCAB + 900])
    assert bits.shape == (2, -(-(VOCAB + 20) // 32))
    allowed = [np.unpackbits(row.view(np.uint8), bitorder="little").nonzero()[0].tolist() for row in bits]
    assert allowed == [[*range(len(ALPHABET))], [*range(len(ALPHABET)), END, VOCAB + 3]]
