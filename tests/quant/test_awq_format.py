"""AWQ's tensors: other tools' files are read exactly, and what is written an independent reader reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import unpacked
from safetensors.torch import load_file
from torch import Tensor
from trimmed import whole

from octavo.quant.checkpoint import Checkpoint
from octavo.quant.formats.awq import AWQFormat, parse_awq
from octavo.quant.formats.format import FormatError
from octavo.quant.qparams import QuantizedWeight, quantize_weight
from octavo.quant.scheme import PRESETS, QuantScheme, WeightScheme, group

BY_OTHERS = ("tiny--autoawq-w4g32", "tiny--autoround-awq-w4g32", "tiny-qwen2--autoawq-w4g32")
ASYM = QuantScheme(WeightScheme("int4", group(32), symmetric=False))
SYM = QuantScheme(WeightScheme("int4", group(32)))


def random_weight(scheme: QuantScheme, n: int = 64, k: int = 192) -> QuantizedWeight:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) + 0.3
    return quantize_weight(weight, scheme, scale_dtype=torch.float16)


@pytest.mark.parametrize("name", BY_OTHERS)
def test_weights_of_other_tools_are_read_exactly_and_written_back(fixtures: Path, tmp_path: Path, name: str) -> None:
    """As the tool itself dequantizes two of them, and as a second reader does all."""
    expected = load_file(fixtures / name / "expected.safetensors")
    stored, checkpoint = (
        load_file(fixtures / name / "model.safetensors"),
        Checkpoint.open(whole(fixtures / name, tmp_path)),
    )
    modules = [tensor.removesuffix(".qweight") for tensor in stored if tensor.endswith(".qweight")]
    assert len(modules) == 14
    assert len([key for key in expected if key.removeprefix("dequantized.") in modules]) == 2
    for module in modules:
        tensors = {suffix: stored[f"{module}.{suffix}"] for suffix in ("qweight", "qzeros", "scales")}
        weight = checkpoint.linear(module)
        assert isinstance(weight, QuantizedWeight)
        assert weight.scheme == ASYM
        ours = weight.dequantize()
        assert (ours.double().numpy() == unpacked.awq(tensors, 32)).all()
        if (theirs := expected.get(f"dequantized.{module}")) is not None:
            assert torch.equal(ours[: len(theirs)], theirs)
        written = AWQFormat(ASYM).write(weight)
        assert written.keys() == tensors.keys()
        assert all(torch.equal(written[suffix], tensor) for suffix, tensor in tensors.items())


@pytest.mark.parametrize("size", [32, 64, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_written_is_what_an_independent_reader_reads(size: int, symmetric: bool) -> None:
    scheme = QuantScheme(WeightScheme("int4", group(size), symmetric))
    weight, format_ = random_weight(scheme), AWQFormat(scheme)
    written = format_.write(weight)
    specs = format_.tensors(*weight.shape)
    assert {s: (t.dtype, tuple(t.shape)) for s, t in written.items()} == {
        s: (t.dtype, t.shape) for s, t in specs.items()
    }
    assert (unpacked.awq(written, size) == weight.dequantize().double().numpy()).all()
    again = format_.read(written)
    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.dequantize(), weight.dequantize())


@pytest.mark.parametrize("size", [32, 64, 128])
def test_gemv_is_read_to_autoawq_s_own_numbers(fixtures: Path, size: int) -> None:
    """What its code rounded a layer to, in float16, and then packed; zero points of 0 and 15 are among them."""
    stored = load_file(fixtures / "autoawq-gemv.safetensors")
    tensors = {suffix: stored[f"{size}.{suffix}"] for suffix in ("qweight", "qzeros", "scales")}
    config = {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "gemv"}
    format_ = parse_awq(config).format_of("model.layers.0.mlp.up_proj", tensors)
    assert format_ is not None
    assert torch.equal(format_.read(tensors).dequantize().half(), stored[f"{size}.dequantized"])


def gemv_tensors(weight: QuantizedWeight, width: int) -> dict[str, Tensor]:
    """The gemv layout, element by element: AutoAWQ pads the groups to `width` words of eight."""
    n, k = weight.shape
    assert weight.zero_point is not None
    groups = weight.scale.shape[1]

    def pack(codes: Tensor, columns: int) -> Tensor:
        out = torch.zeros(n, columns, dtype=torch.int64)
        for column in range(codes.shape[1]):
            out[:, column // 8] |= (codes[:, column].long() + 8) << (4 * (column % 8))
        return torch.where(out >= 1 << 31, out - (1 << 32), out).int()

    scales = torch.zeros(n, 8 * width, dtype=torch.float16)
    scales[:, :groups] = weight.scale
    return {"qweight": pack(weight.codes, k // 8), "qzeros": pack(weight.zero_point, width), "scales": scales}


def test_the_gemv_layout_is_read() -> None:
    weight = random_weight(ASYM)  # 6 groups of 32: AutoAWQ pads them to 4 words
    tensors = gemv_tensors(weight, 4)
    again = AWQFormat(ASYM, "gemv").read(tensors)
    assert torch.equal(again.dequantize(), weight.dequantize())
    with pytest.raises(FormatError, match=r"scales is \[64, 6\] where \[64, 32\] is expected"):
        AWQFormat(ASYM, "gemv").read(tensors | {"scales": weight.scale})
    with pytest.raises(FormatError, match="qzeros is"):
        AWQFormat(QuantScheme(WeightScheme("int4", group(2), symmetric=False)), "gemv").read(tensors)
    with pytest.raises(FormatError, match="awq is written in the gemm layout, not gemv"):
        AWQFormat(ASYM, "gemv").write(weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qzeros": torch.ones(6, 4, dtype=torch.int32)}, r"qzeros is \[6, 4\] where \[6, 8\] is expected"),
        ({"scales": torch.ones(3, 64)}, r"scales is \[3, 64\] where \[6, 64\] is expected"),
        ({"scales": torch.full((6, 64), torch.inf)}, "scales holds NaN or infinity"),
        ({"qweight": torch.ones(192, 8, dtype=torch.int16)}, "a matrix of int32 words is expected"),
        ({"qzeros": None}, "qzeros is missing"),
        ({"g_idx": torch.zeros(192)}, "g_idx not expected beside awq's qweight"),
    ],
)
def test_tensors_that_the_scheme_contradicts_are_refused(change: dict[str, Tensor | None], message: str) -> None:
    tensors = AWQFormat(ASYM).write(random_weight(ASYM)) | change
    with pytest.raises(FormatError, match=message):
        AWQFormat(ASYM).read({name: tensor for name, tensor in tensors.items() if tensor is not None})


def test_zero_points_where_there_are_none_are_refused() -> None:
    tensors = AWQFormat(ASYM).write(random_weight(ASYM))
    with pytest.raises(FormatError, match="qzeros are not all 8 although zero_point is false"):
        AWQFormat(SYM).read(tensors)


def test_what_awq_cannot_hold_is_refused() -> None:
    for name in ("W8A16", "W8A8", "FP8_DYNAMIC", "W3A16"):
        with pytest.raises(FormatError, match="awq holds 4-bit integers in groups and doesn't quantize activations"):
            AWQFormat(PRESETS[name])
    weight = random_weight(SYM)
    with pytest.raises(FormatError, match="desc_act"):
        AWQFormat(SYM).write(replace(weight, g_idx=torch.arange(192, dtype=torch.int32).flip(0) // 32))
    with pytest.raises(FormatError, match="in_features 80 is not a multiple of group_size 32: awq has no short last"):
        AWQFormat(SYM).write(random_weight(SYM, k=80))
    with pytest.raises(FormatError, match="out_features 60 is not a multiple of 8"):
        AWQFormat(SYM).write(random_weight(SYM, n=60))
    with pytest.raises(FormatError, match="can't be written as"):
        AWQFormat(ASYM).write(weight)
    scales = quantize_weight(torch.randn(64, 64) * 1e-6, SYM, scale_dtype=torch.bfloat16)
    with pytest.raises(FormatError, match="its scales are bfloat16, and float16"):
        AWQFormat(SYM).write(scales)
