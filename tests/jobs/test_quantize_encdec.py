"""`octavo quantize` of T5 and BART: the linear layers of both stacks are rounded, reloaded, and served."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest
import tiny_encdec
import torch
from forked_commands import forked_commands
from safetensors.torch import load_file, save_file
from slow_cases import slow
from tiny_encdec import END, PAD, VOCABULARY
from torch import Tensor

from octavo.calibration.layers import QuantizeError
from octavo.calibration.prepare import Calibration, prepare
from octavo.calibration.quantize_model import quantize_model
from octavo.calibration.recipe import Recipe
from octavo.calibration.text.data import CalibrationData
from octavo.jobs.quantize import quantize
from octavo.jobs.self_text import GenerationRequest, generate
from octavo.quant.checkpoint import Checkpoint
from octavo.quant.dequantized import open_dequantized
from octavo.quant.qparams import QuantizedWeight
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.encdec import EncoderDecoder
from octavo.runtime.model.encdec_blocks import EncDecBlockRunner
from octavo.runtime.model.families.registry import LAYOUTS
from octavo.runtime.model.weights import load_model

TOKENS = [PAD, 5, 77, 40, 9]
SCHEMES = ["W8A16@32", "W8A8", "FP8_DYNAMIC", "W4A16@32", "NVFP4A16", "MXFP8"]
SHORT = ("W8A8", "W4A16@32")
ROUNDED_INPUTS = ("W8A8", "FP8_DYNAMIC", "MXFP8")
LINEARS = {"t5, FLAN's": 3 * 7 + 2 * 11, "bart": 2 * 6 + 3 * 10}  # of the encoder's layers, and of the decoder's


@pytest.fixture(scope="module", params=LINEARS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    directory = tmp_path_factory.mktemp("made")
    tiny_encdec.make(request.param, directory)
    return request.param, directory


def logits_of(directory: Path) -> torch.Tensor:
    model = load_model(EngineConfig(model=str(directory), dtype="float32", max_num_seqs=1))
    assert isinstance(model, EncoderDecoder)
    return tiny_encdec.computed(model, tiny_encdec.texts(1)[0], TOKENS)


@pytest.mark.parametrize("scheme", [scheme if scheme in SHORT else slow(scheme) for scheme in SCHEMES])
def test_both_stacks_are_quantized_and_served(scheme: str, made: tuple[str, Path], tmp_path: Path) -> None:
    """Logits are those of a plain checkpoint of what the codes stand for; where inputs are rounded too, near them."""
    name, directory = made
    out = tmp_path / "out"
    report = quantize(str(directory), out, scheme=scheme, algorithm="rtn")
    where = "quality was not measured: an encoder-decoder's shows in its answers"
    assert any(where in line for line in report.warnings)
    checkpoint = Checkpoint.open(out)
    rounded = {tensor.removesuffix(".weight_scale") for tensor in checkpoint.names if tensor.endswith(".weight_scale")}
    assert len(rounded) == LINEARS[name]
    assert not any(word in module for module in rounded for word in ("embed", "shared", "relative", "lm_head"))
    plain = tmp_path / "plain"
    plain.mkdir()
    stands_for = open_dequantized(out, LAYOUTS)
    save_file({tensor: stands_for.tensor(tensor).clone() for tensor in stands_for.names}, plain / "model.safetensors")
    (plain / "config.json").write_text((directory / "config.json").read_text())
    found = logits_of(out)
    expected = logits_of(plain)
    assert not torch.equal(expected, logits_of(directory))
    if scheme in ROUNDED_INPUTS:
        assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.98
    else:
        torch.testing.assert_close(found, expected, atol=3e-4, rtol=3e-4)


LENGTH = 24
RECIPE = Recipe("W4A16@32", "gptq", search="absmax")


def calibration(directory: Path, count: int = 32) -> Calibration:
    """Random texts, and what the model answers to them."""
    checkpoint = Checkpoint.open(directory, LAYOUTS)
    sources = torch.randint(3, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(5)).tolist()
    start = json.loads((directory / "generation_config.json").read_text())["decoder_start_token_id"]
    asked = GenerationRequest(str(directory), [[start]] * count, LENGTH, 0, "cpu", sources, ((END,),))
    answers = generate(asked, lambda _: None)
    assert all(len(answer) == LENGTH and END not in answer[1:] for answer in answers)
    both = [torch.tensor(source + answer) for source, answer in zip(sources, answers, strict=True)]
    return Calibration(CalibrationData(both, "a test", 0), EncDecBlockRunner(checkpoint, LENGTH))


def quantized(directory: Path, out: Path, recipe: Recipe, ready: Calibration | None, **how: bool) -> Path:
    quantize_model(prepare(directory, out, recipe, calibration=ready, layouts=LAYOUTS, **how))
    return out


@pytest.fixture(scope="module")
def ready(made: tuple[str, Path]) -> Calibration:
    return calibration(made[1])


def error_of(directory: Path, original: Path) -> float:
    """Of logits over texts that nobody was calibrated on, relative to their size."""
    models = [
        load_model(EngineConfig(model=str(one), dtype="float32", max_num_seqs=1)) for one in (directory, original)
    ]
    error = size = 0.0
    for source, answer in zip(tiny_encdec.texts(8, seed=7), tiny_encdec.texts(8, seed=8), strict=True):
        found, truth = (tiny_encdec.computed(model, source, [PAD, *answer]) for model in models)
        error += float((found - truth).square().sum())
        size += float(truth.square().sum())
    return error / size


@pytest.mark.parametrize("algorithm", ["gptq", slow("awq+gptq"), slow("tune")])
def test_what_learns_from_text_beats_rounding_to_nearest(
    algorithm: str, made: tuple[str, Path], ready: Calibration, tmp_path: Path
) -> None:
    """On texts that it wasn't calibrated on."""
    recipe = msgspec.structs.replace(RECIPE, algorithm=algorithm)
    learned = quantized(made[1], tmp_path / "learned", recipe, ready)
    nearest = quantized(made[1], tmp_path / "nearest", recipe.with_rtn(), None)
    assert error_of(learned, made[1]) < 0.9 * error_of(nearest, made[1])


