"""A second model that makes drafts: no answer shows it, it guesses what it says itself, and its cache is its own."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from draft_engines import KINDS, SIZES, asked, assert_same_answers, draft_of, load, said
from toy_model import make_request, run_to_end, tokens_of

from octavo.runtime.engine import Engine
from octavo.runtime.messages import AddRequest
from octavo.runtime.speculation.config import SpeculativeConfig
from octavo.runtime.speculation.draft_files import check_tokenizers
from octavo.runtime.speculation.model_speculation import Costs, ModelSpeculation
from octavo.runtime.speculation.speculation import Chances, Followed


def requests(rng: random.Random) -> list[AddRequest]:
    made = [
        make_request(f"r{i}", [rng.randrange(3, 200) for _ in range(rng.randrange(1, 30))], max_tokens=30, **params)
        for i, params in enumerate(KINDS)
    ]
    return [*made, make_request("none behind", [5, 6, 7], max_tokens=1)]


@pytest.mark.parametrize(
    ("draft", "limits"),
    [
        ("tiny--llmc-w8a8", {}),
        ("tiny--llmc-w4a16-g32", {"num_blocks": 16, "max_model_len": 64, "max_num_batched_tokens": 9}),
    ],
)
def test_answers_are_those_of_the_model_alone(draft: str, limits: dict[str, int], fixtures: Path) -> None:
    """With chunks of prompts, and preemptions where there are few blocks."""
    plain = load(fixtures / "tiny")
    engine = load(fixtures / "tiny", fixtures / draft, **limits)
    assert_same_answers(plain, engine, requests)
    stats = engine.scheduler.stats()
    accepted = sum(stats.accepted_per_pos)
    assert 0 < accepted <= stats.num_draft_tokens
    if limits:
        assert stats.num_preemptions
    engine.scheduler.pool.check([])
    model = draft_of(engine)
    assert model.drafts([], 3) == []
    model._pool.check([])


@pytest.mark.parametrize("model_impl", ["octavo", "hf"])
def test_a_model_accepts_all_of_its_own_drafts(model_impl: str, fixtures: Path) -> None:
    """At any temperature, as both draw with the same numbers; in transformers' own code, too."""
    plain = load(fixtures / "tiny")
    engine = load(fixtures / "tiny", fixtures / "tiny", model_impl=model_impl)
    wanted = requests(random.Random(5))[:4]
    expected = run_to_end(plain, wanted)
    found = run_to_end(engine, wanted)
    assert {name: said(told) for name, told in found.items()} == {name: said(told) for name, told in expected.items()}
    stats = engine.scheduler.stats()
    assert sum(stats.accepted_per_pos) == stats.num_draft_tokens > 60


def test_a_draft_is_what_the_model_says_next(fixtures: Path) -> None:
    """As far as drafts were refused, in chunks, from a cache that is shared, and of whoever lost its blocks."""
    engine = load(fixtures / "tiny", fixtures / "tiny", num_draft_blocks=9)
    model = draft_of(engine)
    rng = random.Random(1)
    texts = [[rng.randrange(3, 200) for _ in range(length)] for length in (20, 3, 40)]
    sequences = [asked(f"s{i}", text) for i, text in enumerate(texts)]
    for _ in range(6):
        some = rng.sample(sequences, 2)
        drafts = model.drafts(some, 3)
        for sequence, tokens in zip(some, drafts, strict=True):
            if tokens:
                alone = run_to_end(load_plain(engine), [make_request("x", sequence.token_ids, max_tokens=3)])["x"]
                assert tokens_of(alone) == tokens
            sequence.token_ids += [*tokens[: rng.randrange(4)], rng.randrange(3, 200)]
    held = [read.blocks for read in model._read.values()]
    model._pool.check(held)
    assert model.drafts([asked("foreign", [5, model.model.vocab_size])], 2) == [[]]
    assert model.drafts([asked("long", [5] * SIZES["max_model_len"])], 2) == [[]]


def load_plain(engine: Engine) -> Engine:
    return Engine(engine.worker, engine.scheduler.config, overlaps=False)


def followed(chance: float, most: int) -> Followed:
    chances = Chances(most, 1.0)
    row = chances.of(9)
    row[:] = [chance ** (place + 1) for place in range(most)]
    return Followed(chances)


@pytest.mark.parametrize(
    ("draft_seconds", "chance", "expected"), [(0.1, 0.9, 7), (0.1, 0.3, 1), (0.9, 0.9, 0), (0.1, 0.05, 0)]
)
def test_as_many_drafts_are_asked_for_as_pay(draft_seconds: float, chance: float, expected: int) -> None:
    costs = Costs(0.5)
    for tokens, seconds in {1: 1.0, 2: 1.05, 3: 1.1, 4: 1.15, 6: 1.3, 8: 1.4}.items():
        for _ in range(3):
            costs.steps.observe(tokens, seconds)
    for _ in range(3):
        costs.drafts.observe(1, draft_seconds)
    model: Any = None
    speculation = ModelSpeculation(model, lambda _: 7, 7, costs)
    assert speculation._choose([followed(chance, 7)]) == expected


def test_before_anything_is_measured_the_weights_say_what_a_draft_costs() -> None:
    model: Any = None
    for ratio, expected in ((0.05, 5), (1.0, 0)):
        speculation = ModelSpeculation(model, lambda _: 5, 5, Costs(ratio))
        assert speculation._choose([followed(0.95, 5)]) == expected


def test_tokenizers_are_compared_by_what_their_tokens_mean(fixtures: Path, tmp_path: Path) -> None:
    one, other, third = (tmp_path / name for name in ("one", "other", "third"))
    for directory in (one, other, third):
        directory.mkdir()
    shutil.copy(fixtures / "tiny" / "tokenizer.json", one)
    content = json.loads((one / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(content, indent=3))
    check_tokenizers(one, other)
    vocab = content["model"]["vocab"]
    first, second = list(vocab)[7:9]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"must have the tokenizer of the model that is served: '.*' is token 7 in"):
        check_tokenizers(one, other)
    with pytest.raises(ValueError, match=r"none of tokenizer\.json, "):
        check_tokenizers(one, third)


def test_ranks_are_refused() -> None:
    config = SpeculativeConfig("draft_model", model="small")
    config.check(1)
    with pytest.raises(ValueError, match=r"2 ranks.*one rank works"):
        config.check(2)
    SpeculativeConfig("ngram").check(2)
