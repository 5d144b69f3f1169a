"""Speculation never shows in an answer: not in its tokens, its log-probabilities, or its end, whatever is guessed."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import msgspec
import pytest
import torch
from constrained_toy import ALPHABET, END, constrained_engine, one_of
from constrained_toy import run as run_constrained
from guessing import Guessing, Style
from slow_cases import slow
from toy_model import VOCAB, logits_after, make_engine, make_request, run_to_end, run_with_arrivals, tokens_of

from octavo.runtime.messages import AddRequest, RepetitionDetection, TokenOutput
from octavo.runtime.scheduling.plan import StepPlan
from octavo.runtime.speculation.config import SpeculativeConfig
from octavo.runtime.speculation.costs import StepCosts
from octavo.runtime.speculation.select import make_speculation
from octavo.runtime.speculation.speculation import Speculation

STYLES: list[Style] = ["right", "wrong", "mixed"]
PARAMS: list[dict[str, Any]] = [
    {},
    {"stop_token_ids": tuple(range(0, VOCAB, 7)), "min_tokens": 5},
    {"logprobs": 3, "prompt_logprobs": 2, "logprob_token_ids": (3, 9)},
    {"temperature": 2.0, "top_p": 0.9, "seed": 5, "logprobs": 0},
    {
        "temperature": 3.0,
        "top_k": 9,
        "frequency_penalty": 0.4,
        "presence_penalty": 0.2,
        "repetition_penalty": 1.4,
        "seed": 8,
    },
    {"repetition_penalty": 1.3, "logit_bias": {4: 2.0}, "logprobs": 1},
    {"allowed_token_ids": tuple(range(9)), "forbidden": ((1, 2), (3,), (4, 4, 4)), "temperature": 4.0, "seed": 1},
    {"allowed_token_ids": (8, 9), "repetition": RepetitionDetection(4, 1, 3), "temperature": 8.0, "seed": 2},
    {"allowed_token_ids": (8, 9), "forbidden": ((8, 9), (9, 8), (8, 8, 8), (9, 9, 9)), "max_tokens": 10},  # ends stuck
]


def requests(rng: random.Random) -> list[AddRequest]:
    stem = [rng.randrange(VOCAB) for _ in range(30)]
    made = [
        make_request(
            f"r{i}",
            [*stem[: rng.randrange(1, 30)], rng.randrange(VOCAB)],
            **{"max_tokens": rng.randrange(1, 30), **params},
        )
        for i, params in enumerate(PARAMS)
    ]
    return [*made, msgspec.structs.replace(made[3], request_id="n0", other_ids=["n1", "n2"])]


def random_limits(rng: random.Random) -> dict[str, Any]:
    block_size = rng.choice([1, 4, 16])
    return {
        "block_size": block_size,
        "max_model_len": 64,
        "num_blocks": -(-64 // block_size) + rng.randrange(8 // block_size + 1),
        "max_num_seqs": rng.randrange(2, 12),
        "max_num_batched_tokens": rng.choice([3, 8, 64, 256]),
        "enable_prefix_caching": rng.random() < 0.8,
        "max_drafts": rng.choice([2, 30, 256]),
        "overlaps": rng.random() < 0.5,
    }


def answer_of(outputs: list[TokenOutput]) -> tuple[Any, ...]:
    """What a client sees of it."""
    last = outputs[-1]
    logprobs = [entry for output in outputs for entry in output.logprobs or []]
    return tokens_of(outputs), logprobs, last.finish_reason, last.stop_token_id, last.error, outputs[0].prompt_logprobs


def answers(outputs: dict[str, list[TokenOutput]], wanted: list[AddRequest]) -> dict[str, tuple[Any, ...]]:
    return {name: answer_of(outputs[name]) for it in wanted for name in it.request_ids}


def texts(plain: dict[str, tuple[Any, ...]], wanted: list[AddRequest]) -> dict[str, list[int]]:
    return {name: it.token_ids + plain[name][0] for it in wanted for name in it.request_ids}


def run(wanted: list[AddRequest], rng: random.Random, speculation: Speculation | None, **limits: Any) -> Any:
    """(answers, the engine). Ids of further answers are known to outputs, too."""
    engine = make_engine(speculation=speculation, **limits)
    outputs = run_with_arrivals(engine, wanted, rng)
    engine.scheduler.pool.check([])
    return answers(outputs, wanted), engine


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("seed", [*range(8), *map(slow, range(8, 40))])
def test_guesses_change_no_answer(seed: int, style: Style) -> None:
    rng = random.Random(seed)
    wanted = requests(rng)
    plain, _ = run(wanted, random.Random(seed), None, num_blocks=2048)
    assert plain["r8"][4] is not None, "nothing was allowed in the end"
    guessing = Guessing(texts(plain, wanted), style, VOCAB)
    found, engine = run(wanted, random.Random(seed), guessing.speculation(rng.choice([1, 4, 9])), **random_limits(rng))
    assert found == plain
    stats = engine.scheduler.stats()
    assert stats.num_drafts
    assert stats.num_draft_tokens >= sum(stats.accepted_per_pos)
    assert bool(sum(stats.accepted_per_pos)) == (style != "wrong")


def test_preemptions_and_cached_prefixes_are_among_those() -> None:
    preemptions = hits = 0
    for seed in range(8):
        rng = random.Random(seed)
        wanted = requests(rng)
        limits = random_limits(rng)
        plain, _ = run(wanted, random.Random(seed), None, num_blocks=2048)
        _, engine = run(wanted, rng, Guessing(texts(plain, wanted), "mixed", VOCAB).speculation(4), **limits)
        preemptions += engine.scheduler.stats().num_preemptions
        hits += engine.scheduler.stats().prefix_cache_hits
    assert preemptions
    assert hits


def test_right_guesses_save_steps() -> None:
    wanted = [make_request("a", [1, 2, 3], max_tokens=33)]
    plain = answers(run_to_end(make_engine(), wanted), wanted)
    speculation = Guessing(texts(plain, wanted), "right", VOCAB).speculation(7)
    engine = make_engine(speculation=speculation, overlaps=False)
    outputs = run_to_end(engine, wanted)["a"]
    assert [len(output.token_ids) for output in outputs] == [1, 8, 8, 8, 8]
    stats = engine.scheduler.stats()
    assert (stats.num_drafts, stats.num_draft_tokens, stats.accepted_per_pos) == (4, 28, [4] * 7)


def test_there_are_fewer_drafts_in_larger_steps() -> None:
    wanted = [make_request(name, [1, 2, 3], max_tokens=40 - 20 * i) for i, name in enumerate("ab")]
    plain = answers(run_to_end(make_engine(), wanted), wanted)
    drafter = Guessing(texts(plain, wanted), "right", VOCAB).speculation(7)._drafter
    engine = make_engine(speculation=Speculation(drafter, 7, most_of=lambda num: {1: 5, 2: 2}[num]), overlaps=False)
    found = run_to_end(engine, wanted)
    assert answers(found, wanted) == plain
    sizes = [len(output.token_ids) for output in found["a"]]
    assert sizes[:7] == [1, 3, 3, 3, 3, 3, 3]
    assert set(sizes[8:-1]) == {6}


def test_who_has_no_guesses_goes_on_ahead_of_results() -> None:
    """One that waits for its result holds up no other one's next step."""
    engine = make_engine(speculation=Guessing({"a": [0] * 60}, "wrong", VOCAB).speculation(2))
    for name in ("a", "b"):
        engine.add(make_request(name, [1, 2], max_tokens=40))
    engine.step()
    engine.step()  # which was ordered before there were guesses
    alone = 0
    for _ in range(6):
        engine.advance()
        plans = [handle.plan for handle in engine._under_way]
        alone += [[at.sequence.request_id for at in plan.scheduled] for plan in plans].count(["b"])
        assert all(at.tokens[0] >= 0 for plan in plans for at in plan.scheduled if at.sequence.request_id == "a")
        engine.finish()
    assert alone > 2


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("jumps", [False, True])
@pytest.mark.parametrize("overlaps", [False, True])
def test_grammars_are_followed_as_without(style: Style, jumps: bool, overlaps: bool) -> None:
    words = ["house", "household", "horse", "hound", "mouse", "mice and men", "m"]
    wanted = [
        make_request(
            f"g{seed}",
            [seed, 7],
            max_tokens=14,
            temperature=5.0,
            seed=seed,
            stop_token_ids=(END,),
            constraint=one_of(words),
            logprobs=1 if seed % 2 else None,
        )
        for seed in range(12)
    ]
    plain = answers(run_constrained(constrained_engine(), wanted), wanted)
    said = {"".join(ALPHABET[token] for token in answer[0] if token != END) for answer in plain.values()}
    assert len(said) > 2
    assert said <= set(words)
    guessing = Guessing(texts(plain, wanted), style, VOCAB)
    engine = constrained_engine(speculation=guessing.speculation(5), jumps_forward=jumps, overlaps=overlaps)
    found = answers(run_constrained(engine, wanted), wanted)
    assert {name: answer[:3] for name, answer in found.items()} == {name: it[:3] for name, it in plain.items()}
    assert bool(sum(engine.scheduler.stats().accepted_per_pos)) == (style != "wrong")


