"""Encoder-decoders of text against transformers: the same random weights in float32, alone and through the engine."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_encdec
import torch
from safetensors.torch import load_file, save_file
from slow_cases import slow
from tiny_encdec import END, LONGEST, PAD
from toy_model import answers_to

from octavo.kernels.attention.step import NewSource, SourceRows, StepInputs
from octavo.runtime.config import EngineConfig, PoolerConfig
from octavo.runtime.messages import AddRequest, SamplingParams
from octavo.runtime.model.encdec import EncoderDecoder
from octavo.runtime.model.sources import LoadError
from octavo.runtime.model.spec import UnsupportedModelError
from octavo.runtime.model.weights import load_model
from octavo.runtime.parallel.config import ParallelConfig
from octavo.runtime.source_messages import AnswerRules, TextSource
from octavo.runtime.startup import load_engine
from octavo.runtime.worker import kv_cache

ANSWER = 24
SHORT = ("t5", "bart")  # of whose answers the default suite hears


def config_of(directory: Path, **options: object) -> EngineConfig:
    given = {"dtype": "float32", "max_num_seqs": 4, "device": "cpu"} | options
    return EngineConfig(model=str(directory), **given)  # type: ignore[arg-type]


def loaded(directory: Path, **options: object) -> EncoderDecoder:
    model = load_model(config_of(directory, **options))
    assert isinstance(model, EncoderDecoder)
    return model


@pytest.fixture(scope="module")
def flan(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("flan")
    return directory, tiny_encdec.make("t5, FLAN's", directory)


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("bart")
    return directory, tiny_encdec.make("bart", directory)


@pytest.mark.parametrize("name", tiny_encdec.CASES)
def test_it_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    """The encoder's output, and logits: of a step in which three sequences begin, two of them with the same text, of a
    step of single tokens, and of chunks."""
    theirs = tiny_encdec.make(name, tmp_path)
    model = loaded(tmp_path)
    first, second = tiny_encdec.texts(2)
    with torch.inference_mode():
        for text in (first, second):
            heard = model.stack.encoder.forward([torch.tensor(text)], None)
            truth = theirs.get_encoder()(torch.tensor([text])).last_hidden_state[0]
            torch.testing.assert_close(heard, truth, atol=1e-4, rtol=1e-4)
    sources = [first, second, second]
    decoded = [[PAD, 5, 77, 40], list(range(20, 50)), [PAD]]
    more = [[9, 10, 11], [12, 13, 14], [15, 16, 17]]
    caches = kv_cache.allocate(model, 9, 16, torch.float32)
    places = (2, 0, 3)
    lengths = tuple(map(len, sources))
    new = (NewSource((2,), torch.tensor(first)), NewSource((0, 3), torch.tensor(second)))
    sizes = [len(one) for one in decoded]
    tables = np.arange(9, dtype=np.int32).reshape(3, 3)
    rows: list[list[torch.Tensor]] = [[], [], []]

    def compute(total: list[int], sizes: list[int], tokens: list[int], new: tuple[NewSource, ...]) -> None:
        wanted = torch.arange(len(tokens))
        step = StepInputs.prefill(total, 16, sizes=sizes, token_ids=tokens, tables=tables, logits_index=wanted)
        found = model.forward(replace(step, sources=SourceRows(places, lengths, new)), caches)
        for row, part in zip(rows, torch.split(found, sizes), strict=True):
            row.append(part)

    compute(sizes, sizes, list(chain(*decoded)), new)
    compute([size + 1 for size in sizes], [1, 1, 1], [tokens[0] for tokens in more], ())
    compute([size + 3 for size in sizes], [2, 2, 2], list(chain(*(tokens[1:] for tokens in more))), ())
    for source, begin, rest, row in zip(sources, decoded, more, rows, strict=True):
        truth = tiny_encdec.logits(theirs, source, begin + rest)
        assert truth.std() > 0.3, "trivially small logits prove nothing"
        torch.testing.assert_close(torch.cat(row), truth, atol=1e-4, rtol=1e-4)


def request(name: str, text: list[int], start: int, others: tuple[str, ...] = (), **params: object) -> AddRequest:
    given = {"max_tokens": ANSWER, "temperature": 0.0, "stop_token_ids": (END,)} | params
    sampling = SamplingParams(**given)  # type: ignore[arg-type]
    return AddRequest(name, [start], sampling, 0.0, other_ids=list(others), source_ids=text)


@pytest.mark.parametrize("name", [name if name in SHORT else slow(name) for name in tiny_encdec.NAMES])
def test_greedy_answers_are_those_that_transformers_generates(name: str, tmp_path: Path) -> None:
    """Of texts of different lengths, more than there are places: in a batch, and alone."""
    theirs = tiny_encdec.make(name, tmp_path, spread=1.5)
    engine, ready = load_engine(config_of(tmp_path), 0.0)
    assert ready.source == TextSource(LONGEST, 4, 2 if name == "m2m_100" else None)
    start = theirs.generation_config.decoder_start_token_id
    texts = tiny_encdec.texts(6, seed=1)
    found = answers_to(engine, [request(str(i), text, start) for i, text in enumerate(texts)])
    truth = {str(i): tiny_encdec.generated(theirs, text, ANSWER) for i, text in enumerate(texts)}
    assert found == truth
    assert len({tuple(answer) for answer in truth.values()}) > 3, "the texts must decide"
    assert answers_to(engine, [request("alone", texts[3], start)])["alone"] == truth["3"]


def test_answers_to_one_text_share_its_encoding(flan: tuple[Path, Any]) -> None:
    directory, theirs = flan
    engine, _ = load_engine(config_of(directory), 0.0)
    text = tiny_encdec.texts(1, seed=2)[0]
    sampled = {"temperature": 0.8, "seed": 3}
    both = answers_to(engine, [request("a", text, PAD, ("b",), **sampled)])
    alone = [answers_to(engine, [request("c", text, PAD, temperature=0.8, seed=seed)])["c"] for seed in (3, 4)]
    assert [both["a"], both["b"]] == alone
    assert engine.add(request("d", text, PAD, ("e", "f"))) == []
    (plan,) = [engine.scheduler.plan()]
    assert [it.is_new for it in plan.scheduled] == [True] * 3
    del theirs


def test_a_step_reads_no_more_than_some_texts(flan: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    directory, _ = flan
    monkeypatch.setattr("octavo.runtime.scheduling.plan.MAX_SOURCE_TOKENS", 25)
    engine, _ = load_engine(config_of(directory), 0.0)
    for name, length in (("a", 10), ("b", 15), ("c", 1), ("d", 40)):
        assert engine.add(request(name, [5] * length, PAD)) == []
    begun = []
    for _ in range(3):
        plan = engine.scheduler.plan()
        begun.append([it.sequence.request_id for it in plan.scheduled if it.is_new])
    assert begun == [["a", "b"], ["c"], ["d"]]


def test_a_sequence_that_gives_its_blocks_back_is_read_again(flan: tuple[Path, Any]) -> None:
    directory, _ = flan
    wanted = [
        request(str(i), text, PAD, max_tokens=40, stop_token_ids=()) for i, text in enumerate(tiny_encdec.texts(3))
    ]
    roomy, _ = load_engine(config_of(directory, block_size=4), 0.0)
    tight, _ = load_engine(config_of(directory, block_size=4, num_blocks=17), 0.0)
    assert answers_to(tight, wanted) == answers_to(roomy, wanted)
    assert tight.stats().num_preemptions > 0


def test_first_and_last_tokens_are_forced_as_by_transformers(tmp_path: Path) -> None:
    theirs = tiny_encdec.make("bart", tmp_path, forced_bos_token_id=7, forced_eos_token_id=END)
    engine, _ = load_engine(config_of(tmp_path), 0.0)
    rules = AnswerRules(((7,),), last_id=END)
    text = tiny_encdec.texts(1, seed=4)[0]
    found = answers_to(engine, [request("a", text, END, rules=rules, max_tokens=6)])["a"]
    assert found == tiny_encdec.generated(theirs, text, 6)
    assert (found[0], found[-1]) == (7, END)


def test_any_kv_cache_serves(flan: tuple[Path, Any]) -> None:
    """int8 caches round, so that logits differ a little."""
    directory, theirs = flan
    text = tiny_encdec.texts(1)[0]
    tokens = [PAD, 5, 77, 40, 9, 3]
    truth = tiny_encdec.logits(theirs, text, tokens)
    for kind in ("int8_per_token_head", "fp8_e4m3"):
        engine, _ = load_engine(config_of(directory, kv_cache_dtype=kind), 0.0)
        worker = engine.worker
        step = StepInputs.prefill([6], worker.caches[0].block_size, token_ids=tokens, logits_index=torch.arange(6))
        rows = SourceRows((0,), (len(text),), (NewSource((0,), torch.tensor(text)),))
        found = worker.model.forward(replace(step, sources=rows), worker.caches)
        assert torch.cosine_similarity(found.flatten(), truth.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4", "fp8"])
def test_other_types_are_near(flan: tuple[Path, Any], dtype: str) -> None:
    """Near enough to the truth to be the same model: 8 bits are, and 4 are farther off than 8."""
    directory, theirs = flan
    text = tiny_encdec.texts(1)[0]
    tokens = [PAD, 5, 77, 40]
    own = tiny_encdec.computed(loaded(directory, dtype=dtype), text, tokens)
    truth = tiny_encdec.logits(theirs, text, tokens)
    least = {"bfloat16": 0.999, "int4": 0.9}.get(dtype, 0.98)
    assert torch.cosine_similarity(own.flatten(), truth.flatten(), dim=0) > least


def test_lengths_are_the_config_s_or_what_was_asked_for(flan: tuple[Path, Any], bart: tuple[Path, Any]) -> None:
    """Distances go on for ever; positions end."""
    directory, theirs = flan
    model = loaded(directory, max_source_len=2 * LONGEST, max_model_len=3 * LONGEST)
    assert model.source == TextSource(2 * LONGEST, 4)
    assert model.max_position == 3 * LONGEST
    text = [4 + place % 80 for place in range(2 * LONGEST)]
    with torch.inference_mode():
        truth = theirs.get_encoder()(torch.tensor([text])).last_hidden_state[0]
        torch.testing.assert_close(model.stack.encoder.forward([torch.tensor(text)], None), truth, atol=1e-4, rtol=1e-4)
    assert loaded(bart[0], max_source_len=20).source == TextSource(20, 4)
    for option in ("max_source_len", "max_model_len"):
        with pytest.raises(LoadError, match=f"--{option.replace('_', '-')} 65: the model has 64 positions"):
            load_model(config_of(bart[0], **{option: 65}))


def test_what_a_request_lacks_is_said(flan: tuple[Path, Any]) -> None:
    engine, _ = load_engine(config_of(flan[0]), 0.0)
    for text, problem in (
        ([], "source_ids of 0 tokens: this model's encoder reads 1 to 64"),
        ([5] * 65, "source_ids of 65 tokens: this model's encoder reads 1 to 64"),
        ([96], "source_ids names token id 96, which is not in the vocabulary of 96 tokens"),
    ):
        (refused,) = engine.add(request("a", text, PAD))
        assert refused.error == problem
    heard = AddRequest("b", [PAD], SamplingParams(max_tokens=1), 0.0, features=b"1234", source_ids=[5])
    assert engine.add(heard)[0].error == "features: this model hears nothing, and reads text alone"


def test_padding_is_refused_in_a_text_in_which_it_has_no_position(tmp_path: Path) -> None:
    """Transformers places it where padding is, and what is behind it one position earlier."""
    theirs = tiny_encdec.make("m2m_100", tmp_path)
    table = theirs.get_encoder().embed_positions
    places = table.create_position_ids_from_input_ids(torch.tensor([[5, 2, 7]]), table.padding_idx)
    assert places.tolist() == [[3, 2, 4]]
    engine, ready = load_engine(config_of(tmp_path), 0.0)
    assert ready.source == TextSource(LONGEST, 4, 2)
    (refused,) = engine.add(request("a", [5, 2, 7], END))
    assert refused.error == "source_ids names token id 2, the padding, which has no position here; leave it out"
    assert engine.add(request("b", [5, 0, 7], END)) == []


REFUSED: dict[str, object] = {
    "deterministic": True,
    "load_format": "dummy",
    "model_impl": "hf",
    "lm_head_dtype": "int8",
    "runner": "pooling",
    "convert": "embed",
    "pooler_config": PoolerConfig(pooling_type="MEAN"),
    "parallel": ParallelConfig(tensor_parallel_size=2),
}


@pytest.mark.parametrize("option", REFUSED)
def test_what_is_not_served_is_refused_by_name(flan: tuple[Path, Any], option: str) -> None:
    named = "tensor-parallel-size" if option == "parallel" else option.replace("_", "-")
    with pytest.raises(LoadError, match=f"--{named}.*t5 is an encoder-decoder"):
        load_model(config_of(flan[0], **{option: REFUSED[option]}))


def test_a_line_says_what_is_off(flan: tuple[Path, Any], tmp_path: Path) -> None:
    tiny_encdec.make("bart", tmp_path, num_beams=4, no_repeat_ngram_size=3, min_length=5)
    notes = " ".join(loaded(tmp_path).notes)
    assert "the prefix cache is off" in notes
    assert "generation_config.json has num_beams 4, no_repeat_ngram_size 3, min_length 5, which" in notes
    assert "generation_config" not in " ".join(loaded(flan[0], enable_prefix_caching=False).notes)


def test_another_class_and_another_computation_are_refused(bart: tuple[Path, Any], tmp_path: Path) -> None:
    config = json.loads((bart[0] / "config.json").read_text())
    for change, name in (
        ({"architectures": ["BartForSequenceClassification"]}, "BartForSequenceClassification"),
        ({"normalize_before": True}, "normalize_before"),
        ({"activation_function": "mish"}, "mish"),
        ({"activation_function": "gated-gelu"}, "gated-gelu"),
        ({"decoder_attention_heads": 2}, "decoder_attention_heads 2|encoder_attention_heads 4"),
        ({"d_model": "wide"}, "d_model"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises((UnsupportedModelError, ValueError), match=name):
            load_model(config_of(tmp_path))


def test_copies_of_the_embedding_must_be_copies(flan: tuple[Path, Any], tmp_path: Path) -> None:
    shutil.copytree(flan[0], tmp_path / "made")
    file = tmp_path / "made" / "model.safetensors"
    tensors = load_file(file)
    copies = {f"{stack}.embed_tokens.weight": tensors["shared.weight"].clone() for stack in ("encoder", "decoder")}
    unused = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.zeros(8, 4)}
    save_file(tensors | copies | unused, file, {"format": "pt"})
    assert loaded(tmp_path / "made").vocab_size == tiny_encdec.VOCABULARY
    copies["decoder.embed_tokens.weight"][3] += 1
    save_file(tensors | copies, file, {"format": "pt"})
    with pytest.raises(LoadError, match=r"decoder\.embed_tokens\.weight is not shared\.weight"):
        load_model(config_of(tmp_path / "made"))
    save_file(tensors | {"decoder.block.0.gate.weight": torch.zeros(2, 2)}, file, {"format": "pt"})
    with pytest.raises(LoadError, match=r"decoder\.block\.0\.gate"):
        load_model(config_of(tmp_path / "made"))


def test_the_flag_of_sources_is_for_encoder_decoders(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(LoadError, match=r"--max-source-len 8: llama is no encoder-decoder of text"):
        load_model(config_of(tmp_path, max_source_len=8))
