"""What is proven of each model type with a tiny random checkpoint of it, for tests and for docs/models.md.

`prove` raises AssertionError where something is not as it must be; what octavo refuses is told with its reason.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import encoder_oracle
import tiny_encdec
import torch
from calibrated import calibration
from divided import Pretended
from hf_oracle import Sequences, scattered_logits
from model_types import GROUP, TinyModel, Truth
from safetensors.torch import save_file
from torch import Tensor
from toy_model import make_request, run_to_end, tokens_of

from octavo.calibration.choices import Algorithm
from octavo.calibration.layers import QuantizeError
from octavo.calibration.prepare import prepare
from octavo.calibration.quantize_model import quantize_model
from octavo.calibration.recipe import Recipe
from octavo.quant.dequantized import open_dequantized
from octavo.quant.scheme import PRESETS
from octavo.quant.target import Target
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.encdec import EncoderDecoder
from octavo.runtime.model.encoder import Encoder
from octavo.runtime.model.families.registry import LAYOUTS
from octavo.runtime.model.kernel_plan import check_attention
from octavo.runtime.model.sources import LoadError
from octavo.runtime.model.spec import DecoderSpec
from octavo.runtime.model.weights import load_model
from octavo.runtime.parallel.config import ParallelConfig
from octavo.runtime.parallel.group import ALONE
from octavo.runtime.parallel.layout import LayoutError
from octavo.runtime.startup import load_engine

LENGTHS = (37, 21, 30)
ANSWER = 8
BOUND = 1e-4
"""Of the largest number that transformers computes: float32 in another order (see test_decoder.py's derivation)."""
GPU = Target(torch.device("cuda"), torch.bfloat16, 90)
CALIBRATED: dict[str, Algorithm] = {"W4A16": "gptq", "W8A8": "gptq"}
"""Algorithms of schemes whose weights aren't rounded to nearest here."""


@dataclass(frozen=True)
class Proven:
    """What holds of a model type.

    architecture  its class, by config.json
    difference    the largest one between octavo's numbers and transformers', relative to the largest number
    schemes       presets that it is quantized with, reloaded and served
    refused       reasons, by what is refused
    """

    model_type: str
    architecture: str
    difference: float
    schemes: tuple[str, ...]
    refused: dict[str, str]


def schemes() -> dict[str, str]:
    """How each preset is spelled for sizes this small, by its name."""
    names = [name for name in PRESETS if name != "INT8"]  # W8A8 by another name
    spelled = {}
    for name in names:
        granularity = PRESETS[name].weight.granularity
        is_large = granularity.kind == "group" and granularity.group_size > GROUP
        spelled[name] = f"{name}@{GROUP}" if is_large else name
    return spelled


def prove(tiny: TinyModel, directory: Path) -> Proven:
    """directory: an empty one, for what is written on the way."""
    source = directory / "source"
    truth = tiny.write(source)
    config = json.loads((source / "config.json").read_text())
    if tiny.reads_source:
        difference = _answer_difference(source, truth)
    else:
        difference = (_encoder_difference if tiny.is_encoder else _decoder_difference)(source, truth)
    original = _numbers(source)
    served: list[str] = []
    refused = _refused_options(source, config, is_decoder=tiny.is_decoder)
    for name, spelled in schemes().items():
        for algorithm in _algorithms(tiny, name):
            recipe = Recipe(spelled, algorithm=algorithm)
            try:
                quantize(tiny, source, directory / f"{name}-{algorithm}", recipe, original)
            except (QuantizeError, LoadError) as error:
                refused[name if algorithm == "rtn" else f"--algorithm {algorithm}"] = str(error)
            else:
                served.append(name)
                break
    return Proven(tiny.model_type, config["architectures"][0], difference, tuple(served), refused)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 96, (length,), generator=generator).tolist() for length in LENGTHS]


def _relative(ours: list[Tensor], theirs: list[Tensor]) -> float:
    largest = max(float(x.abs().max()) for x in theirs)
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) / largest


def _decoder_difference(source: Path, truth: Truth) -> float:
    """Of logits: prompts as a whole, in chunks among each other, and token by token; and answers out of the cache."""
    theirs = [truth(ids) for ids in prompts()]
    assert float(torch.cat(theirs).std()) > 0.3, "trivially small logits prove nothing"
    model = load_model(EngineConfig(model=str(source), dtype="float32"))
    ways = [_in_equal_steps(model, 64), scattered_logits(model, prompts()), _in_equal_steps(model, 1)]
    difference = max(_relative(ours, theirs) for ours in ways)
    assert difference < BOUND, difference
    _check_prefix_cache(source, truth)
    return difference


def _in_equal_steps(model: object, size: int) -> list[Tensor]:
    """Logits of the prompts, of which each step computes so many tokens."""
    sequences = Sequences(model, prompts(), seed=2)
    rows: list[list[Tensor]] = [[] for _ in LENGTHS]
    while counts := {s: min(size, n - sequences.done[s]) for s, n in enumerate(LENGTHS) if n > sequences.done[s]}:
        for s, _, logits in sequences.step(counts):
            rows[s].append(logits)
    return [torch.stack(of_prompt) for of_prompt in rows]


