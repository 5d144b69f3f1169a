"""Prompts with images for an engine in this process, as a server makes them out of files."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import torch
from PIL import Image
from tiny_vision import MARKS, TinyVision, as_png, picture

from octavo.runtime.config import EngineConfig
from octavo.runtime.engine import Engine
from octavo.runtime.messages import AddRequest, SamplingParams, TokenOutput
from octavo.runtime.startup import load_engine
from octavo.server.media.frames import frames_of
from octavo.server.media.prompt import ReadImage, expanded, placed

BLOCK = 4
FIRST, SECOND = picture(1, 50, 37), picture(2, 31, 90)


def engine_of(directory: Path, chunk: int = 2048, **options: object) -> Engine:
    limits = {"num_blocks": 200, "block_size": BLOCK, "max_model_len": 200, "max_num_batched_tokens": chunk}
    return load_engine(EngineConfig(model=str(directory), **{"dtype": "float32"} | limits | options), time.time())[0]


def mark_of(tiny: TinyVision) -> str:
    return MARKS[tiny.model.config.model_type]


def text_of(tiny: TinyVision, count: int) -> str:
    mark = mark_of(tiny)
    return "user: look " + f" and {mark}".join(["", *[", then"] * count]) + " what is it?\nassistant: "


def request_of(
    tiny: TinyVision, engine: Engine, pictures: list[Image.Image], name: str = "a", **params: object
) -> AddRequest:
    facts = engine.worker.model.tower.facts
    read = []
    for one in pictures:
        made = frames_of(as_png(one), facts.recipe_for(len(pictures)))
        digest = hashlib.sha256(repr((made.size, made.frames)).encode() + made.pixels).digest()
        read.append(ReadImage(digest, made.size, made.frames, made.pixels))
    text = expanded(
        text_of(tiny, len(pictures)),
        read,
        facts,
        tiny.placeholder if tiny.kind.startswith("qwen") else mark_of(tiny),
        tiny.placeholder,
    )
    ids = tiny.processor.tokenizer(text)["input_ids"]
    settings = {"max_tokens": 6, "temperature": 0.0} | params
    images = placed(ids, read, facts)
    return AddRequest(name, ids, SamplingParams(**settings), 0.0, images=images)


def logprobs_of(outputs: list[TokenOutput]) -> torch.Tensor:
    """[T - 1, vocab] of a prompt's tokens but the first, by token id."""
    listed = outputs[0].prompt_logprobs
    assert listed is not None
    rows = []
    for entry in listed[1:]:
        assert entry is not None
        row = torch.empty(len(entry.top_ids))
        row[entry.top_ids] = torch.tensor(entry.top_logprobs)
        rows.append(row)
    return torch.stack(rows)