def gptq_in_float64(weight: Tensor, moments: Tensor, scale: Tensor, sweeps: int = 2) -> tuple[Tensor, Tensor]:
    """Codes [N, K] by the definition: columns in the order of their inputs, and then each code as good as it can be.

    And [N]: the rows of which no number ever lay so near a tie that float32 may have rounded it the other way, by the
    rule of tests/calibration/test_gptq.py.
    """
    order = moments.diagonal().argsort(descending=True, stable=True)
    h = moments[order][:, order]
    h += RECIPE.dampening * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    step = scale.repeat_interleave(32, dim=1)[:, order]
    exact = weight[:, order]
    slack = float(torch.linalg.cond(h)) * 2.0**-24 * float((exact.abs() / step).max())
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    left = exact.clone()
    codes = torch.zeros_like(left)
    is_sure = torch.ones(len(left), dtype=torch.bool)

    def rounded(numbers: Tensor) -> Tensor:
        is_sure.logical_and_((numbers - numbers.floor() - 0.5).abs() > slack)
        return numbers.round().clamp(-8, 7)

    for j in range(len(h)):
        codes[:, j] = rounded(left[:, j] / step[:, j])
        left[:, j:] -= torch.outer((left[:, j] - codes[:, j] * step[:, j]) / u[j, j], u[j, j:])
    for _ in range(sweeps):
        for j in range(len(h)):
            slope = (codes * step - exact) @ h[:, j]
            codes[:, j] = rounded(codes[:, j] - slope / (h[j, j] * step[:, j]))
    return codes[:, order.argsort()], is_sure


def test_codes_are_gptq_s_of_the_inputs_that_transformers_has(tmp_path: Path) -> None:
    """Of the first block of T5's decoder, which reads its embedding and what the encoder, quantized, makes of sources:
    transformers' own modules tell their inputs, and everything behind them is computed in float64."""
    directory = tmp_path / "made"
    model = tiny_encdec.make("t5, FLAN's", directory)
    ready = calibration(directory)
    out = quantized(directory, tmp_path / "out", RECIPE, ready)
    checkpoint = Checkpoint.open(out, LAYOUTS)
    stands_for = open_dequantized(out, LAYOUTS)
    weights = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    encoder = {name: stands_for.tensor(name) for name in stands_for.names if name.startswith("encoder.block")}
    model.load_state_dict(encoder, strict=False)
    inputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.startswith("decoder.block.0.") and isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, given, __, name=name: inputs.__setitem__(name, given[0].detach()))
    read, written = ready.token_ids.chunk(2, dim=1)
    model(input_ids=read, decoder_input_ids=written)
    assert len(inputs) == 11
    for name, x in inputs.items():
        rows = x.flatten(0, -2).double()
        found = checkpoint.linear(name)
        assert isinstance(found, QuantizedWeight)
        codes, is_sure = gptq_in_float64(weights[f"{name}.weight"], rows.T @ rows / len(rows), found.scale.double())
        assert is_sure.double().mean() > 0.5, name
        assert torch.equal(codes[is_sure], found.codes.double()[is_sure]), name