class SaysTheSame:
    kind = 1

    def read(self, _: list[int]) -> None: ...

    def drafts(self) -> list[int]:
        return [17, 40, 5]

    def end(self) -> None: ...


def test_drawn_tokens_have_the_model_s_distribution() -> None:
    """Chi-square over tokens that were drawn behind and at guesses, against the exact probabilities."""
    allowed = (5, 17, 40)
    speculation = Speculation(lambda _: SaysTheSame(), 3)
    engine = make_engine(speculation=speculation, num_blocks=2048, max_num_seqs=64)
    wanted = [
        make_request(f"r{i}", [1, 2, 3], max_tokens=5, temperature=4.0, allowed_token_ids=allowed) for i in range(4000)
    ]
    outputs = run_to_end(engine, wanted)
    counts: dict[tuple[int, ...], Counter[int]] = {}
    for it in wanted:
        tokens = tokens_of(outputs[it.request_id])
        for place in range(4):
            counts.setdefault(tuple(tokens[:place]), Counter())[tokens[place]] += 1
    chi_square = 0.0
    for before, counted in counts.items():
        expected = (logits_after([1, 2, 3, *before])[list(allowed)] / 4.0).softmax(-1) * counted.total()
        found = torch.tensor([counted[token] for token in allowed])
        chi_square += float(((found - expected) ** 2 / expected).sum())
    assert len(counts) == 1 + 3 + 9 + 27
    assert chi_square < 124.8  # 80 degrees of freedom: exceeded once in 1,000
    assert 1000 < engine.scheduler.stats().accepted_per_pos[0] < 3000


