"""GPTQ's tensors: other tools' files are read exactly, and what is written an independent reader reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import unpacked
from safetensors.torch import load_file
from torch import Tensor
from trimmed import whole

from octavo.quant.checkpoint import Checkpoint
from octavo.quant.formats.auto_round import parse_auto_round
from octavo.quant.formats.format import FormatError
from octavo.quant.formats.gptq import GPTQFormat, Version
from octavo.quant.formats.gptq_config import parse_gptq
from octavo.quant.qparams import QuantizedWeight, quantize_weight
from octavo.quant.scheme import PRESETS, QuantScheme, WeightDtype, WeightScheme, group

# name -> (bits, symmetric, version, desc_act); all have groups of 32
BY_OTHERS: dict[str, tuple[int, bool, Version, bool]] = {
    "tiny--autogptq-w4g32": (4, True, 1, False),
    "tiny--autoround-gptq-w4g32": (4, True, 1, False),
    "tiny--gptqmodel-w3g32": (3, True, 1, False),
    "tiny--gptqmodel-w4g32-act": (4, True, 1, True),
    "tiny--gptqmodel-w4g32-asym": (4, False, 1, False),
    "tiny--gptqmodel-w4g32": (4, True, 1, False),
    "tiny--gptqmodel-w4g32-v2": (4, True, 2, False),
    "tiny--gptqmodel-w8g32": (8, True, 1, False),
}
DTYPES: dict[int, WeightDtype] = {2: "int2", 3: "int3", 4: "int4", 8: "int8"}
SCHEMES = [
    QuantScheme(WeightScheme(dtype, group(size), symmetric))
    for dtype in DTYPES.values()
    for size in (32, 64, -1)
    for symmetric in (True, False)
]
W4 = QuantScheme(WeightScheme("int4", group(32)))
W4_ASYM = QuantScheme(WeightScheme("int4", group(32), symmetric=False))


def layers(directory: Path) -> Iterator[tuple[str, dict[str, Tensor], QuantizedWeight]]:
    """Each quantized layer's name, its tensors as they are stored, and octavo's reading of them."""
    (path,) = directory.glob("*.safetensors")
    stored, checkpoint = load_file(path), Checkpoint.open(directory)
    for module in sorted(name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")):
        names = {suffix: f"{module}.{suffix}" for suffix in ("qweight", "qzeros", "scales", "g_idx")}
        weight = checkpoint.linear(module)
        assert isinstance(weight, QuantizedWeight)
        yield module, {suffix: stored[name] for suffix, name in names.items() if name in stored}, weight


def random_weight(scheme: QuantScheme, n: int = 64, k: int = 160) -> QuantizedWeight:
    """160 columns: two groups of 64 and a short one."""
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
    return quantize_weight(weight + 0.3, scheme, scale_dtype=torch.float16)


@pytest.mark.parametrize("name", BY_OTHERS)
def test_weights_of_other_tools_are_read_exactly(fixtures: Path, tmp_path: Path, name: str) -> None:
    """As the tool itself dequantizes two of them, and as a second reader does all."""
    bits, symmetric, version, desc_act = BY_OTHERS[name]
    expected = load_file(fixtures / name / "expected.safetensors")
    seen = 0
    for module, stored, weight in layers(whole(fixtures / name, tmp_path)):
        assert weight.scheme == QuantScheme(WeightScheme(DTYPES[bits], group(32), symmetric))
        assert (weight.g_idx is not None) == desc_act
        assert weight.note == ""
        ours = weight.dequantize()
        assert (ours.double().numpy() == unpacked.gptq(stored, bits, version, 32)).all()
        if (theirs := expected.get(f"dequantized.{module}")) is not None:
            assert torch.equal(ours[: len(theirs)], theirs)
            seen += 1
    assert seen == 2


@pytest.mark.parametrize("name", BY_OTHERS)
def test_writing_what_was_read_gives_the_same_bytes(fixtures: Path, tmp_path: Path, name: str) -> None:
    _, _, version, desc_act = BY_OTHERS[name]
    for _, stored, weight in layers(whole(fixtures / name, tmp_path)):
        format_ = GPTQFormat(weight.scheme, version, desc_act)
        written = format_.write(weight)
        assert {suffix: (t.dtype, tuple(t.shape)) for suffix, t in written.items()} == {
            suffix: (spec.dtype, spec.shape) for suffix, spec in format_.tensors(*weight.shape).items()
        }
        assert all(torch.equal(written[suffix], tensor) for suffix, tensor in stored.items())  # AutoRound has no g_idx
        assert all(tensor.is_contiguous() for tensor in written.values())


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_is_written_is_what_an_independent_reader_reads(scheme: QuantScheme, version: Version) -> None:
    """Products of an integer of 9 bits and a float16 are exact in float32, so there is nothing to tolerate."""
    weight = random_weight(scheme)
    if weight.zero_point is not None:
        weight = replace(weight, zero_point=weight.zero_point.clamp(min=scheme.weight.int_range[0] + 1))
    format_ = GPTQFormat(scheme, version)
    written = format_.write(weight)
    for suffix, spec in format_.tensors(*weight.shape).items():
        assert (written[suffix].dtype, written[suffix].shape) == (spec.dtype, spec.shape)
    theirs = unpacked.gptq(written, scheme.weight.bits, version, scheme.weight.granularity.group_size or -1)
    assert (theirs == weight.dequantize().double().numpy()).all()
    again = format_.read(written)
    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert again.g_idx is None


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", DTYPES)
def test_groups_out_of_order(bits: int, version: Version) -> None:
    """desc_act: the columns stay where they are, g_idx says whose scale each one has."""
    scheme = QuantScheme(WeightScheme(DTYPES[bits], group(64)))
    order = torch.randperm(160, generator=torch.Generator().manual_seed(1))
    weight = random_weight(scheme)
    weight = replace(weight, codes=weight.codes[:, order], g_idx=(order // 64).int())
    with pytest.raises(FormatError, match="desc_act must be true"):
        GPTQFormat(scheme, version).write(weight)
    written = GPTQFormat(scheme, version, desc_act=True).write(weight)
    assert (unpacked.gptq(written, bits, version, 64) == weight.dequantize().double().numpy()).all()
    again = GPTQFormat(scheme, version, desc_act=True).read(written)
    assert torch.equal(again.dequantize(), random_weight(scheme).dequantize()[:, order])
    unset = written | {"g_idx": torch.zeros_like(written["g_idx"])}
    for tensors in (unset, {name: tensor for name, tensor in written.items() if name != "g_idx"}):
        with pytest.raises(FormatError, match="g_idx is missing or all 0 although desc_act is true"):
            GPTQFormat(scheme, version, desc_act=True).read(tensors)
        assert GPTQFormat(scheme, version).read(tensors).g_idx is None


@pytest.mark.parametrize("bits", DTYPES)
def test_a_zero_point_of_zero_needs_version_2(bits: int) -> None:
    scheme = QuantScheme(WeightScheme(DTYPES[bits], group(32), symmetric=False))
    weight = random_weight(scheme)
    assert weight.zero_point is not None
    weight.zero_point[5, 2] = scheme.weight.int_range[0]
    with pytest.raises(FormatError, match="gptq_v2 holds it"):
        GPTQFormat(scheme, 1).write(weight)
    written = GPTQFormat(scheme, 2).write(weight)
    assert (unpacked.gptq(written, bits, 2, 32) == weight.dequantize().double().numpy()).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_that_gptqmodel_made_by_borrowing(bits: int) -> None:
    """It makes version 1 by subtracting a word of ones, where a 0 borrows from the next field; a field alone wraps."""
    scheme = QuantScheme(WeightScheme(DTYPES[bits], group(32), symmetric=False))
    weight = random_weight(scheme)
    assert weight.zero_point is not None
    weight.zero_point[5, 2] = weight.zero_point[9] = scheme.weight.int_range[0]
    written = GPTQFormat(scheme, 2).write(weight)
    ones = sum(1 << shift for shift in range(0, 32, bits))
    borrowed = written | {"qzeros": written["qzeros"] - ones}
    again = GPTQFormat(scheme, 1, whole_words=True).read(borrowed)
    assert again.zero_point is not None
    assert torch.equal(again.zero_point, weight.zero_point)
    wrapped = (unpacked.fields(written["qzeros"].numpy(), bits) - 1) % 2**bits
    stream = sum(torch.from_numpy(wrapped[:, i :: 32 // bits]) << bits * i for i in range(32 // bits))
    alone = GPTQFormat(scheme, 1).read(written | {"qzeros": torch.as_tensor(stream).int()})
    assert alone.zero_point is not None
    assert torch.equal(alone.zero_point, weight.zero_point)


def words(value: int, *shape: int) -> Tensor:
    return torch.full(shape, value - (1 << 32) if value >= 1 << 31 else value, dtype=torch.int32)


def test_labels_that_the_zero_points_contradict() -> None:
    """A symmetric layer's zero points are 8: stored 7 in version 1, 8 in version 2, whatever the label says."""
    written = GPTQFormat(W4, 2).write(random_weight(W4))
    assert torch.equal(written["qzeros"], words(0x88888888, 5, 8))
    right = GPTQFormat(W4, 2).read(written)
    assert right.note == ""
    wrong = GPTQFormat(W4, 1).read(written)
    assert (
        wrong.note
        == "the config says gptq, but the zero points (all 8, of a symmetric scheme) are gptq_v2's: read as such"
    )
    assert torch.equal(wrong.dequantize(), right.dequantize())
    older = GPTQFormat(W4, 2).read(written | {"qzeros": words(0x77777777, 5, 8)})
    assert "are gptq's" in older.note
    assert torch.equal(older.dequantize(), right.dequantize())
    asymmetric = GPTQFormat(W4_ASYM, 1).read(written)  # 9 is a zero point like any other there
    assert asymmetric.zero_point is not None
    assert bool((asymmetric.zero_point == 1).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qzeros": words(0x88888887, 5, 8)}, "qzeros holds 7..8 as stored although sym is true"),
        ({"qzeros": words(0x66666666, 5, 8)}, "qzeros holds 6..6 as stored"),
        ({"qzeros": words(0x77777777, 5, 4)}, r"qzeros is \[5, 4\] where \[5, 8\] is expected"),
        ({"qzeros": None}, "qzeros is missing"),
        ({"scales": torch.ones(3, 64)}, r"scales is \[3, 64\] where \[5, 64\] is expected"),
        ({"scales": torch.full((5, 64), torch.nan)}, "scales holds NaN or infinity"),
        ({"scales": torch.ones(5, 64, dtype=torch.int32)}, "a matrix of floats is expected"),
        ({"qweight": torch.ones(20, 64)}, "a matrix of int32 words is expected"),
        ({"g_idx": torch.full((160,), 5)}, "outside the 5 groups"),
        ({"g_idx": torch.zeros(64, dtype=torch.int32)}, r"g_idx is \[64\] where \[160\] is expected"),
        ({"weight": torch.ones(1)}, "weight not expected beside qweight"),
    ],
)
def test_tensors_that_the_scheme_contradicts_are_refused(change: dict[str, Tensor | None], message: str) -> None:
    tensors = GPTQFormat(W4, 1).write(random_weight(W4)) | change
    with pytest.raises(FormatError, match=message):
        GPTQFormat(W4, 1).read({name: tensor for name, tensor in tensors.items() if tensor is not None})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_of_other_types_are_read_as_they_are(dtype: torch.dtype) -> None:
    weight = quantize_weight(torch.randn(64, 96, generator=torch.Generator().manual_seed(2)), W4, scale_dtype=dtype)
    again = GPTQFormat(W4, 1).read(GPTQFormat(W4, 1, scale_dtype=dtype).write(weight))
    assert torch.equal(again.scale, weight.scale)
    assert again.scale.dtype == dtype


