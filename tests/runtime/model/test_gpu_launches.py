"""How many kernels a decode step launches on a GPU for each layer: octavo's own, and torch's."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_oracle import CASES, make_hf, save
from shuffled import shuffle_groups
from stored_scales import store_scales
from torch.utils._python_dispatch import TorchDispatchMode
from trimmed import whole

from octavo.calibration.prepare import prepare
from octavo.calibration.quantize_model import quantize_model
from octavo.calibration.recipe import Recipe
from octavo.kernels.attention.cache import LayerCache
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.launching.launch import Launch
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.device import Device
from octavo.runtime.model.model import Model
from octavo.runtime.model.operators_gpu import make_ops
from octavo.runtime.model.weights import load_model

ROOM = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}
VIEWS = {"numpy_T", "view", "_unsafe_view", "reshape", "select", "slice", "t", "transpose", "unsqueeze", "flatten"}
"""What of torch launches nothing: it makes room, or looks at it in another way, where it doesn't copy."""


SIZES = {"qwen2_moe": {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 256}}
"""Such as Qwen's own have: a shared expert of several others' size. Of its two layers the second is a mixture."""


class Counted(TorchDispatchMode):
    """Names of torch's operators that compute, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, result = func.overloadpacket.__name__, func(*args, **(kwargs or {}))
        looks = name in VIEWS and result.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr()
        if name not in ROOM and not looks:
            self.names.append(name)
        return result


def decode_step(device: torch.device) -> StepInputs:
    """Of two sequences with five and nine tokens, in blocks of 16."""
    return StepInputs.decode([5, 9], 16, token_ids=[5, 9]).to(device)


def loaded(directory: Path) -> tuple[Model, list[LayerCache], StepInputs]:
    """A model with a GPU's kernels, caches of zeros, and a decode step."""
    device = torch.device("cpu" if "TRITON_INTERPRET" in os.environ else "cuda")
    model = load_model(EngineConfig(model=str(directory), dtype="bfloat16"), Device(device, 90, make_ops))
    ones = torch.ones(model.kv_shapes[0][0], device=model.device)
    caches = []
    for heads, dim, _ in model.kv_shapes:
        keys, values = (torch.zeros(2, heads, 16, dim, dtype=torch.bfloat16, device=model.device) for _ in range(2))
        caches.append(LayerCache(keys, values, ones, ones))
    return model, caches, decode_step(model.device)


def launches(directory: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A decode step's kernels by name; none of them runs."""
    model, caches, inputs = loaded(directory)
    with monkeypatch.context() as patch:
        patch.setattr(Launch, "__call__", lambda _: None)
        model.forward(inputs, caches)  # makes what is kept, as the counters of shares
        with Counted() as counted:
            patch.setattr(Launch, "__call__", lambda self: counted.names.append(self.kernel.__name__))
            model.forward(inputs, caches)
    return counted.names


def of_a_layer(
    architecture: str,
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    change: Callable[[Path], None] | None = None,
) -> Counter[str]:
    """How often a layer launches each kernel: what a model with one more has more."""
    counts = []
    for layers in (1, 2):
        family, overrides = CASES[architecture]
        overrides = {**overrides, **SIZES.get(architecture, {}), "num_hidden_layers": layers}
        model = make_hf(family, overrides).bfloat16()  # as checkpoints are
        plain = save(model, tmp_path / f"plain{layers}")
        quantized = tmp_path / f"quantized{layers}"
        quantize_model(prepare(plain, quantized, recipe))
        if change is not None:
            change(quantized)
        counts.append(Counter(launches(quantized, monkeypatch)))
    counts[1].subtract(counts[0])
    return counts[1]


@pytest.mark.parametrize(
    ("architecture", "scheme", "number"),
    [
        ("llama", "W4A16@32", 8),
        ("llama", "FP8_DYNAMIC", 8),
        ("llama", "W8A8", 8),
        ("llama", "FP8_BLOCK", 8),  # whose parts end within blocks
        ("llama", "W4AFP8@32", 8),
        ("qwen3", "FP8_DYNAMIC", 8),
        ("gemma2", "W4A16@32", 8),
        ("granite", "W4A16@32", 8),
        ("olmo2", "FP8_DYNAMIC", 8),
        ("mixtral", "W4A16@32", 9),
        ("mixtral", "FP8_DYNAMIC", 9),
        ("mixtral", "W8A8", 9),
        ("mixtral", "W4AFP8@32", 9),
        ("mixtral", "W8A16@32", 9),
        ("mixtral", "FP8_BLOCK", 9),  # as above
        ("qwen3_moe", "FP8_DYNAMIC", 9),
        ("olmoe", "FP8_DYNAMIC", 9),
        ("olmoe", "W4A16@32", 9),
        ("qwen2_moe", "FP8_DYNAMIC", 9),
        ("qwen2_moe", "W4A16@32", 9),
    ],
)
def test_a_layer_has_few_launches(
    architecture: str, scheme: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four GEMMs, two norms, the activation, attention from qkv on: what is rounded is rounded by the kernel before.

    A mixture's router, which sorts, is a launch of its own. Norms over all heads, as OLMo's are, would be with many
    tokens, for which it takes less than to read whole rows in every program of attention.
    """
    found = of_a_layer(architecture, Recipe(scheme), tmp_path, monkeypatch)
    assert found.total() == number, found
    assert found["_router"] == (architecture in ("mixtral", "qwen3_moe", "olmoe", "qwen2_moe"))


def test_stored_scales_take_no_launch_more(fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    static, dynamic = (whole(fixtures / f"tiny--llmc-fp8-{kind}", tmp_path) for kind in ("static", "dynamic"))
    assert launches(static, monkeypatch) == launches(dynamic, monkeypatch)


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "W8A8"])
def test_logits_of_some_rows_are_those_of_all(scheme: str, tmp_path: Path) -> None:
    """Those of a decode step are cut behind the last layer, whose kernels are then the same."""
    family, overrides = CASES["llama"]
    plain = save(make_hf(family, {**overrides, "num_hidden_layers": 2}), tmp_path / "plain")
    quantize_model(prepare(plain, tmp_path / "quantized", Recipe(scheme)))
    model, caches, inputs = loaded(tmp_path / "quantized")
    every = model.forward(inputs, caches)
    second = model.forward(replace(inputs, logits_index=inputs.logits_index[1:]), caches)
    assert torch.equal(second, every[1:])


def test_act_order_takes_no_launch_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and attention put columns where the GEMMs have them; what down reads is made in the order of its groups."""
    found = of_a_layer("llama", Recipe("W4A16@32", format="gptq"), tmp_path, monkeypatch, change=shuffle_groups)
    assert found.total() == 8, found


@pytest.mark.parametrize(("alike", "number"), [(True, 9), (False, 10)])
def test_an_order_or_a_scale_of_each_expert_takes_one_launch_more(
    alike: bool, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which the norm before the router can't know. What all experts have is no launch's."""
    for kind, recipe, change in (
        ("act", Recipe("W4A16@32", format="gptq"), shuffle_groups),
        ("static", Recipe("FP8_DYNAMIC"), store_scales),
    ):
        found = of_a_layer("mixtral", recipe, tmp_path / kind, monkeypatch, change=partial(change, alike=alike))
        assert found.total() == number, found
