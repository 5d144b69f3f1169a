"""Perplexity and KL of an encoder-decoder's answers to prompts, against transformers; and files that hold no pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_encdec
import torch
from forked_commands import forked_commands

from octavo.jobs.measured_text import QualityError
from octavo.jobs.quality import compare, perplexity_of
from octavo.runtime.config import EngineConfig
from octavo.text.tokenizer import Tokenizer

PAIRS = [("The house is small.", "Das Haus ist klein."), ("A dog", "Ein Hund 7"), ("Is it good?", "Ist es ein Tag?")]


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Whose prompts and answers have tokens of their own."""
    directory = tmp_path_factory.mktemp("marian")
    model = tiny_encdec.save_marian(directory)
    model.final_logits_bias[0, tiny_encdec.PAD] = 0.0
    model.save_pretrained(directory)
    return directory, model


def written(directory: Path, pairs: list[tuple[str, str]] = PAIRS) -> Path:
    file = directory / "pairs.jsonl"
    lines = [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in pairs]
    file.write_text("\n\n".join(lines) + "\n")
    return file


def test_perplexity_is_that_of_answers_given_their_prompts(marian: tuple[Path, Any], tmp_path: Path) -> None:
    """As `octavo eval` prints it; of the first answers where fewer tokens are asked for."""
    directory, theirs = marian
    tokenizer = Tokenizer.open(directory)
    nll = []
    for prompt, answer in PAIRS:
        ids = tokenizer.encode(answer, is_answer=True)
        logits = tiny_encdec.logits(theirs, tokenizer.encode(prompt), [tiny_encdec.PAD, *ids[:-1]])
        nll.append(-torch.log_softmax(logits.double(), dim=-1)[range(len(ids)), ids])
    file = written(tmp_path)
    flags = ("--data", str(file), "--dtype", "float32", "--json", str(tmp_path / "found"))
    done = forked_commands().run("eval", str(directory), *flags, seconds=100)
    assert done.code == 0, done.stderr
    found = json.loads((tmp_path / "found").read_text())
    assert found["perplexity"] == pytest.approx(float(torch.cat(nll).mean().exp()), rel=1e-4)
    assert found["num_tokens"] == sum(map(len, nll))
    first = perplexity_of(EngineConfig(model=str(directory), dtype="float32"), max_tokens=2, text=file)
    assert (first.perplexity, first.num_tokens) == (pytest.approx(float(nll[0].mean().exp()), rel=1e-4), len(nll[0]))


def test_kl_is_of_answers(marian: tuple[Path, Any], tmp_path: Path) -> None:
    directory, _ = marian
    file = written(tmp_path)
    plain = EngineConfig(model=str(directory), dtype="float32")
    same = compare(plain, plain, max_tokens=2048, text=file)
    assert (same.mean_kl, same.perplexity_change, same.blocks) == (0.0, 0.0, ())
    rounded = [
        compare(plain, EngineConfig(model=str(directory), dtype=dtype), max_tokens=2048, text=file)
        for dtype in ("int8", "int4")
    ]
    assert 0 < rounded[0].mean_kl < rounded[1].mean_kl
    assert [found.num_tokens for found in rounded] == [same.num_tokens] * 2


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "has no pair"),
        ("{", "pairs.jsonl:1 is not JSON"),
        (
            '{"prompt": "x", "completion": "y"}\n[1]',
            r"pairs.jsonl:2: \[1\] is no object with the texts",
        ),
        ('{"prompt": "x", "completion": ""}', "is no object with the texts prompt and completion"),
        ('{"prompt": "x", "completion": 7}', "is no object with the texts prompt and completion"),
        (json.dumps({"prompt": "house " * 99, "completion": "y"}), "a prompt has .* tokens, and marian reads 64"),
        (json.dumps({"prompt": "x", "completion": "Haus " * 99}), "a completion has .* tokens, and marian reads 64"),
    ],
)
def test_files_without_pairs_are_refused(content: str, why: str, marian: tuple[Path, Any], tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(content)
    with pytest.raises(QualityError, match=why):
        perplexity_of(EngineConfig(model=str(marian[0])), max_tokens=64, text=file)


def test_a_text_alone_is_refused(marian: tuple[Path, Any], tmp_path: Path) -> None:
    refused = [(None, "measured on answers to prompts: --data FILE.jsonl"), (tmp_path / "a.txt", "from a .jsonl file")]
    for text, why in refused:
        with pytest.raises(QualityError, match=why):
            perplexity_of(EngineConfig(model=str(marian[0])), max_tokens=64, text=text)
