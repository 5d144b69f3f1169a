"""The decoder on the GPU's operators and GEMMs, in chunks and mixed batches: on a GPU, or in Triton's interpreter.

bf16 has no exact answer. What is asked is that a model is no further from its own float32 than torch's operators in
bf16 are: rounding differs in place and order, not in size. How much its size varies, torch's on other prompts tell.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_oracle import CASES, Sequences, make_hf, save, scattered_logits
from safetensors.torch import load_file, save_file
from shuffled import shuffle_groups
from slow_cases import slow
from stored_scales import store_scales
from torch import Tensor
from trimmed import whole

from octavo.calibration.prepare import prepare
from octavo.calibration.quantize_model import quantize_model
from octavo.calibration.recipe import Recipe
from octavo.kernels.gemm.gpu import packing
from octavo.quant.kernel_table import ONE_BY_ONE
from octavo.runtime.config import EngineConfig
from octavo.runtime.model import weights
from octavo.runtime.model.device import Device
from octavo.runtime.model.model import Model
from octavo.runtime.model.moe import GroupedMoe
from octavo.runtime.model.operators import REFERENCE
from octavo.runtime.model.operators_gpu import make_ops
from octavo.runtime.model.weights import load_model

pytestmark = pytest.mark.long

DTYPES = ("float32", "bfloat16")
LENGTHS = (9, 3)  # of a prompt's two sequences
SEED = 378  # of how they are cut: 3 and 1 tokens, 3 and 1, 1 and 1 (past windows of 5 and 6), 2
PROMPTS, AT_ONCE = 64, 16  # of torch's; as many as the cache has blocks for
ARCHITECTURES = ("qwen3", "gemma2", "qwen2_moe", *map(slow, ("llama", "phi3", "granite", "olmo2")))
SCHEMES = {
    "W4A16@32": "int4 weights, 16 bits",
    "W8A8": "int8 x int8",
    "FP8_BLOCK": "fp8 x fp8, blocks",
}  # others differ in their linear layers alone: tests/quant/test_linear_gpu.py


def tiny(name: str, directory: Path, **sizes: int) -> Path:
    """A case of the oracle's in two layers: the interpreter takes its time."""
    family, overrides = CASES[name]
    return save(make_hf(family, {**overrides, "num_hidden_layers": 2, **sizes}).bfloat16(), directory)


def logits(model: Model, prompts: range) -> Tensor:
    """[prompts, tokens, vocab], a prompt's random tokens drawn with its number."""
    token_ids = []
    for prompt in prompts:
        generator = torch.Generator().manual_seed(prompt)
        token_ids += [torch.randint(3, 96, (length,), generator=generator).tolist() for length in LENGTHS]
    return torch.cat(scattered_logits(model, token_ids, SEED)).unflatten(0, (len(prompts), -1))


def on_gpu(directory: Path, capability: int = 90) -> Model:
    """The model as a GPU of that compute capability serves it."""
    device = torch.device("cpu" if "TRITON_INTERPRET" in os.environ else "cuda")
    return load_model(EngineConfig(model=str(directory), dtype="bfloat16"), Device(device, capability, make_ops))