def test_a_killed_run_is_resumed_to_the_same_bytes(made: tuple[str, Path], ready: Calibration, tmp_path: Path) -> None:
    """Within the encoder, and within the decoder."""
    whole = quantized(made[1], tmp_path / "whole", RECIPE, ready)
    for number, block in enumerate(("encoder.{}.1", "decoder.{}.1")):
        at = block.format("layers" if made[0] == "bart" else "block")
        out = tmp_path / str(number)

        def stop(done: float, total: float, what: str, at: str = at) -> None:  # noqa: ARG001
            if f"{at} " in what:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            quantize_model(prepare(made[1], out, RECIPE, calibration=ready, layouts=LAYOUTS), stop)
        quantized(made[1], out, RECIPE, ready, resume=True)
        for name in ("model.safetensors", "config.json", "recipe.json"):
            assert (out / name).read_bytes() == (whole / name).read_bytes()


TEXTS = ["the cat sat on a dog. translate to German: is 7 a dog, or the cat? " * 4, "Is a (cat) to sit? 0123" * 6]


@pytest.mark.parametrize("made", ["t5, FLAN's"], indirect=True)
def test_auto_learns_from_a_text_and_the_model_s_own_answers(made: tuple[str, Path], tmp_path: Path) -> None:
    _, directory = made
    sizes = {"num_calibration_samples": 4, "max_seq_length": 32}
    report = quantize(str(directory), tmp_path / "out", scheme="W4A16@32", data=TEXTS, **sizes)
    assert report.algorithm == "awq+gptq"
    assert report.calibration is not None
    assert report.calibration.source.endswith("and as many tokens of the model's own answer to each")
    assert report.calibration.tokens == 4 * 64
    assert error_of(tmp_path / "out", directory) < 0.2
    without = quantize(str(directory), tmp_path / "rtn", scheme="W4A16@32")
    assert without.algorithm == "rtn"
    assert not any("windows of calibration text" in line for line in without.warnings)
    assert any("give a text with --dataset" in line for line in without.warnings)


@pytest.mark.parametrize("made", ["bart"], indirect=True)  # a T5 has positions without end
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"data": None}, "answers what it is given; give a text with --dataset"),
        ({"max_seq_length": 65}, "--max-seq-length 65: the model has 64 positions; 64 works"),
        ({"device": "cuda"}, "--device cuda: encoder-decoders are calibrated on the CPU"),
        ({"bits_budget": 5.0}, "sensitivity of an encoder-decoder's layers isn't measured"),
        ({"kv_cache": "fp8"}, "kv_cache: an encoder-decoder's keys and values aren't measured"),
        ({"rotations": ["R1"]}, "rotations: an encoder-decoder isn't rotated; leave them out"),
    ],
)
def test_what_calibration_doesn_t_do_is_refused_by_name(
    options: dict[str, object], why: str, made: tuple[str, Path], tmp_path: Path
) -> None:
    how = {"scheme": "W4A16@32", "algorithm": "gptq", "data": TEXTS, "max_seq_length": 32} | options
    with pytest.raises(ValueError, match=why):
        quantize(str(made[1]), tmp_path / "out", **how)


@pytest.mark.parametrize(("from_layer", "to_layer"), [("1", None), ("1", "7")])
def test_a_stack_with_other_layers_than_its_config_says_is_no_whole_model(
    from_layer: str, to_layer: str | None, made: tuple[str, Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(made[1], copy)
    tensors = load_file(copy / "model.safetensors")
    owner = "model.decoder.layers." if made[0] == "bart" else "decoder.block."
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{owner}{from_layer}.")}
    assert own
    if to_layer is None:
        tensors = {name: tensor for name, tensor in tensors.items() if name not in own}
    else:
        tensors |= {name.replace(f"{owner}{from_layer}.", f"{owner}{to_layer}."): t.clone() for name, t in own.items()}
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(QuantizeError, match=f"copy is not a whole model: its decoder has .* layer {to_layer or 1} in"):
        quantize(str(copy), tmp_path / "out", scheme="W8A16@32", algorithm="rtn")


def test_commands_say_what_it_is(made: tuple[str, Path]) -> None:
    _, directory = made
    commands = forked_commands()
    done = commands.run("inspect", str(directory), seconds=100)
    assert done.code == 0, done.stderr
    assert "reads a prompt with its encoder, and its decoder writes" in done.stdout
    measured = commands.run("eval", str(directory), seconds=100)
    assert measured.code != 0
    assert "is an encoder-decoder, which is measured on answers to prompts: --data FILE.jsonl" in measured.stderr
    asked = commands.run("eval", str(directory), "--tasks", "arc_easy", seconds=100)
    assert "--tasks: quality is not measured here: an encoder-decoder's shows in its answers" in asked.stderr
