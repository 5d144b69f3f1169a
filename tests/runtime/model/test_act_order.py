"""Act-order that is undone at load within each MLP: biases, gate and up in one, experts; against gathering."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from hf_oracle import CASES, make_hf, save, scattered_logits
from shuffled import shuffle_groups
from torch import Tensor

from octavo.calibration.prepare import prepare
from octavo.calibration.quantize_model import quantize_model
from octavo.calibration.recipe import Recipe
from octavo.kernels.native import cpu_features
from octavo.runtime.config import EngineConfig
from octavo.runtime.model import weights

FLOAT_NOISE = 1e-4  # of logits under 20: some hundred float32 roundings
ARCHITECTURES = ("llama", "phi3", "gemma2", "mixtral", "qwen2_moe")
WHOLE_GROUPS = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 96}
Dtype = Literal["float32", "bfloat16"]


def logits(directory: Path, dtype: Dtype) -> Tensor:
    model = weights.load_model(EngineConfig(model=str(directory), dtype=dtype, device="cpu"))
    return torch.cat(scattered_logits(model, [list(range(3, 20)), list(range(40, 49))]))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def shuffled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose columns have an order of their own."""
    family, overrides = CASES[request.param]
    widths = {key: width for key, width in WHOLE_GROUPS.items() if key in overrides}
    directory = tmp_path_factory.mktemp(request.param)
    plain = save(make_hf(family, overrides | widths), directory / "plain")
    quantize_model(prepare(plain, directory / "act", Recipe("W4A16@32", format="gptq")))
    shuffle_groups(directory / "act")
    return directory / "act"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_those_of_gathering(shuffled: Path, dtype: Dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 down's sums have another order; kernels of bf16 see the same columns in the same order."""
    ours = logits(shuffled, dtype)
    changed: list[bool] = []

    def gathering(*parts: object) -> object:
        changed.append(sort_inner(*parts)[2] is not parts[2])  # type: ignore[arg-type]
        return parts

    sort_inner = weights.sort_inner
    monkeypatch.setattr(weights, "sort_inner", gathering)
    theirs = logits(shuffled, dtype)
    assert set(changed) == {True}
    if dtype == "bfloat16" and cpu_features.has_dot_products():
        assert torch.equal(ours, theirs)
    elif dtype == "float32":
        torch.testing.assert_close(ours, theirs, rtol=0, atol=FLOAT_NOISE)