class Alternating:
    """Right guesses of one kind, and wrong ones of a better one, in turn."""

    def __init__(self) -> None:
        self.num_read = 0
        self.kind = 1

    def read(self, new: list[int]) -> None:
        self.num_read += len(new)
        self.kind = 1 + self.num_read % 2

    def drafts(self) -> list[int]:
        return [7 if self.kind == 1 else 6]

    def end(self) -> None: ...


class Steady(StepCosts):
    """What steps are guessed to take, whatever they take here."""

    def take(self, plan: StepPlan, seconds: float) -> None: ...


def test_kinds_of_guesses_are_told_apart() -> None:
    """By how often they were right, whatever was thought of them before."""
    wanted = [make_request("r", [1, 2, 3, 4], max_tokens=400, allowed_token_ids=(7,))]
    speculation = Speculation(lambda _: Alternating(), 1, Steady())
    engine = make_engine(num_blocks=256, max_model_len=512, speculation=speculation)
    run_to_end(engine, wanted)
    stats = engine.scheduler.stats()
    assert sum(stats.accepted_per_pos) > 100
    assert stats.num_draft_tokens - sum(stats.accepted_per_pos) < 40


@pytest.mark.parametrize("method", ["ngram", "suffix", "auto"])
def test_drafters_change_no_answer_and_are_right_where_texts_repeat(
    method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real ones: on a model that says one thing over and over, for two requests alike."""
    wanted = [make_request(f"r{i}", [1, 2, 3, 4], max_tokens=60, allowed_token_ids=(7,)) for i in range(2)]
    wanted += [make_request(f"d{i}", [i, 2, 3], max_tokens=60, temperature=5.0, seed=i % 2) for i in range(4)]
    plain = answers(run_to_end(make_engine(num_blocks=256), wanted), wanted)
    monkeypatch.setattr(StepCosts, "take", Steady.take)
    engine = make_engine(num_blocks=256, speculation=make_speculation(SpeculativeConfig(method)))
    assert answers(run_to_end(engine, wanted), wanted) == plain
    assert sum(engine.scheduler.stats().accepted_per_pos) > 20
