"""What --dataset and its neighbours mean for a real checkpoint, with transformers' tokenizer and model as the truth."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers
from safetensors.torch import save_file
from tiny_oracle import Oracle
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from octavo.calibration.text.data import CalibrationData, Sizes
from octavo.calibration.text.documents import DataError
from octavo.calibration.verify import held_out_text
from octavo.flags import add_flags, flags_of, read
from octavo.jobs.calibration_data import TUNED_SAMPLES, DataOptions, default_num_samples, make_data
from octavo.jobs.model_text import ModelText
from octavo.jobs.self_text import GenerationRequest, _run, choose_prompts, generate, generate_data
from octavo.quant.model_files import CheckpointError
from octavo.runtime.config import EngineConfig
from octavo.runtime.startup import load_engine

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What does this function return? "},
    {"role": "assistant", "content": "The number of bytes, or None.\n"},
]
LLAMA_LIKE = (  # BOS by name, trimmed contents, a default system prompt, loop variables
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}[sys]You are octavo.[/sys]{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' and loop.index0 > 5 %}"
    "{{ raise_exception('too long') }}{% endif %}"
    "[{{ m['role'] }}]{{ m['content'] | trim }}{{ eos_token if m['role'] == 'assistant' else '' }}{% endfor %}"
)


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


def data_of(args: argparse.Namespace, source: Path, **how: Any) -> CalibrationData:
    """What the flags mean for the checkpoint in `source`, as `octavo quantize` hands them on."""
    return make_data(source, read(DataOptions, args), **how)


def arguments(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_flags(parser, flags_of(DataOptions))
    return parser.parse_args(flags)


def hf_tokenizer(directory: Path) -> Any:
    return transformers.PreTrainedTokenizerFast.from_pretrained(directory)


def joined(data: CalibrationData) -> list[int]:
    return [token for sample in data.samples for token in sample.tolist()]


def with_bos(tiny: Path, directory: Path) -> Path:
    """The tiny checkpoint with a tokenizer that begins a text with a BOS token."""
    shutil.copytree(tiny, directory)
    backend = Backend.from_file(str(directory / "tokenizer.json"))
    token = "<|endoftext|>"
    backend.post_processor = processors.TemplateProcessing(
        single=[token, "$A"], special_tokens=[(token, backend.token_to_id(token))]
    )
    backend.save(str(directory / "tokenizer.json"))
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"bos_token": token}))
    return directory


@pytest.mark.parametrize("template", [None, LLAMA_LIKE], ids=["own", "llama-like"])
@pytest.mark.parametrize("begin", [0, 1], ids=["system", "no-system"])
@pytest.mark.parametrize("bos", [False, True], ids=["", "bos"])
def test_conversations_are_what_transformers_makes_of_them(
    fixtures: Path, tmp_path: Path, template: str | None, begin: int, bos: bool
) -> None:
    directory = with_bos(fixtures / "tiny", tmp_path / "model") if bos else fixtures / "tiny"
    expected = hf_tokenizer(directory).apply_chat_template(
        CHAT[begin:], chat_template=template, tokenize=True, return_dict=False
    )
    file = tmp_path / "chat.jsonl"
    rows = [
        {"messages": CHAT[begin:]},
        {
            "conversations": [
                {"from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]), "value": m["content"]}
                for m in CHAT[begin:]
            ]
        },
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--dataset", str(file), "--num-calibration-samples", "1", "--max-seq-length", str(len(expected))]
    data = data_of(arguments(*flags, *(["--chat-template", template] if template else [])), directory)
    found = data.samples[0].tolist()
    if expected[0] != found[0]:  # this template writes no BOS, and every window begins with one
        assert bos
        expected = [hf_tokenizer(directory).bos_token_id, *expected[:-1]]
    assert found == expected


@pytest.mark.parametrize("bos", [False, True])
def test_texts_are_tokenized_as_transformers_does(fixtures: Path, tmp_path: Path, bos: bool) -> None:
    directory = with_bos(fixtures / "tiny", tmp_path / "model") if bos else fixtures / "tiny"
    tokenizer = hf_tokenizer(directory)
    text = "Returns the number of bytes. " * 20
    expected = tokenizer(text if bos else text + "\n\n")["input_ids"]
    data = make_data(directory, DataOptions([text], num_samples=1, max_seq_length=len(expected)))
    assert joined(data) == expected
    assert (expected[0] == tokenizer.bos_token_id) == bos
    windows = make_data(directory, DataOptions([text], num_samples=2, max_seq_length=len(expected) // 2))
    assert joined(windows)[: len(expected) // 2] == expected[: len(expected) // 2]
    assert (int(windows.samples[1][0]) == tokenizer.bos_token_id) == bos


def test_the_same_flags_give_the_same_data(fixtures: Path, tmp_path: Path) -> None:
    file = tmp_path / "data.txt"
    file.write_text("".join(f"Paragraph {i}: the licence says what is said here.\n\n" for i in range(3000)))
    flags = ["--dataset", str(file), "--num-calibration-samples", "4", "--max-seq-length", "64"]
    first, again, other = (data_of(arguments(*flags, "--seed", seed), fixtures / "tiny") for seed in ("7", "7", "8"))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.source.startswith("data.txt: 4 samples of 64 tokens, out of ")
    assert first.source.endswith("documents, seed 7")


def test_what_python_may_hand_over(fixtures: Path) -> None:
    tiny, texts = fixtures / "tiny", ["Returns the number of bytes. " * 20, "Raises an error if there is none. " * 20]
    expected = make_data(tiny, DataOptions(texts, num_samples=2, max_seq_length=32))
    for records in (tuple(texts), [{"text": text} for text in texts]):
        assert (
            make_data(tiny, DataOptions(records, num_samples=2, max_seq_length=32)).fingerprint == expected.fingerprint
        )
    stacked = torch.stack(expected.samples)
    for token_ids in (stacked, expected.samples, stacked.int()):
        assert make_data(tiny, DataOptions(token_ids)).fingerprint == expected.fingerprint
    with pytest.raises(DataError, match="there is no sample"):
        make_data(tiny, DataOptions(stacked[:0]))
    with pytest.raises(DataError, match="the records given holds no text"):
        make_data(tiny, DataOptions([]))


def test_without_a_dataset_the_model_writes_its_own(fixtures: Path, oracle: Oracle) -> None:
    flags = ["--num-calibration-samples", "8", "--max-seq-length", "96", "--seed", "5"]
    seen: list[tuple[float, float]] = []
    data = data_of(arguments(*flags), fixtures / "tiny", progress=lambda done, total, _: seen.append((done, total)))
    again = data_of(arguments(*flags), fixtures / "tiny")
    assert data.source == "generated by the model itself, seed 5: 8 samples of 96 tokens"
    assert data.fingerprint == again.fingerprint
    prompts = choose_prompts(ModelText(fixtures / "tiny"), Sizes(8, 96, 5))
    total = sum(96 - len(prompt) for prompt in prompts)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)
    assert [sample.shape for sample in data.samples] == [(96,)] * 8
    for sample, prompt in zip(data.samples, prompts, strict=True):
        assert sample[: len(prompt)].tolist() == prompt
    assert len({tuple(sample.tolist()) for sample in data.samples}) == 8
    _check_sampled_from(oracle, data, prompts)


def test_a_model_writes_text_beside_a_dataset(fixtures: Path) -> None:
    """Where it is asked for so much, and where tuning has fewer windows than it needs."""
    tiny, texts = fixtures / "tiny", ["Returns the number of bytes. " * 20, "Raises an error if there is none. " * 20]
    given = DataOptions(texts, num_samples=2, max_seq_length=32)
    alone = make_data(tiny, given)
    assert (
        make_data(tiny, msgspec.structs.replace(given, self_generated_samples=0), tunes=True).fingerprint
        == alone.fingerprint
    )
    for options, tunes, count in (
        (msgspec.structs.replace(given, self_generated_samples=3), False, 3),
        (given, True, TUNED_SAMPLES - 2),
    ):
        own = generate_data(tiny, ModelText(tiny), Sizes(count, 32), beside=alone)
        both = make_data(tiny, options, tunes=tunes)
        assert sorted(s.tolist() for s in both.samples) == sorted(s.tolist() for s in [*alone.samples, *own.samples])
        assert both.source == f"{alone.source}; and {own.source}"
        assert make_data(tiny, options, tunes=tunes).fingerprint == both.fingerprint
    tuned = make_data(tiny, DataOptions(max_seq_length=16), tunes=True)
    assert len(tuned.samples) == TUNED_SAMPLES


def _check_sampled_from(oracle: Oracle, data: CalibrationData, prompts: list[list[int]]) -> None:
    """Sampled at temperature 1, a token's surprise is the distribution's entropy on average.

    The differences are a martingale's, so their mean is within 4 of its standard deviations but in one of 16,000 seeds,
    and this seed is fixed. bfloat16 moves logits by some 0.01, far less than that: it is 0.3 here. A text of greedy
    tokens, or one sampled at a temperature of 0.9, is out of it.
    """
    differences = []
    for sample, prompt in zip(data.samples, prompts, strict=True):
        logprobs = oracle.logprobs(sample.tolist())[len(prompt) - 1 : -1]
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        surprise = -logprobs.gather(1, sample[len(prompt) :, None]).squeeze(1)
        differences.append(surprise - entropy)
    all_of_them = torch.cat(differences)
    assert abs(float(all_of_them.mean())) < 4 * float(all_of_them.std()) / len(all_of_them) ** 0.5


def test_texts_begin_with_words_and_conversations(fixtures: Path, tmp_path: Path) -> None:
    text = ModelText(fixtures / "tiny")
    prompts = choose_prompts(text, Sizes(40, 64, 1))
    start = hf_tokenizer(fixtures / "tiny").encode("<|im_start|>user\n")
    assert prompts[1::2] == [start] * 20
    words = [text.tokenizer.decode(prompt).strip() for prompt in prompts[::2]]
    assert all(word.isalpha() for word in words)
    assert len(set(words)) > 10
    assert choose_prompts(text, Sizes(40, 64, 2))[::2] != prompts[::2]
    bos = ModelText(with_bos(fixtures / "tiny", tmp_path / "model"), chat_template="{{ raise_exception('no') }}")
    framed = choose_prompts(bos, Sizes(4, 64, 1))
    assert [prompt[1:] for prompt in framed][::2] == prompts[:4:2]
    assert {prompt[0] for prompt in framed} == {
        bos.tokenizer.token_id("<|endoftext|>")
    }  # without a template that works, words alone


def test_texts_beside_a_given_one_begin_with_its_words(fixtures: Path) -> None:
    """Not with what is no word; words that it has often come often; all of it without a word."""
    text = ModelText(fixtures / "tiny")
    often, once = (text.encode(word, add_special_tokens=False)[0] for word in ("he", "bytes"))
    given = [often, once, often, *text.encode("12 ..."), often]
    drawn = [prompt[-1] for prompt in choose_prompts(text, Sizes(400, 64, 1), given)[::2]]
    assert drawn.count(often) > 2 * drawn.count(once) > 40
    assert drawn.count(often) + drawn.count(once) == 200
    digits = text.encode("1", add_special_tokens=False)
    assert choose_prompts(text, Sizes(1, 64, 1), digits) == [digits]


def test_a_small_cache_takes_the_texts_in_turns(fixtures: Path) -> None:
    """Room for 2 of 5 texts: all of them come whole, and none is thrown out for another."""
    config = EngineConfig(
        model=str(fixtures / "tiny"), dtype="float32", max_model_len=40, num_blocks=7, enable_prefix_caching=False
    )
    engine, _ = load_engine(config, 0.0)
    prompts = [[i + 10] for i in range(5)]
    texts = _run(engine, GenerationRequest(config.model, prompts, 40, 0), lambda _: None)
    assert [len(text) for text in texts] == [40] * 5
    assert [text[:1] for text in texts] == prompts
    assert engine.scheduler.stats().num_preemptions == 0


def test_a_model_that_does_not_fit_is_refused(fixtures: Path, tmp_path: Path) -> None:
    """A checkpoint of 4 TB, nearly all of it a hole in a file."""
    model = tmp_path / "model"
    shutil.copytree(fixtures / "tiny", model)
    shape = [1 << 20, 1 << 20]
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 << 40]}}).encode()
    with (model / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (4 << 40))
    with pytest.raises(MemoryError, match=r"it takes 3188\.6 GB of memory, and .* GB are free"):
        generate(GenerationRequest(str(model), [[1]], 8, 0), lambda _: None)


def test_a_model_that_cannot_run_says_what_helps(fixtures: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(fixtures / "tiny", model)
    save_file({"x": torch.zeros(1)}, model / "model.safetensors")
    with pytest.raises(
        DataError, match=r"without --dataset the model itself generates .*no weights for .*; give a text with --dataset"
    ):
        make_data(model, DataOptions(num_samples=1, max_seq_length=8))
    given = DataOptions(["Returns the number of bytes. "], num_samples=1, max_seq_length=6)
    (note,) = make_data(model, given, tunes=True).notes
    assert re.fullmatch(
        r"tuned on the 1 samples given alone, since the model can't generate more: .*no weights.*", note
    )
    with pytest.raises(DataError, match=r"--self-generated-samples 2: the model can't generate text: .*no weights for"):
        make_data(model, msgspec.structs.replace(given, self_generated_samples=2))


def test_what_cannot_be_meant_is_refused(fixtures: Path, tmp_path: Path) -> None:
    tiny = fixtures / "tiny"
    with pytest.raises(DataError, match=r"--max-seq-length 100000: the model has (\d+) positions; \1 works"):
        make_data(tiny, DataOptions(["text"], max_seq_length=100_000))
    with pytest.raises(DataError, match="--max-seq-length 1: 2 at least"):
        make_data(tiny, DataOptions(max_seq_length=1))
    with pytest.raises(DataError, match=r"octavo's held-out text, on which quality is measured"):
        make_data(tiny, DataOptions([held_out_text()], num_samples=2, max_seq_length=64))
    with pytest.raises(DataError, match=r"sample 1 has token 99999"):
        make_data(tiny, DataOptions([torch.tensor([1, 2]), torch.tensor([1, 99999])]))
    with pytest.raises(DataError, match="neither a file nor a template"):
        make_data(tiny, DataOptions(["text"], chat_template="missing.jinja"))
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file or directory"):
        make_data(tiny, DataOptions("nowhere.jsonl"))
    for name, error, message in [
        ("tokenizer.json", DataError, r"tokenizer\.json is not a tokenizer\.json: EOF"),
        ("tokenizer_config.json", CheckpointError, r"tokenizer_config\.json is not JSON"),
    ]:
        model = tmp_path / name
        shutil.copytree(tiny, model)
        (model / name).write_text("{")
        with pytest.raises(error, match=message):
            make_data(model, DataOptions(["text"]))


def test_a_smaller_vocabulary_than_the_tokenizers_is_refused(fixtures: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(fixtures / "tiny", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 50}))
    with pytest.raises(DataError, match=r"entry 1: the tokenizer gives token \d+, and the model has 50: it is another"):
        make_data(model, DataOptions(["hello world " * 50], num_samples=1, max_seq_length=8))


@pytest.mark.parametrize(
    ("config", "length", "expected"),
    [
        ({"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}, 512, 32),
        ({"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}, 512, 112),
        ({"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}, 2048, 32),
        ({"hidden_size": 2048, "intermediate_size": 768, "num_attention_heads": 64, "head_dim": 128}, 512, 64),
        ({"text_config": {"hidden_size": 4096, "intermediate_size": 14336}}, 512, 112),
        ({"hidden_size": 4096, "intermediate_size": 14336}, 8, 512),
        ({}, 512, 32),
    ],
)
def test_wide_layers_get_more_samples(config: dict[str, Any], length: int, expected: int) -> None:
    assert default_num_samples(config, length) == expected


@pytest.mark.parametrize(
    "flags",
    [
        ["--num-calibration-samples", "0"],
        ["--num-calibration-samples", "-3"],
        ["--num-calibration-samples", "1048577"],
        ["--self-generated-samples", "1048577"],
        ["--max-seq-length", "1e3"],
        ["--seed", "-1"],
        ["--seed", "4294967296"],
    ],
)
def test_bad_numbers_are_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments(*flags)
    assert repr(flags[1]) in capsys.readouterr().err


def test_defaults() -> None:
    assert read(DataOptions, arguments()) == DataOptions(None, None, None, 0, None)
