"""Whisper against transformers: the same random weights in float32, through the engine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_whisper
import torch
import transformers
from safetensors.torch import save_file
from tiny_whisper import END, FIRST_TIME, IDS, NUM_MELS, POSITIONS
from torch import Tensor
from toy_model import answers_to

from octavo.kernels.attention.step import NewSource, SourceRows, StepInputs
from octavo.quant.checkpoint import Checkpoint
from octavo.runtime.config import EngineConfig
from octavo.runtime.messages import AddRequest, SamplingParams
from octavo.runtime.model.encdec import EncoderDecoder
from octavo.runtime.model.sources import LoadError
from octavo.runtime.model.spec import UnsupportedModelError
from octavo.runtime.model.weights import load_model
from octavo.runtime.source_messages import AnswerRules
from octavo.runtime.startup import load_engine
from octavo.runtime.worker import kv_cache

START = IDS["startoftranscript"]
PLAIN = ((IDS["en"],), (IDS["transcribe"],), (IDS["notimestamps"],))
BOTH = (POSITIONS, POSITIONS)
Truth = transformers.WhisperForConditionalGeneration


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    directory = tmp_path_factory.mktemp("whisper")
    return directory, tiny_whisper.make_whisper(directory)


def features(seed: int) -> Tensor:
    return torch.randn(NUM_MELS, 2 * POSITIONS, generator=torch.Generator().manual_seed(seed))


def sent(of: Tensor) -> bytes:
    return of.numpy().astype("<f4").tobytes()


def config_of(directory: Path, **options: object) -> EngineConfig:
    return EngineConfig(model=str(directory), dtype="float32", max_num_seqs=4, device="cpu", **options)  # type: ignore[arg-type]


def request(name: str, of: Tensor, rules: AnswerRules, prompt: list[int] | None = None, **params: object) -> AddRequest:
    forbidden = tuple((token,) for token in tiny_whisper.SUPPRESSED)
    given = {"max_tokens": 30, "temperature": 0.0, "stop_token_ids": (END,), "forbidden": forbidden} | params
    sampling = SamplingParams(**given, rules=rules)  # type: ignore[arg-type]
    return AddRequest(name, prompt or [START], sampling, 0.0, features=sent(of))


def test_logits_are_those_of_transformers(made: tuple[Path, Truth]) -> None:
    """A step in which two sequences begin, one of them with a long prompt, and a step of single tokens."""
    directory, theirs = made
    model = load_model(config_of(directory))
    assert isinstance(model, EncoderDecoder)
    caches = kv_cache.allocate(model, 8, 16, torch.float32)
    ids = [[START, *PLAIN[0], 5, 77, 140], list(range(20, 40))]
    heard = [features(0), features(1)]
    lengths = [len(one) for one in ids]
    flat = [token for one in ids for token in one]
    step = StepInputs.prefill(lengths, 16, token_ids=flat, logits_index=torch.arange(len(flat)))
    places = (2, 0)
    new = tuple(NewSource((place,), one) for place, one in zip(places, heard, strict=True))
    first = model.forward(_with(step, SourceRows(places, BOTH, new)), caches)
    longer = StepInputs.decode([length + 1 for length in lengths], 16, token_ids=[9, 10], tables=step.block_tables)
    second = model.forward(_with(longer, SourceRows(places, BOTH, ())), caches)
    ends = np.cumsum(lengths)
    for place, (tokens, audio) in enumerate(zip(ids, heard, strict=True)):
        with torch.inference_mode():
            decoded = torch.tensor([[*tokens, 9 + place]])
            truth = theirs(input_features=audio[None], decoder_input_ids=decoded).logits[0]
        own = torch.cat([first[ends[place] - lengths[place] : ends[place]], second[place : place + 1]])
        torch.testing.assert_close(own, truth, atol=1e-4, rtol=1e-4)


def _with(step: StepInputs, sources: SourceRows) -> StepInputs:
    return replace(step, sources=sources)


@pytest.mark.parametrize("has_times", [False, True])
def test_answers_of_a_batch_are_those_that_transformers_generates(made: tuple[Path, Truth], has_times: bool) -> None:
    """Greedy answers to five pieces of audio, more than there are places, with and without timestamps."""
    directory, theirs = made
    engine, ready = load_engine(config_of(directory, max_num_batched_tokens=16), 0.0)
    assert ready.source is not None
    assert ready.source.places == 4
    first = FIRST_TIME if has_times else None
    starts = PLAIN[:2] if has_times else PLAIN
    rules = AnswerRules(starts, tuple(tiny_whisper.NEVER_FIRST), first, FIRST_TIME + 25 if has_times else None, END)
    also = ((IDS["notimestamps"],),) if has_times else ()
    forbidden = (*((token,) for token in tiny_whisper.SUPPRESSED), *also)
    heard = [features(seed) for seed in range(5)]
    found = answers_to(engine, [request(str(i), one, rules, forbidden=forbidden) for i, one in enumerate(heard)])
    for i, one in enumerate(heard):
        truth = theirs.generate(
            one[None],
            language="en",
            task="transcribe",
            return_timestamps=has_times,
            max_new_tokens=30 - len(starts),
            return_dict_in_generate=True,
            return_segments=False,
            force_unique_generate_call=True,
        ).sequences[0]
        said = truth.tolist()
        assert found[str(i)] == said[1 : 1 + len(found[str(i)])]
        assert len(found[str(i)]) > len(starts) + 3
        if has_times:
            assert any(token >= FIRST_TIME for token in found[str(i)])


def test_the_language_is_the_one_that_transformers_detects(made: tuple[Path, Truth]) -> None:
    directory, theirs = made
    engine, _ = load_engine(config_of(directory), 0.0)
    languages = tuple(IDS[code] for code in ("en", "de", "haw"))
    heard = [features(seed) * (1 + seed % 3) + 2.0 * (seed - 6) for seed in range(12)]
    rules = AnswerRules((languages,))
    found = answers_to(engine, [request(str(i), one, rules, max_tokens=1) for i, one in enumerate(heard)])
    truth = theirs.detect_language(torch.stack(heard)).tolist()
    assert [found[str(i)][0] for i in range(len(heard))] == truth


def test_a_forced_token_is_the_likeliest_of_its_list(made: tuple[Path, Truth]) -> None:
    """Though it is suppressed, or the request is sampled at a high temperature."""
    directory, theirs = made
    engine, _ = load_engine(config_of(directory), 0.0)
    heard = [features(seed) * (1 + seed % 3) + 2.0 * (seed - 6) for seed in range(12)]
    rules = AnswerRules((tuple(range(20)), (1,)))
    asked = [request(str(i), one, rules, max_tokens=2, temperature=9.0) for i, one in enumerate(heard)]
    found = answers_to(engine, asked)
    with torch.inference_mode():
        logits = theirs(input_features=torch.stack(heard), decoder_input_ids=torch.full((12, 1), START)).logits.clone()
        logits[:, 0, [token for token in tiny_whisper.SUPPRESSED if token < 20]] = float("-inf")
    truth = logits[:, 0, :20].argmax(dim=-1).tolist()
    assert [found[str(i)] for i in range(len(heard))] == [[token, 1] for token in truth]
    assert len(set(truth)) > 2


def test_one_begins_at_a_time(made: tuple[Path, Truth]) -> None:
    """A step reads one source: answers under way wait for no more."""
    directory, _ = made
    engine, _ = load_engine(config_of(directory), 0.0)
    for place in range(3):
        assert engine.add(request(str(place), features(place), AnswerRules(PLAIN))) == []
    plans = [engine.scheduler.plan() for _ in range(3)]
    assert [sum(it.is_new for it in plan.scheduled) for plan in plans] == [1, 1, 1]


def test_a_sequence_that_gives_its_blocks_back_is_read_again(made: tuple[Path, Truth]) -> None:
    directory, _ = made
    rules = AnswerRules(PLAIN, tuple(tiny_whisper.NEVER_FIRST), None, None, END)
    wanted = [request(str(i), features(i), rules, max_tokens=40, stop_token_ids=()) for i in range(3)]
    roomy, _ = load_engine(config_of(directory, block_size=4), 0.0)
    tight, _ = load_engine(config_of(directory, block_size=4, num_blocks=17), 0.0)
    truth = answers_to(roomy, wanted)
    assert answers_to(tight, wanted) == truth
    assert tight.stats().num_preemptions > 0
    assert roomy.stats().num_preemptions == 0


@pytest.mark.parametrize("dtype", ["int8", "int4", "fp8"])
def test_weights_are_rounded_at_load(made: tuple[Path, Truth], dtype: str) -> None:
    """Near enough to the truth to be the same model: 8 bits are, and 4 are farther off than 8."""
    directory, theirs = made
    config = EngineConfig(model=str(directory), dtype=dtype, max_num_seqs=1, device="cpu")  # type: ignore[arg-type]
    model = load_model(config)
    caches = kv_cache.allocate(model, 1, 16, model.dtype)
    tokens = [START, 5, 77, 140]
    step = StepInputs.prefill([4], 16, token_ids=tokens, logits_index=torch.arange(4))
    own = model.forward(_with(step, SourceRows((0,), (POSITIONS,), (NewSource((0,), features(0)),))), caches)
    with torch.inference_mode():
        truth = theirs(input_features=features(0)[None], decoder_input_ids=torch.tensor([tokens])).logits[0]
    assert torch.cosine_similarity(own.flatten(), truth.flatten(), dim=0) > (0.9 if dtype == "int4" else 0.98)


def test_what_a_request_lacks_is_said(made: tuple[Path, Truth]) -> None:
    directory, _ = made
    engine, _ = load_engine(config_of(directory), 0.0)
    params = SamplingParams(max_tokens=1)
    (missing,) = engine.add(AddRequest("a", [START], params, 0.0))
    assert missing.error is not None
    assert "reads 80 x 100 numbers" in missing.error
    twice = engine.add(AddRequest("b", [START], params, 0.0, features=sent(features(0)), other_ids=["b2"]))
    assert [output.error for output in twice] == ["other_ids: a request with features has one answer"] * 2
    empty = SamplingParams(max_tokens=1, rules=AnswerRules(((),)))
    (refused,) = engine.add(AddRequest("c", [START], empty, 0.0, features=sent(features(0))))
    assert refused.error == "rules.starts has an empty list of tokens"


REFUSED = {
    "deterministic": True,
    "load_format": "dummy",
    "model_impl": "hf",
    "lm_head_dtype": "int8",
    "runner": "pooling",
    "max_model_len": 65,
}


@pytest.mark.parametrize("option", REFUSED)
def test_what_is_not_served_is_refused_by_name(made: tuple[Path, Truth], option: str) -> None:
    directory, _ = made
    with pytest.raises(LoadError, match=f"--{option.replace('_', '-')}"):
        load_model(config_of(directory, **{option: REFUSED[option]}))


def test_another_head_and_another_computation_are_refused(made: tuple[Path, Truth], tmp_path: Path) -> None:
    directory, _ = made
    config = json.loads((directory / "config.json").read_text())
    for change, name in (
        ({"architectures": ["WhisperForAudioClassification"]}, "WhisperForAudioClassification"),
        ({"scale_embedding": True}, "scale_embedding"),
        ({"activation_function": "mish"}, "mish"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises((UnsupportedModelError, ValueError), match=name):
            load_model(config_of(tmp_path))


def test_a_tensor_too_many_is_named(made: tuple[Path, Truth], tmp_path: Path) -> None:
    directory, _ = made
    checkpoint = Checkpoint.open(directory)
    tensors = {name: checkpoint.tensor(name).clone() for name in checkpoint.names}
    save_file(tensors | {"model.decoder.layers.0.gate.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    with pytest.raises(LoadError, match=r"decoder\.layers\.0\.gate"):
        load_model(config_of(tmp_path))