def _check_prefix_cache(source: Path, truth: Truth) -> None:
    """In chunks of 8 tokens at first; the second time all but the last tokens are found."""
    limits = {"num_blocks": 100, "block_size": 4, "max_model_len": 64, "max_num_batched_tokens": 8}
    engine = load_engine(EngineConfig(model=str(source), dtype="float32", **limits), time.time())[0]
    prompt = prompts()[0]
    answer: list[int] = []
    for _ in range(ANSWER):
        answer.append(int(truth(prompt + answer)[-1].argmax()))
    for round_ in range(2):
        before = engine.scheduler.stats().prefix_cache_hits
        outputs = run_to_end(engine, [make_request(f"round{round_}", prompt, max_tokens=ANSWER)])
        assert tokens_of(outputs[f"round{round_}"]) == answer
        hits = engine.scheduler.stats().prefix_cache_hits - before
        assert (hits > 0) == (round_ > 0)


def _encoder_difference(source: Path, truth: Truth) -> float:
    """Of hidden states: texts packed together, and each by itself."""
    model = encoder_oracle.load(source)
    texts = encoder_oracle.texts()
    theirs = [truth(ids) for ids in texts]
    alone = [encoder_oracle.computed(model, [ids])[0] for ids in texts]
    difference = max(_relative(ours, theirs) for ours in (encoder_oracle.computed(model, texts), alone))
    assert difference < BOUND, difference
    return difference


def _answer_difference(source: Path, truth: Truth) -> float:
    """Of an encoder-decoder's logits: what its decoder reads as a whole, in chunks, and token by token."""
    model = load_model(EngineConfig(model=str(source), dtype="float32"))
    assert isinstance(model, EncoderDecoder)
    theirs = [truth(ids) for ids in prompts()]
    text = tiny_encdec.texts(1)[0]
    ways = [[tiny_encdec.computed(model, text, ids, size) for ids in prompts()] for size in (64, 7, 1)]
    difference = max(_relative(ours, theirs) for ours in ways)
    assert difference < BOUND, difference
    return difference


def _algorithms(tiny: TinyModel, scheme: str) -> tuple[Algorithm, ...]:
    """In the order of trying: rtn where a model can't be calibrated."""
    return ("rtn",) if not tiny.is_decoder or scheme not in CALIBRATED else (CALIBRATED[scheme], "rtn")


def quantize(tiny: TinyModel, source: Path, out: Path, recipe: Recipe, original: Tensor) -> None:
    """Quantize, reload and serve. Raises QuantizeError or LoadError where that is refused.

    Where inputs aren't rounded, the served numbers are those of a plain checkpoint of what the codes stand for; where
    they are, they say more of the original's than its mean does.
    """
    ready = None
    if recipe.needs_data and tiny.is_decoder:
        ready = calibration(source, torch.randint(3, 90, (4, 32), generator=torch.Generator().manual_seed(4)))
    quantize_model(prepare(source, out, recipe, calibration=ready, layouts=LAYOUTS))
    found = _numbers(out)
    assert found.isfinite().all()
    if recipe.default.activation is not None:
        assert (found - original).square().mean() < (original - original.mean()).square().mean()
        return
    plain = out.with_name(f"{out.name}-plain")
    plain.mkdir()
    stands_for = open_dequantized(out, LAYOUTS)
    tensors = {tensor: stands_for.tensor(tensor).clone() for tensor in stands_for.names}
    save_file(tensors, plain / "model.safetensors")
    (plain / "config.json").write_text((source / "config.json").read_text())
    assert _relative([found], [_numbers(plain)]) < 3 * BOUND


def _numbers(directory: Path) -> Tensor:
    """Logits, or an encoder's hidden states, of one text."""
    model = load_model(EngineConfig(model=str(directory), dtype="float32"))
    if isinstance(model, Encoder):
        return encoder_oracle.computed(model, encoder_oracle.texts([23]))[0]
    if isinstance(model, EncoderDecoder):
        return tiny_encdec.computed(model, tiny_encdec.texts(1)[0], prompts()[1])
    return scattered_logits(model, [prompts()[1]])[0]


def _refused_options(source: Path, config: dict[str, object], *, is_decoder: bool) -> dict[str, str]:
    """What of serving this model type doesn't have, with what octavo says."""
    parallel = ParallelConfig(tensor_parallel_size=2)
    asked: dict[str, Callable[[], object]] = {
        "--deterministic": lambda: load_model(EngineConfig(model=str(source), dtype="bfloat16", deterministic=True)),
        "-tp 2": lambda: load_model(
            EngineConfig(model=str(source), parallel=parallel), group=Pretended(2) if is_decoder else ALONE
        ),
    }
    if is_decoder:
        asked["--device cuda"] = lambda: check_attention(DecoderSpec.from_hf(config), GPU)
    reasons = {}
    for option, ask in asked.items():
        try:
            ask()
        except (LoadError, LayoutError) as error:
            reasons[option] = str(error)
    return reasons
