"""Constrained answers on the toy model: the best of what a grammar allows, token by token, however it is scheduled.

The truth is brute force: languages are finite lists of strings, and a token is allowed where the text with it begins
one of them.
"""

from __future__ import annotations

import random
import select
import string
import threading

import numpy as np
import pytest
from llguidance import LLMatcher
from tokenizers import Tokenizer, models
from toy_model import VOCAB, logits_after, make_engine, make_request, run_to_end, tokens_of

from octavo.runtime.constraint import Masks, Progress, compiled, ll_tokenizer
from octavo.runtime.engine import Engine
from octavo.runtime.messages import AddRequest, Constraint, TokenOutput, Vocabulary

END = VOCAB - 1
ALPHABET = (string.ascii_lowercase + string.ascii_uppercase + '{}":,0 ')[: VOCAB - 2]
WORDS = ["ab", "abc", "abcd", "xyz", "xy", "quite long, is it not", "Q", "abba"]


def vocabulary() -> Vocabulary:
    """A token for each character, then an unused id, and the end."""
    ids = {character: number for number, character in enumerate(ALPHABET)}
    backend = Tokenizer(models.BPE(ids, []))
    return Vocabulary([*(c.encode() for c in ALPHABET), b"", b"<end>"], [END], [END], backend.to_str())


def one_of(words: list[str], after: tuple[tuple[int, ...], ...] = ()) -> Constraint:
    alternatives = " | ".join(f'"{word}"' for word in words)
    return Constraint(LLMatcher.grammar_from_lark(f"start: {alternatives}"), after)


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


def run(engine: Engine, requests: list[AddRequest]) -> dict[str, list[TokenOutput]]:
    """As `run_to_end`, with the waits for grammars that the engine's process has."""
    outputs: dict[str, list[TokenOutput]] = {request.request_id: [] for request in requests}
    open_ids = set(outputs)

    def take(found: list[TokenOutput]) -> None:
        for output in found:
            outputs[output.request_id].append(output)
            if output.finish_reason is not None:
                open_ids.discard(output.request_id)

    for request in requests:
        take(engine.add(request))
    while open_ids:
        take(engine.take_grammars())
        if engine.has_work:
            take(engine.step())
        elif open_ids:
            select.select([engine.grammars.ready], [], [])
    return outputs


def constrained_engine(**limits: int) -> Engine:
    engine = make_engine(**limits)
    engine.grammars.set_vocabulary(vocabulary())
    return engine


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


def test_a_grammar_begins_behind_its_gate() -> None:
    free = make_request("free", [9, 9, 9], max_tokens=12)
    text = tokens_of(run_to_end(make_engine(), [free])["free"])
    gate = (tuple(text[2:4]), (END, END))
    request = make_request("a", [9, 9, 9], max_tokens=40, constraint=one_of(["xyz"], after=gate))
    answer = tokens_of(run(constrained_engine(), [request])["a"])
    assert answer == text[:4] + encode("xyz")


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
    grammar = compiled(tokenizer, LLMatcher.grammar_from_lark("start: /(.|\\n)*/"))
    following = [Progress(Constraint(""), grammar, []) for _ in range(2)]
    bits = Masks(VOCAB + 20).fill(following)
    following[0].allow_ends(bits[0], [])
    following[1].allow_ends(bits[1], [END, VOCAB + 3, VOCAB + 900])
    assert bits.shape == (2, -(-(VOCAB + 20) // 32))
    allowed = [np.unpackbits(row.view(np.uint8), bitorder="little").nonzero()[0].tolist() for row in bits]
    assert allowed == [[*range(len(ALPHABET))], [*range(len(ALPHABET)), END, VOCAB + 3]]
