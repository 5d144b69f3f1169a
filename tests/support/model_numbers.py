"""What octavo computes with a model type's tiny checkpoint, and how far that is from transformers' numbers.

Each kind of model reads in all the ways that it can: as a whole, in chunks, token by token, out of the prefix cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import encoder_oracle
import tiny_encdec
import tiny_whisper
import torch
from asked_images import FIRST, SECOND, engine_of, logprobs_of, request_of, text_of
from hf_oracle import Sequences, scattered_logits
from model_types import RECORDING, Kind, Truth
from tiny_vision import TinyVision, picture
from torch import Tensor
from toy_model import make_request, run_to_end, tokens_of

from octavo.audio.log_mel import log_mel
from octavo.runtime.config import EngineConfig
from octavo.runtime.engine import Engine
from octavo.runtime.messages import AddRequest
from octavo.runtime.model.encdec import EncoderDecoder
from octavo.runtime.model.weights import load_model
from octavo.runtime.startup import load_engine

LENGTHS = (37, 21, 30)
ANSWER = 8
CHUNKS = (64, 7, 1)
"""Tokens of a step: a whole prompt, a part of it, one."""


class Numbers(NamedTuple):
    """How a kind of model is read.

    difference: between a checkpoint's numbers and the truth's, in shares of the largest number; raises AssertionError
    for answers that are not the truth's. of: what is computed with one text, or one image.
    """

    difference: Callable[[Path, Any], float]
    of: Callable[[Path, Any], Tensor]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 96, (length,), generator=generator).tolist() for length in LENGTHS]


def relative(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest difference, in shares of the largest number."""
    largest = max(float(x.abs().max()) for x in theirs)
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) / largest


def _decoder_difference(source: Path, truth: Truth) -> float:
    """Of logits; answers come out of the cache, too."""
    theirs = [truth(ids) for ids in prompts()]
    assert float(torch.cat(theirs).std()) > 0.3, "trivially small logits prove nothing"
    model = load_model(EngineConfig(model=str(source), dtype="float32"))
    ways = [_in_equal_steps(model, 64), scattered_logits(model, prompts()), _in_equal_steps(model, 1)]
    prompt = prompts()[0]
    answer: list[int] = []
    for _ in range(ANSWER):
        answer.append(int(truth(prompt + answer)[-1].argmax()))
    limits = {"num_blocks": 100, "block_size": 4, "max_model_len": 64, "max_num_batched_tokens": 8}
    engine = load_engine(EngineConfig(model=str(source), dtype="float32", **limits), time.time())[0]
    _check_prefix_cache(engine, lambda name: make_request(name, prompt, max_tokens=ANSWER), answer, finds=True)
    return max(relative(ours, theirs) for ours in ways)


def _in_equal_steps(model: object, size: int) -> list[Tensor]:
    """Logits of the prompts, of which each step computes so many tokens."""
    sequences = Sequences(model, prompts(), seed=2)
    rows: list[list[Tensor]] = [[] for _ in LENGTHS]
    while counts := {s: min(size, n - sequences.done[s]) for s, n in enumerate(LENGTHS) if n > sequences.done[s]}:
        for s, _, logits in sequences.step(counts):
            rows[s].append(logits)
    return [torch.stack(of_prompt) for of_prompt in rows]


def _check_prefix_cache(engine: Engine, made: Callable[[str], AddRequest], answer: list[int], *, finds: bool) -> None:
    """Whether the answer is the same a second time; finds: out of the prefix cache."""
    for name in ("first", "second"):
        outputs = run_to_end(engine, [made(name)])[name]
        assert tokens_of(outputs) == answer
        assert bool(outputs[0].num_cached_tokens) == (finds and name == "second")


def _decoder_numbers(directory: Path, _: Truth) -> Tensor:
    return scattered_logits(load_model(EngineConfig(model=str(directory), dtype="float32")), [prompts()[1]])[0]