def test_scales_that_change_in_float16_are_refused() -> None:
    weight = quantize_weight(torch.randn(64, 96) * 1e-6, W4, scale_dtype=torch.bfloat16)
    with pytest.raises(FormatError, match="its scales are bfloat16, and float16, which the format stores, can't hold"):
        GPTQFormat(W4, 1).write(weight)


def test_what_gptq_cannot_hold_is_refused() -> None:
    for name in ("W8A8", "FP8_DYNAMIC", "FP8_BLOCK"):
        with pytest.raises(FormatError, match="gptq holds integer weights and doesn't quantize activations"):
            GPTQFormat(PRESETS[name])
    with pytest.raises(FormatError, match="in_features 100 is not a multiple of 8"):
        GPTQFormat(W4).tensors(64, 100)
    with pytest.raises(FormatError, match="out_features 40 is not a multiple of 32"):
        GPTQFormat(QuantScheme(WeightScheme("int3", group(32)))).tensors(40, 64)
    with pytest.raises(FormatError, match="can't be written as"):
        GPTQFormat(W4).write(random_weight(W4_ASYM))


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
@pytest.mark.parametrize("symmetric", [False, True])
def test_planes_of_bits_are_read_as_gptqmodel_unpacks_them(fixtures: Path, bits: int, symmetric: bool) -> None:
    """Words that GPTQModel's own code has packed, and what its code makes of them."""
    stored = load_file(fixtures / "gptq-planar.safetensors")
    tensors = {name: stored[f"{bits}.{name}"] for name in ("qweight", "qzeros", "scales", "g_idx")}
    expected = stored[f"{bits}.weight"]
    config = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": symmetric, "checkpoint_format": "gptq_p"}
    format_ = parse_gptq(config).format_of("model.layers.0.mlp.up_proj", tensors)
    assert format_ is not None
    assert format_.shape(tensors) == (64, 96)
    if symmetric:
        with pytest.raises(FormatError, match="although sym is true"):
            format_.read(tensors)
        return
    weight = format_.read(tensors)
    assert weight.scheme.weight.dtype == {3: "int3", 5: "int5", 6: "int6", 7: "int8"}[bits]
    torch.testing.assert_close(weight.dequantize(), expected, atol=0, rtol=0)
    with pytest.raises(FormatError, match="are read, not written"):
        format_.write(weight)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["2.sym", "2.sym.act", "2.asym", "2.asym.act", "7.asym"])
