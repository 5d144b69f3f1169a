"""EAGLE-3 heads: what they say is what their formula says, no answer shows them, and a right one saves steps."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
import torch
from draft_engines import KINDS, SIZES, assert_same_answers, said
from hf_oracle import make_hf, save
from made_heads import (
    LAYER,
    VOCAB,
    Made,
    MtpReference,
    Reference,
    make_blind,
    make_mimo,
    make_target,
    mtp_of_speculators,
    of_eagle,
    of_speculators,
    seeing,
)
from safetensors.torch import load_file, save_file
from slow_cases import slow
from torch import Tensor
from toy_model import make_request, run_to_end, tokens_of

from octavo.kernels.native import cpu_features
from octavo.quant.checkpoint import Checkpoint
from octavo.runtime.config import EngineConfig
from octavo.runtime.engine import Engine
from octavo.runtime.messages import AddRequest, Logprobs, TokenOutput
from octavo.runtime.model.inventory import check_dense
from octavo.runtime.scheduling.sequence import Sequence
from octavo.runtime.speculation import head_drafts
from octavo.runtime.speculation.config import SpeculativeConfig
from octavo.runtime.speculation.head_drafts import HeadDrafts
from octavo.runtime.speculation.model_speculation import ModelSpeculation
from octavo.runtime.startup import load_engine

MADE: dict[str, Callable[[], Made]] = {
    "eagle": of_eagle,
    "speculators": of_speculators,
    "normed": lambda: of_speculators("norm_before_residual", "norm_before_fc", "norm_output"),
    "each normed": lambda: of_speculators("fc_norm", "norm_before_residual", num_states=4),
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(its directory, transformers' own)."""
    directory = tmp_path_factory.mktemp("target")
    return directory, make_target(directory)


def load(
    directory: Path,
    head: Path | None = None,
    count: int = 3,
    method: Literal["eagle3", "mtp"] = "eagle3",
    **limits: Any,
) -> Engine:
    """In float32. A head says `count` tokens each time, whatever that costs; one in the model's directory, too."""
    model = "" if head == directory else str(head)
    speculative = None if head is None else SpeculativeConfig(method, count, model=model)
    config = EngineConfig(
        model=str(directory), dtype="float32", device="cpu", speculative_config=speculative, **{**SIZES, **limits}
    )
    engine, _ = load_engine(config, time.time())
    if head is not None:
        engine.speculation = ModelSpeculation(drafts_of(engine), lambda _: count, count)
    return engine


def drafts_of(engine: Engine) -> HeadDrafts:
    assert isinstance(engine.speculation, ModelSpeculation)
    model = engine.speculation._model
    assert isinstance(model, HeadDrafts)
    return model


class Recorded:
    """In the place of a DraftChoice: notes what logits there were for which tokens and drafts."""

    def __init__(self, drafts: HeadDrafts) -> None:
        self._choice = drafts._choice
        self._drafts: dict[Sequence, list[int]] = {}
        self.calls: list[tuple[list[int], list[int], Tensor]] = []
        drafts._choice = self  # type: ignore[assignment]

    def choose(self, logits: Tensor, batch: list[Sequence], place: int) -> list[int]:
        chosen = self._choice.choose(logits.clone(), batch, place)
        for sequence, row, token in zip(batch, logits.clone(), chosen, strict=True):
            drafts = self._drafts.setdefault(sequence, [])
            if place == 0:
                drafts.clear()
            self.calls.append((list(sequence.token_ids), list(drafts), row))
            drafts.append(token)
        return chosen


def requests(rng: random.Random, longest: int = 30, **params: Any) -> list[AddRequest]:
    return [
        make_request(
            f"r{i}",
            [rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, longest))],
            **{"max_tokens": 30, **kind, **params},
        )
        for i, kind in enumerate(KINDS)
    ]


@pytest.mark.parametrize("kind", ["eagle", slow("speculators"), "normed", slow("each normed")])
def test_logits_are_the_formula_s(kind: str, target: tuple[Path, Any], tmp_path: Path) -> None:
    """Of prompts in chunks, in batches, behind refused drafts and preemptions, and behind cached prefixes."""
    directory, model = target
    made = MADE[kind]()
    engine = load(directory, made.write(tmp_path), num_blocks=24, max_num_batched_tokens=9)
    recorded = Recorded(drafts_of(engine))
    wanted = requests(random.Random(1))
    long = make_request("long", [rng_token(i) for i in range(40)], max_tokens=9)
    run_to_end(engine, [*wanted, long])
    hits = engine.scheduler.stats().prefix_cache_hits
    run_to_end(engine, [long])  # all of its prompt goes on in the cache as it does here
    assert engine.scheduler.stats().prefix_cache_hits > hits
    assert engine.scheduler.stats().num_preemptions
    reference = Reference(made, model)
    some = [*random.Random(2).sample(recorded.calls, 12), *recorded.calls[-3:]]
    assert {len(drafts) for _, drafts, _ in some} == {0, 1, 2}
    for tokens, drafts, found in some:
        torch.testing.assert_close(found.double(), reference.logits(tokens, drafts), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["MiMo", "speculators"])