def _images_difference(source: Path, tiny: TinyVision) -> float:
    """Of log probabilities of a prompt with two images, in chunks that cut them where they may be cut."""
    both = [FIRST, SECOND]
    inputs = tiny.inputs(text_of(tiny, 2), both)
    theirs = tiny.logits(inputs).log_softmax(-1)[:-1]
    engine = engine_of(source)
    facts = engine.worker.model.tower.facts
    is_one_step = facts.begins_with is not None
    further = () if is_one_step else (facts.most_at_once + 3,) if facts.sees_ahead else CHUNKS[1:]
    engines = [engine, *(engine_of(source, size) for size in further)]
    difference = max(relative([_logprobs(each, tiny, both)], [theirs]) for each in engines)
    cached = engine_of(source)
    _check_prefix_cache(
        cached,
        lambda name: request_of(tiny, cached, both, name, max_tokens=ANSWER),
        tiny.greedy(inputs, ANSWER),
        finds=not is_one_step,
    )
    _check_another_image(cached, tiny)
    return difference


def _check_another_image(engine: Engine, tiny: TinyVision) -> None:
    """The same tokens, and another image in the first one's place: nothing from there on comes out of the cache."""
    before = request_of(tiny, engine, [FIRST, SECOND])
    pictures = [picture(3, *FIRST.size), SECOND]
    request = request_of(tiny, engine, pictures, max_tokens=ANSWER)
    assert request.token_ids == before.token_ids
    outputs = run_to_end(engine, [request])["a"]
    assert tokens_of(outputs) == tiny.greedy(tiny.inputs(text_of(tiny, 2), pictures), ANSWER)
    assert outputs[0].num_cached_tokens <= request.images[0].start


def _logprobs(engine: Engine, tiny: TinyVision, pictures: list[Any]) -> Tensor:
    request = request_of(tiny, engine, pictures, prompt_logprobs=engine.worker.model.vocab_size, max_tokens=1)
    return logprobs_of(run_to_end(engine, [request])["a"])


def _images_numbers(directory: Path, tiny: TinyVision) -> Tensor:
    return _logprobs(engine_of(directory), tiny, [FIRST])


def _encoder_difference(source: Path, truth: Truth) -> float:
    """Of hidden states: texts packed together, and each by itself."""
    model = encoder_oracle.load(source)
    texts = encoder_oracle.texts()
    theirs = [truth(ids) for ids in texts]
    alone = [encoder_oracle.computed(model, [ids])[0] for ids in texts]
    return max(relative(ours, theirs) for ours in (encoder_oracle.computed(model, texts), alone))


def _encoder_numbers(directory: Path, _: Truth) -> Tensor:
    return encoder_oracle.computed(encoder_oracle.load(directory), encoder_oracle.texts([23]))[0]


def _decoded(source: Tensor, length: int) -> Numbers:
    """Of a decoder behind an encoder that has read this, which becomes so many positions."""

    def difference(directory: Path, truth: Truth) -> float:
        model = _load(directory)
        theirs = [truth(ids) for ids in prompts()]
        ways = [[tiny_encdec.computed_behind(model, source, length, ids, n) for ids in prompts()] for n in CHUNKS]
        return max(relative(ours, theirs) for ours in ways)

    def numbers(directory: Path, _: Truth) -> Tensor:
        return tiny_encdec.computed_behind(_load(directory), source, length, prompts()[1])

    return Numbers(difference, numbers)


def _load(directory: Path) -> EncoderDecoder:
    model = load_model(EngineConfig(model=str(directory), dtype="float32"))
    assert isinstance(model, EncoderDecoder)
    return model


_TEXT = torch.tensor(tiny_encdec.texts(1)[0])
_HEARD = torch.from_numpy(log_mel(RECORDING, tiny_whisper.NUM_MELS, 2 * tiny_whisper.POSITIONS))
NUMBERS: dict[Kind, Numbers] = {
    "decoder": Numbers(_decoder_difference, _decoder_numbers),
    "images": Numbers(_images_difference, _images_numbers),
    "encoder": Numbers(_encoder_difference, _encoder_numbers),
    "encoder-decoder": _decoded(_TEXT, len(_TEXT)),
    "speech": _decoded(_HEARD, tiny_whisper.POSITIONS),
}