def by_torch(directory: Path, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> Model:
    """The model by the reference operators, weights dequantized at load."""
    with monkeypatch.context() as patch:
        patch.setattr("octavo.kernels.native.cpu_features.has_dot_products", lambda: False)
        device = Device(torch.device("cpu"), 0, lambda _: REFERENCE)
        return load_model(EngineConfig(model=str(directory), dtype=dtype), device)


def sizes(error: Tensor) -> Tensor:
    """Of errors [prompts, tokens, vocab] -> [2, prompts], logarithms: the first tells of many tokens a little off, the
    second of one far off."""
    squares = error.square().mean(-1)
    return torch.stack([squares.log().mean(-1), squares.mean(-1).log()]) / 2


def check(
    directory: Path, monkeypatch: pytest.MonkeyPatch, truth_of: Path | None = None, capability: int = 90
) -> Model:  # fmt: skip
    """truth_of: the model that it is to be, where it isn't the same.

    Our error on one prompt passes for one of torch's errors on others.

    Logarithms of their sizes are close to normal: a 65th prompt's is more than 4 standard deviations above the mean of
    64 once in 10,000 times (Student's t, 63 degrees of freedom). Tokens near a tie of experts widen that limit.
    """
    model = on_gpu(directory, capability)
    plain, theirs = (by_torch(truth_of or directory, dtype, monkeypatch) for dtype in DTYPES)
    truth = logits(plain, range(1))
    batches = [range(first, first + AT_ONCE) for first in range(1, 1 + PROMPTS, AT_ONCE)]
    drawn = torch.cat([sizes(logits(theirs, batch) - logits(plain, batch)) for batch in batches], dim=1)
    ours, most = sizes(logits(model, range(1)) - truth)[:, 0], drawn.mean(1) + 4 * drawn.std(1)
    assert bool((ours <= most).all()), f"{ours.exp().tolist()}, torch's bf16 {most.exp().tolist()} at the most"
    assert float(most.amax().exp()) < float(truth.std())  # what has nothing to do with the truth is further from it
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(tiny(name, tmp_path / name), monkeypatch)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize_model(prepare(tiny("llama", tmp_path / "plain"), tmp_path / "quantized", Recipe(scheme)))
    model = check(tmp_path / "quantized", monkeypatch)
    bodies = {kind: body for kind, _, body in model.report_layers()}
    assert bodies["qkv"] == bodies["down"] == SCHEMES[scheme]
    assert bodies["norms, rope, attention"] == "triton"


def test_act_order_within_the_mlp_is_undone_at_load(
    fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all layers down alone (352 columns) has no order to gather in, and the logits are those of gathering."""
    directory, pack = whole(fixtures / "tiny--gptqmodel-w4g32-act", tmp_path), packing.pack
    ordered: list[tuple[int, bool]] = []

    def noted(*args: Any, **options: Any) -> packing.PackedWords:
        packed = pack(*args, **options)
        ordered.append((packed.k, packed.order is not None))
        return packed

    def three_tokens() -> Tensor:
        ordered.clear()
        return torch.stack([row for _, _, row in Sequences(on_gpu(directory), [[5, 6, 7]], 0).step({0: 3})])

    monkeypatch.setattr(packing, "pack", noted)
    ours = three_tokens()
    assert ordered == [(128, True), (128, True), (128, True), (352, False)] * 2
    monkeypatch.setattr(weights, "sort_inner", lambda *parts: parts)
    gathering = three_tokens()
    assert ordered == [(128, True), (128, True), (128, True), (352, True)] * 2
    assert torch.equal(ours, gathering)


@pytest.mark.parametrize(
    "scheme",
    ["W8A8", *map(slow, ("W4A16_ASYM@32", "FP8_BLOCK", "W8A16@32", "W4AFP8@32", "FP8_DYNAMIC"))],
)
def test_experts_are_run_together(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize_model(prepare(tiny("mixtral", tmp_path / "plain"), tmp_path / "quantized", Recipe(scheme)))
    model = check(tmp_path / "quantized", monkeypatch)
    assert model.capturable
    assert not any(ONE_BY_ONE in note for note in model.notes)
    assert "grouped by expert" in {body for _, _, body in model.report_layers()}


@pytest.mark.parametrize("alike", [slow(False), True])
def test_experts_round_by_stored_scales(alike: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by its own, or all by one, which the norm before the router has."""
    plain = tiny("qwen2_moe", tmp_path / "plain", shared_expert_intermediate_size=80)
    quantize_model(prepare(plain, tmp_path / "static", Recipe("FP8_DYNAMIC")))
    store_scales(tmp_path / "static", alike=alike)
    model = check(tmp_path / "static", monkeypatch)
    assert model.capturable
    mixture = next(layer.mlp for layer in model._layers if isinstance(layer.mlp, GroupedMoe))
    assert len(mixture.experts.down.input_scale.unique()) > 1
    assert (mixture.input_quant is not None) == alike
    assert mixture.slices == 2


@pytest.mark.parametrize("alike", [slow(False), True])
def test_experts_with_act_order_are_run_together(alike: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in an order of its own, or all in one, in which the norm before the router puts columns."""
    sizes = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 128}
    plain = tiny("qwen2_moe", tmp_path / "plain", **sizes)
    quantize_model(prepare(plain, tmp_path / "act", Recipe("W4A16@32", format="gptq")))
    shuffle_groups(tmp_path / "act", alike=alike)
    model = check(tmp_path / "act", monkeypatch)
    assert model.capturable
    mixture = next(layer.mlp for layer in model._layers if isinstance(layer.mlp, GroupedMoe))
    assert mixture.experts.gate_up.order is not None
    assert (mixture.input_quant is not None) == alike
    assert mixture.slices == 2


@pytest.mark.parametrize(
    ("scheme", "width", "shared", "body"),
    [
        slow(None, 40, 80, "grouped by expert, a shared one in 2"),
        ("FP8_DYNAMIC", 40, 120, "grouped by expert, a shared one in 3"),
        slow("W8A8", 40, 80, "grouped by expert, a shared one in 2"),
        slow("FP8_BLOCK", 128, 256, "grouped by expert, a shared one in 2"),
        ("W4A16_ASYM@32", 64, 128, "grouped by expert, a shared one in 2"),
        slow(None, 40, 60, "grouped by expert"),  # which isn't several experts' size
        slow("W4A16@32", 64, 96, "grouped by expert"),
        ("FP8_DYNAMIC but it", 40, 80, "grouped by expert"),
    ],
)
def test_a_shared_expert_runs_with_the_others_in_slices(
    scheme: str | None, width: int, shared: int, body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"moe_intermediate_size": width, "shared_expert_intermediate_size": shared}
    directory = tiny("qwen2_moe", tmp_path / "plain", **sizes)
    if scheme is not None:
        ignore = ("re:.*shared_expert.*",) if scheme.endswith("but it") else ()
        quantize_model(
            prepare(directory, tmp_path / "quantized", Recipe(scheme.removesuffix(" but it"), ignore=ignore))
        )
        directory = tmp_path / "quantized"
    model = check(directory, monkeypatch)
    assert model.capturable
    rows = {kind: of_kind for kind, _, of_kind in model.report_layers()}
    assert rows["experts"] == body
    assert ("shared.down" in rows) == (body == "grouped by expert")


@pytest.mark.parametrize(
    ("name", "scheme", "capability"),
    [
        slow("llama", "FP8_BLOCK", 80),
        slow("mixtral", "FP8_DYNAMIC", 86),
        slow("llama", "W4A8@32", 90),
        ("mixtral", "W8A8, static", 90),
    ],
)
def test_a_gpu_without_a_product_keeps_the_input(
    name: str, scheme: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the model whose config says nothing of activations, and a note says why."""
    quantized, alone = tmp_path / "quantized", tmp_path / "alone"
    ignore = ("re:.*self_attn.*",) if name == "mixtral" else ()  # then it's the experts that are told of
    quantize_model(
        prepare(tiny(name, tmp_path / "plain"), quantized, Recipe(scheme.removesuffix(", static"), ignore=ignore))
    )
    if scheme.endswith(", static"):
        store_scales(quantized)
    shutil.copytree(quantized, alone)
    config = json.loads((alone / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["input_activations"] = None
    (alone / "config.json").write_text(json.dumps(config))
    weights_alone = {n: t for n, t in load_file(alone / "model.safetensors").items() if not n.endswith("input_scale")}
    save_file(weights_alone, alone / "model.safetensors", {"format": "pt"})
    model = check(quantized, monkeypatch, alone, capability)
    assert model.capturable
    num_schemes = 2 if scheme == "FP8_BLOCK" else 1  # q, k and v end within a block: joined, they have rows of blocks
    assert sum("inputs stay in bfloat16" in note for note in model.notes) == num_schemes


def test_experts_that_no_grouped_gemm_has_run_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize_model(prepare(tiny("mixtral", tmp_path / "plain"), tmp_path / "quantized", Recipe("W8A16@16")))
    model = check(tmp_path / "quantized", monkeypatch)
    assert not model.capturable
    assert sum(ONE_BY_ONE in note for note in model.notes) == 1