def test_an_mtp_head_s_logits_are_its_formula_s(kind: str, target: tuple[Path, Any], tmp_path: Path) -> None:
    """Of prompts in chunks, of whose last layer the head reads all tokens; answers are the model's alone."""
    if kind == "MiMo":
        made, model = make_mimo(tmp_path)
        directory = head = tmp_path
        assert check_dense(Checkpoint.open(directory)).num_mtp_layers == 1  # as `octavo quantize` looks at it
    else:
        directory, model = target
        made = mtp_of_speculators()
        head = made.write(tmp_path)
    engine = load(directory, head, method="mtp", max_num_batched_tokens=9)
    recorded = Recorded(drafts_of(engine))
    wanted = requests(random.Random(1))
    found = run_to_end(engine, wanted)
    expected = run_to_end(load(directory), wanted)
    assert {name: said(it) for name, it in found.items()} == {name: said(it) for name, it in expected.items()}
    greedy = said(found["r0"])[0]
    ids = list(wanted[0].token_ids)
    for token in greedy[:6]:
        assert int(model(torch.tensor([ids])).logits[0, -1].argmax()) == token
        ids.append(token)
    reference = MtpReference(made, model)
    for tokens, drafts, row in random.Random(2).sample(recorded.calls, 15):
        torch.testing.assert_close(row.double(), reference.logits(tokens, drafts), rtol=1e-3, atol=1e-3)


def test_a_head_sees_what_the_model_s_blocks_hold(tmp_path: Path) -> None:
    """Of a model all of whose layers have a window, blocks before it are given to others."""
    model = make_hf("Mistral", {"sliding_window": 7, "max_position_embeddings": 256})
    save(model, tmp_path / "model")
    made = of_eagle()
    engine = load(tmp_path / "model", made.write(tmp_path / "head"), num_blocks=24)
    recorded = Recorded(drafts_of(engine))
    wanted = requests(random.Random(1))
    expected = run_to_end(load(tmp_path / "model"), wanted)
    found = run_to_end(engine, wanted)
    assert {name: said(it) for name, it in found.items()} == {name: said(it) for name, it in expected.items()}
    reference = Reference(made, model.double(), window=7)
    for tokens, drafts, row in random.Random(2).sample(recorded.calls, 12):
        torch.testing.assert_close(row.double(), reference.logits(tokens, drafts), rtol=1e-3, atol=1e-3)


def rng_token(place: int) -> int:
    return 3 + place * 37 % (VOCAB - 3)


@pytest.mark.parametrize(
    ("kind", "limits"),
    [
        ("eagle", {}),
        ("normed", {"num_blocks": 24, "max_num_batched_tokens": 9, "block_size": 4}),
        slow("eagle", {"num_blocks": 80, "block_size": 1, "max_model_len": 64, "enable_prefix_caching": False}),
    ],
)
def test_a_head_changes_no_answer(kind: str, limits: dict[str, Any], target: tuple[Path, Any], tmp_path: Path) -> None:
    """One that knows nothing: tokens and ends are those of the model alone."""
    directory, _ = target
    plain = load(directory)
    engine = load(directory, MADE[kind]().write(tmp_path), **limits)
    assert_same_answers(plain, engine, requests)
    stats = engine.scheduler.stats()
    assert stats.num_draft_tokens > 100
    assert stats.num_draft_tokens > sum(stats.accepted_per_pos)
    if limits:
        assert stats.num_preemptions
    engine.scheduler.pool.check([])


@pytest.mark.skipif(not cpu_features.has_dot_products(), reason="needs AVX-512 BF16 and VNNI")
def test_deterministic_answers_are_the_same_to_the_bit(target: tuple[Path, Any], tmp_path: Path) -> None:
    wanted = requests(random.Random(3), logprobs=2)
    plain, drafted = (
        {name: exactly(it) for name, it in run_to_end(load(target[0], head, deterministic=True), wanted).items()}
        for head in (None, of_eagle().write(tmp_path))
    )
    assert drafted == plain