def test_numbers_are_gptqmodel_s_own(fixtures: Path, name: str, version: int) -> None:
    """Its TorchLinear's float16 weights, of words that its code packed; asymmetric zero points are 0 and up.

    Version 1's come of its convert_gptq_v2_to_v1_format_module: of 2 bits a 0 borrows from the next field.
    """
    bits, kind, *act = name.split(".")
    stored = load_file(fixtures / "gptqmodel.safetensors")
    tensors = {suffix: stored[f"{name}.{suffix}"] for suffix in ("qweight", "scales", "g_idx")}
    tensors["qzeros"] = stored[f"{name}.qzeros_v{version}"]
    config = {"quant_method": "gptq", "bits": int(bits), "group_size": 32, "sym": kind == "sym", "desc_act": bool(act)}
    config |= {"checkpoint_format": "gptq" if version == 1 else "gptq_v2", "meta": {"quantizer": ["gptqmodel:7.6.0"]}}
    format_ = parse_gptq(config).format_of("model.layers.0.mlp.up_proj", tensors)
    assert format_ is not None
    weight = format_.read(tensors)
    assert weight.note == ""
    assert torch.equal(weight.dequantize().half(), stored[f"{name}.dequantized"])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("packing", "bits"),
    [*(("auto_round", bits) for bits in range(2, 9)), *(("auto_gptq", bits) for bits in (5, 6, 7))],
)
def test_numbers_are_auto_round_s_own(fixtures: Path, packing: str, bits: int, symmetric: bool) -> None:
    """Its layer's float16 weights, of words that its code packed. Scales are of both signs if symmetric.

    Its own packing holds zero points from 0 on; as auto_gptq 5 to 7 bits alone differ from what AutoGPTQ writes.
    """
    name = f"{packing}.{bits}.{'sym' if symmetric else 'asym'}"
    stored = load_file(fixtures / "auto-round.safetensors")
    tensors = {suffix: stored[f"{name}.{suffix}"] for suffix in ("qweight", "qzeros", "scales")}
    settings = {"bits": bits, "group_size": 32, "sym": symmetric, "data_type": "int"}
    config = {"packing_format": "auto_round" if packing == "auto_round" else "auto_round:auto_gptq", **settings}
    format_ = parse_auto_round(config).format_of("model.layers.0.mlp.up_proj", tensors)
    assert format_ is not None
    assert format_.shape(tensors) == (32, 64)
    weight = format_.read(tensors)
    assert weight.note == ""
    assert torch.equal(weight.dequantize().half(), stored[f"{name}.dequantized"])
    if bits in (5, 6, 7):
        with pytest.raises(FormatError, match="are read, not written"):
            format_.write(weight)
