"""The table of kernels: what is chosen where and why, and that every row packs what its weight stands for."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from layers import apply
from torch import Tensor

from octavo.calibration.recipe import parse_scheme
from octavo.quant.body import PackOptions
from octavo.quant.kernel import Kernel, LayerShape
from octavo.quant.kernel_table import ONE_BY_ONE, TABLE, choose_for, choose_kernel
from octavo.quant.linear import make_linear
from octavo.quant.qparams import QuantizedWeight, Weight, quantize_weight
from octavo.quant.scheme import (
    CHANNEL,
    PRESETS,
    ActivationScheme,
    Granularity,
    QuantScheme,
    SchemeError,
    WeightScheme,
    group,
)
from octavo.quant.target import Target

CPU = Target(torch.device("cpu"), torch.bfloat16, has_dot_products=True)
OLD_CPU = replace(CPU, has_dot_products=False)
H100 = Target(torch.device("cuda"), torch.bfloat16, 90)
A100 = replace(H100, capability=80)
SHAPE = LayerShape(256, 512)
LAYERS = [row for row in TABLE if not row.experts]


@pytest.mark.parametrize("target", [CPU, OLD_CPU, H100, A100, replace(CPU, dtype=torch.float32)], ids=str)
@pytest.mark.parametrize("name", [*PRESETS, None])
def test_every_choice_has_a_reason(name: str | None, target: Target) -> None:
    choice = choose_kernel(None if name is None else PRESETS[name], SHAPE, target)
    assert choice.reason
    assert choice.kernel in LAYERS
    if choice.departs:
        assert choice.reason.startswith(f"{PRESETS[str(name)]}: ")


@pytest.mark.parametrize(
    ("name", "target", "kernel", "reason"),
    [
        ("W4A16@64", CPU, "int4 weights x bf16", "int4 weights decoded to bf16 in registers"),
        ("W8A8", CPU, "int8 x int8 VNNI", "int8 dot products, inputs rounded per token"),
        ("W8A8", OLD_CPU, "dequantized at load, torch bfloat16", "this processor has no AVX-512 with BF16 and VNNI"),
        ("FP8_DYNAMIC", CPU, "dequantized at load, bf16 x bf16", "no kernel of a CPU has such products"),
        ("W4A16@4", CPU, "dequantized at load, bf16 x bf16", "groups of 4 of 512 columns, not multiples of 8"),
        ("W8A16@16", H100, "dequantized at load, torch bfloat16", "groups of 16 of 512 columns, not multiples of 32"),
        (
            "FP8_DYNAMIC",
            A100,
            "fp8 weights, 16 bits",
            "need compute capability 8.9 (L40S, 4090, H100) and",
        ),
        ("W4A8", CPU, "int4 x int8 VNNI", "dot products of int4 weights with int8 inputs, rounded per token"),
        (
            "W4AFP8",
            CPU,
            "int4 weights x bf16, inputs rounded before",
            "in registers, inputs rounded as the scheme says",
        ),
        ("W4A8", H100, "int4 weights, 16 bits", "inputs stay in bfloat16"),
    ],
)
def test_choices(name: str, target: Target, kernel: str, reason: str) -> None:
    scheme = parse_scheme(name) if name != "W4A16@4" else QuantScheme(WeightScheme("int4", group(4)))
    choice = choose_kernel(scheme, SHAPE, target)
    assert choice.kernel.name == kernel
    assert reason in choice.reason


def test_float32_is_the_truth_and_no_departure() -> None:
    for target in (CPU, H100):
        choice = choose_kernel(PRESETS["FP8_DYNAMIC"], SHAPE, replace(target, dtype=torch.float32))
        assert choice.kernel.name == "dequantized at load, torch float32"
        assert choice.kernel.rounds_inputs
        assert not choice.departs


def test_a_mixture_asks_the_same_function() -> None:
    mixture = replace(SHAPE, experts=8)
    together = choose_kernel(PRESETS["FP8_DYNAMIC"], mixture, H100)
    assert (together.kernel.name, together.departs) == ("grouped by expert, fp8 x fp8, token", False)
    alone = choose_kernel(QuantScheme(WeightScheme("int8", group(16))), mixture, H100)
    assert alone.kernel.name == "one by one"
    assert alone.departs
    assert ONE_BY_ONE in alone.reason
    assert "groups of 16 of 512 columns, not multiples of 32" in alone.reason
    rounded = QuantScheme(WeightScheme("int4", group(16)), PRESETS["W4AFP8"].activation)
    assert "groups of 16 of 512 columns, not 32, 64, multiples of 128" in choose_kernel(rounded, mixture, H100).reason
    uneven = choose_kernel(parse_scheme("W4A16@32"), replace(mixture, order="uneven"), H100)
    assert "groups of unequal sizes (act-order)" in uneven.reason


def test_inputs_that_nothing_rounds_are_refused() -> None:
    scheme = QuantScheme(WeightScheme("int8", CHANNEL), ActivationScheme("int8", group(128)))
    for target in (CPU, H100):
        with pytest.raises(SchemeError, match="int8 activations per g128: no kernel has that; per token is what is"):
            choose_kernel(scheme, SHAPE, target)


def test_choosing_imports_no_kernel() -> None:
    """Neither numba nor Triton: `octavo inspect` answers for a GPU on a machine without one."""
    program = (
        "import sys, torch\n"
        "from octavo.quant.kernel_table import choose_kernel\n"
        "from octavo.quant.kernel import LayerShape\n"
        "from octavo.quant.scheme import PRESETS\n"
        "from octavo.quant.target import Target\n"
        "for capability in (0, 80, 90):\n"
        "    target = Target(torch.device('cuda'), torch.bfloat16, capability)\n"
        "    assert all(choose_kernel(s, LayerShape(256, 512), target).reason for s in PRESETS.values())\n"
        "assert not {'numba', 'triton'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def weight_for(row: Kernel) -> Weight:
    """A weight that a row serves, with zero points, act-order and NaN-free codes where it has them."""
    storage = row.storages[0]
    if storage == "dense":
        return torch.randn(48, 128)
    if storage == "fp4_e2m1":
        return quantize_weight(torch.randn(48, 128), PRESETS["MXFP4" if row.rounds_inputs else "MXFP4A16"])
    kind = "group" if "permuted" in row.orders else row.kinds[-1]
    per = {"channel": CHANNEL, "group": group(32), "block": Granularity("block", block=(1, 128))}[kind]
    weight = WeightScheme(storage, per, row.symmetric_only or storage == "fp8_e4m3")  # type: ignore[arg-type]
    activation = PRESETS["FP8_BLOCK"].activation if row.rounds_inputs else row.inputs[0]
    made = quantize_weight(torch.randn(48, 128), QuantScheme(weight, activation))
    if activation is not None and not activation.dynamic:
        made = replace(made, input_scale=torch.tensor(0.5))
    if "permuted" in row.orders:
        made = replace(made, g_idx=(torch.randperm(128) // 32).int())
    return made


@pytest.mark.parametrize("row", LAYERS, ids=[f"{i} {row.name}" for i, row in enumerate(LAYERS)])
def test_a_packed_weight_unpacks_to_what_it_stands_for(row: Kernel) -> None:
    """Whatever its layout; dequantized ones to the numbers rounded to the computing type."""
    torch.manual_seed(0)
    weight = weight_for(row)
    dtype = row.dtypes[0]
    target = Target(torch.device("cpu"), dtype, row.capability or (80 if row.where == "gpu" else 0), True)
    packed = row.body.pack(weight, PackOptions(target, dtype))
    exact = weight if isinstance(weight, Tensor) else weight.dequantize()
    if row.dequantizes or isinstance(weight, Tensor):
        exact = exact.to(dtype).float()
    got = packed.unpack()
    assert got.dtype == torch.float32
    assert torch.equal(got.view(exact.shape), exact)  # the layouts of experts have a layer as [1, N, K]
    assert packed.num_bytes == sum(tensor.nbytes for tensor in packed.tensors()) > 0


def test_a_layer_carries_its_choice() -> None:
    weight = quantize_weight(torch.randn(48, 128), PRESETS["FP8_DYNAMIC"])
    layer = make_linear([weight, torch.randn(16, 128)], [None, None], CPU)
    assert [part.choice for part in layer.parts] == [choose_for(weight, CPU), choose_for(torch.randn(16, 128), CPU)]
    assert layer.weight_bytes == sum(part.weight.num_bytes for part in layer.parts)
    x = torch.randn(3, 128).bfloat16()
    assert torch.equal(apply(layer, x), torch.cat([part.run(x, torch.bfloat16) for part in layer.parts], dim=1))


def test_a_nan_among_codes_is_looked_for_where_it_matters() -> None:
    weight = quantize_weight(torch.randn(48, 128), PRESETS["FP8_DYNAMIC"])
    bad = QuantizedWeight(weight.scheme, weight.codes.clone(), weight.scale)
    bad.codes.view(torch.int8)[3, 5] = 0x7F
    assert choose_for(weight, A100).kernel.name == "fp8 weights, 16 bits"
    assert choose_for(bad, A100).kernel.name == "dequantized at load, torch bfloat16"
    assert "its e4m3 codes hold a NaN" in choose_kernel(weight.scheme, replace(SHAPE, has_nan=True), A100).reason
    assert choose_for(bad, H100).kernel.name == "fp8 x fp8, token"