def exactly(outputs: list[TokenOutput]) -> tuple[list[int], list[Logprobs]]:
    """Tokens and log-probabilities, however many came at once."""
    return tokens_of(outputs), [entry for output in outputs for entry in output.logprobs or []]


def test_an_answer_that_another_engine_has_begun_goes_on(target: tuple[Path, Any], tmp_path: Path) -> None:
    """Its tokens so far come with the prompt, and nobody here has said what the head reads of them."""
    directory, _ = target
    engine = load(directory, of_eagle().write(tmp_path))
    whole = make_request("a", [5, 6, 7], max_tokens=30, temperature=1.0, seed=3)
    tokens = said(run_to_end(engine, [whole])["a"])[0]
    begun = msgspec.structs.replace(whole, token_ids=[5, 6, 7, *tokens[:12]], num_prompt=3)
    assert said(run_to_end(engine, [begun])["a"])[0] == tokens[12:]


@pytest.mark.parametrize("limits", [{}, {"max_num_batched_tokens": 5, "num_blocks": 30}])
def test_all_drafts_of_a_head_that_is_right_are_taken(limits: dict[str, int], tmp_path: Path) -> None:
    """At any temperature, as both draw with the same numbers, and behind prefixes that the cache had."""
    directory = make_blind(tmp_path / "model")
    engine = load(directory, seeing().write(tmp_path / "head"), count=5, **limits)
    plain = load(directory)
    wanted = requests(random.Random(3))[:4]
    expected = run_to_end(plain, wanted)
    for _ in range(2):
        found = run_to_end(engine, wanted)
        assert {name: said(it) for name, it in found.items()} == {name: said(it) for name, it in expected.items()}
    stats = engine.scheduler.stats()
    assert sum(stats.accepted_per_pos) == stats.num_draft_tokens > 100
    assert len(stats.accepted_per_pos) > 3


def test_steps_are_recorded_with_a_head(target: tuple[Path, Any], tmp_path: Path) -> None:
    """A step that is replayed keeps what its layers say as one that is not."""
    directory, model = target
    made = of_speculators()
    engine = load(directory, made.write(tmp_path))
    recorded = Recorded(drafts_of(engine))
    run_to_end(engine, [make_request("a", [5, 6, 7], max_tokens=60)])
    assert engine.worker.replays is not None
    assert engine.worker.replays.proven
    reference = Reference(made, model)
    for tokens, drafts, found in recorded.calls[-9:]:
        torch.testing.assert_close(found.double(), reference.logits(tokens, drafts), rtol=1e-3, atol=1e-3)


def test_it_reads_what_it_kept_only_when_it_is_asked(target: tuple[Path, Any], tmp_path: Path) -> None:
    """While drafts don't pay, a pass is made for many tokens at once; then they go on as if it had read all along."""
    directory, model = target
    made = of_eagle()
    engine = load(directory, made.write(tmp_path), max_model_len=200)
    drafts = drafts_of(engine)
    most = {"drafts": 0}
    engine.speculation = ModelSpeculation(drafts, lambda _: most["drafts"], 3)
    recorded = Recorded(drafts)
    engine.add(make_request("a", [5, 6, 7], max_tokens=150))
    for _ in range(100):
        engine.step()
    assert not recorded.calls
    [read] = drafts._read.values()
    assert (read.num_computed, read.num_kept) == (64, 38)
    most["drafts"] = 3
    engine.step()
    tokens, said_before, found = recorded.calls[1]
    torch.testing.assert_close(found.double(), Reference(made, model).logits(tokens, said_before), rtol=1e-3, atol=1e-3)


def test_what_is_kept_of_all_sequences_is_bounded(
    target: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_drafts, "MOST_IN_ALL", 50)
    engine = load(target[0], of_eagle().write(tmp_path))
    drafts = drafts_of(engine)
    engine.speculation = ModelSpeculation(drafts, lambda _: 0, 3)
    for i in range(4):
        engine.add(make_request(f"r{i}", [5, 6, 7 + i], max_tokens=40))
    most = 0
    while engine.has_work:
        engine.step()
        kept = [read.num_kept for read in drafts._read.values()]
        assert sum(kept) < 50
        rows = [rows for read in drafts._read.values() for rows in read.kept]
        assert all(it.untyped_storage().nbytes() == it.nbytes for it in rows)  # it pins no step's memory
        most = max([most, *kept])
    assert most > 10


def test_a_prompt_that_is_read_at_once_is_not_kept(
    target: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It doesn't make the head read the other sequences early."""
    monkeypatch.setattr(head_drafts, "MOST_KEPT", 20)
    monkeypatch.setattr(head_drafts, "MOST_IN_ALL", 30)
    engine = load(target[0], of_eagle().write(tmp_path))
    drafts = drafts_of(engine)
    engine.speculation = ModelSpeculation(drafts, lambda _: 0, 3)
    engine.add(make_request("short", [5, 6, 7], max_tokens=12))
    while not any(read.num_kept == 5 for read in drafts._read.values()):
        engine.step()
    engine.add(make_request("long", [5 + i % 80 for i in range(40)], max_tokens=2))
    most = {}
    while engine.has_work:
        engine.step()
        for sequence, read in drafts._read.items():
            most[sequence.request_id] = max(most.get(sequence.request_id, 0), read.num_kept)
    assert most["short"] > 10
    assert most["long"] < 20


def test_it_sleeps_with_the_engine(tmp_path: Path) -> None:
    directory = make_blind(tmp_path / "model")
    engine = load(directory, seeing().write(tmp_path / "head"), count=5)
    wanted = requests(random.Random(3))[:4]
    expected = run_to_end(engine, wanted)
    _, asleep = engine.sleep()
    assert not asleep.error
    assert not any(cache.key.any() for cache in engine.worker.draft_caches)
    found = run_to_end(engine, wanted)
    assert {name: said(it) for name, it in found.items()} == {name: said(it) for name, it in expected.items()}
    stats = engine.scheduler.stats()
    assert sum(stats.accepted_per_pos) == stats.num_draft_tokens


def test_what_an_mtp_head_can_t_be_is_one_line(target: tuple[Path, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model_type 'llama' has no MTP layer that octavo reads; those of MiMo"):
        load(target[0], target[0], method="mtp")
    made, _ = make_mimo(tmp_path / "mimo")
    inner = LAYER | {"model_type": "qwen3", "hidden_size": 32}
    head = with_config(mtp_of_speculators(), transformer_layer_config=inner).write(tmp_path / "small")
    with pytest.raises(ValueError, match="for 96 tokens and hidden states of 32 numbers"):
        load(target[0], head, method="mtp")
    head = with_tensors(mtp_of_speculators(), extra=torch.zeros(1)).write(tmp_path / "more")
    with pytest.raises(ValueError, match="nothing reads: extra"):
        load(target[0], head, method="mtp")
    weights = tmp_path / "mimo" / "model.safetensors"
    save_file(load_file(weights) | {f"{made.layer}.extra": torch.zeros(1)}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"nothing reads: model\.mtp_layers\.0\.extra$"):
        load(tmp_path / "mimo", tmp_path / "mimo", method="mtp")
    (tmp_path / "mimo" / "config.json").write_text(json.dumps(made.config | {"num_nextn_predict_layers": 2}))
    with pytest.raises(ValueError, match="num_nextn_predict_layers 2: heads of one layer"):
        load(tmp_path / "mimo", tmp_path / "mimo", method="mtp")


def without(made: Made, *names: str) -> Made:
    return Made(made.config, {name: it for name, it in made.tensors.items() if name not in names}, made.ids)


def with_config(made: Made, **keys: Any) -> Made:
    return Made(made.config | keys, made.tensors, made.ids)


def with_tensors(made: Made, **tensors: Tensor) -> Made:
    return Made(made.config, made.tensors | tensors, made.ids)


WRONG: dict[str, tuple[Callable[[], Made], str]] = {
    "another tensor": (lambda: with_tensors(of_eagle(), extra=torch.zeros(1)), "nothing reads: extra"),
    "a bias": (
        lambda: with_tensors(of_eagle(), **{"midlayer.self_attn.q_proj.bias": torch.ones(64)}),
        r"nothing reads: midlayer\.self_attn\.q_proj\.bias",
    ),
    "no fc": (lambda: without(of_eagle(), "fc.weight"), r"no tensor fc\.weight"),
    "no d2t": (lambda: without(of_eagle(), "d2t", "t2d"), "draft_vocab_size 40 without d2t"),
    "t2d of another": (lambda: with_tensors(of_eagle(), t2d=torch.ones(VOCAB).bool()), "t2d names 96 tokens"),
    "tokens beyond": (lambda: with_tensors(of_eagle(), d2t=torch.full((40,), 60)), "tokens 60 to 99; the model has 96"),
    "a larger model's": (
        lambda: with_config(of_eagle(), target_hidden_size=128),
        "128 numbers, and the model's have 64",
    ),
    "layers beyond": (
        lambda: with_config(of_eagle(), eagle_aux_hidden_state_layer_ids=[1, 5]),
        r"ids \[1, 5\]: 5 is no layer's output of the model, which has 4 layers; 1 to 4 work",
    ),
    "two layers": (lambda: with_config(of_eagle(), num_hidden_layers=2), "num_hidden_layers 2: heads of one layer"),
    "EAGLE-1": (
        lambda: with_config(of_eagle(), eagle_config={"use_aux_hidden_state": False}),
        "that is EAGLE-1; EAGLE-3 and MTP are supported",
    ),
    "a config that is none": (
        lambda: with_config(of_eagle(), eagle_config=[1]),
        r"eagle_config \[1\] is no object",
    ),
    "ids that are none": (
        lambda: with_config(of_eagle(), eagle_config={"eagle_aux_hidden_state_layer_ids": ["1", 2]}),
        r"eagle_aux_hidden_state_layer_ids \['1', 2\] is no list of integers",
    ),
    "a number as ids": (
        lambda: with_config(of_eagle(), eagle_config={"eagle_aux_hidden_state_layer_ids": 7}),
        "eagle_aux_hidden_state_layer_ids 7 is no list of integers",
    ),
    "several at once": (lambda: with_config(of_eagle(), parallel_drafting=True), "several tokens at once"),
    "another method's": (
        lambda: with_config(of_speculators(), speculators_model_type="dflash"),
        "speculators_model_type 'dflash': 'eagle3'",
    ),
    "an unknown activation": (lambda: with_config(of_eagle(), hidden_act="relu"), "hidden_act 'relu' is unknown"),
}


def test_a_head_that_says_no_numbers_is_refused_or_says_nothing(target: tuple[Path, Any], tmp_path: Path) -> None:
    """At start; and where it comes to that later, answers are what they are."""
    made = of_eagle()
    broken = {name: it.clone() for name, it in made.tensors.items()}
    broken["norm.weight"][3] = torch.nan
    with pytest.raises(ValueError, match="no finite numbers: its weights are broken"):
        load(target[0], Made(made.config, broken, made.ids).write(tmp_path / "broken"))
    engine = load(target[0], made.write(tmp_path / "head"))
    wanted = requests(random.Random(4))
    expected = run_to_end(load(target[0]), wanted)
    with torch.inference_mode():
        for weight in drafts_of(engine).head.layer.enter.tensors():
            weight[5] = torch.nan
    found = run_to_end(engine, wanted)
    assert {name: said(it) for name, it in found.items()} == {name: said(it) for name, it in expected.items()}


@pytest.mark.parametrize("what", WRONG)
def test_what_a_head_can_t_be_is_one_line(what: str, target: tuple[Path, Any], tmp_path: Path) -> None:
    made, why = WRONG[what]
    with pytest.raises(ValueError, match=why) as error:
        load(target[0], made().write(tmp_path))
    assert str(error.value).startswith("--speculative-config: the head ")
    assert "\n" not in str(error.value)


def test_pickles_are_refused_with_what_reads_them(target: tuple[Path, Any], tmp_path: Path) -> None:
    of_eagle().write(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"is a pickle.*weights_only=True"):
        load(target[0], tmp_path)


def test_a_head_is_no_draft_model(target: tuple[Path, Any], tmp_path: Path) -> None:
    """vLLM tells one by its name, so that configurations without a method are about."""
    for made, method in ((of_eagle(), "eagle3"), (of_speculators(), "eagle3"), (mtp_of_speculators(), "mtp")):
        config = EngineConfig(
            model=str(target[0]),
            device="cpu",
            speculative_config=SpeculativeConfig("draft_model", model=str(made.write(tmp_path / method))),
        )
        with pytest.raises(ValueError, match=f"is a head, and no model: the method {method} drafts with it"):
            load_engine(config, time.time())


def test_what_a_head_can_t_be_with(target: tuple[Path, Any], tmp_path: Path) -> None:
    head = of_eagle().write(tmp_path)
    config = SpeculativeConfig("eagle3", model="head")
    config.check(1)
    with pytest.raises(ValueError, match=r"2 ranks.*an EAGLE-3 head is not divided"):
        config.check(2)
    with pytest.raises(ValueError, match="with --kv-offloading-path: what an EAGLE-3 head has read"):
        config.check(1, offloads=True)
    with pytest.raises(ValueError, match="transformers' own code, which does not say what a head reads"):
        load(target[0], head, model_impl="hf")
