"""Which card takes which table of block sizes, and that every table serves every size."""

from __future__ import annotations

from types import SimpleNamespace

import ahead
import pytest
import torch
from proofs import card_tables

from octavo.kernels.launching import tuning

CARDS = [
    ("NVIDIA H100 80GB HBM3", 90, "h100", "h100"),
    ("NVIDIA H100 PCIe", 90, "h100", "h100"),
    ("NVIDIA H200", 90, "h200", "h100"),
    ("NVIDIA GH200 480GB", 90, "gh200", "h100"),
    ("NVIDIA B200", 100, "b200", "h100"),
    ("NVIDIA A100-SXM4-80GB", 80, "a100", "a100"),
    ("NVIDIA A100 80GB PCIe", 80, "a100", "a100"),
    ("NVIDIA A10", 86, "a10", "l40s"),
    ("NVIDIA RTX A6000", 86, "a6000", "l40s"),
    ("NVIDIA GeForce RTX 3090", 86, "3090", "l40s"),
    ("NVIDIA L40S", 89, "l40s", "l40s"),
    ("NVIDIA L4", 89, "l4", "l40s"),
    ("NVIDIA GeForce RTX 4090", 89, "4090", "l40s"),
    ("NVIDIA GeForce RTX 5090", 120, "5090", "l40s"),
    ("Graphics Device", 90, "graphics-device", "h100"),
]
GEMMS = {"w8a16", "int8", "int4", "moe bf16", "moe int8", "moe w8a16", "moe int4"}
FP8_GEMMS = {"fp8", "fp8 blocks", "int4 fp8", "moe fp8", "moe fp8 blocks", "moe int4 fp8"}
OTHERS = {
    "paged decode", "paged prefill", "rope", "norm", "activation", "activation rows", "embedding", "quantize rows",
    "quantize groups", "gather", "dequantize", "add up", "moe route", "moe router", "moe align", "moe sum",
    "sampling lists", "sampling chunks", "sampling choice",
}  # fmt: skip
CHOICES = {"norms over heads"}  # of launches, which have their own sizes


@pytest.mark.parametrize(("name", "capability", "own", "taken"), CARDS, ids=lambda value: str(value))
def test_a_card_takes_its_table(name: str, capability: int, own: str, taken: str) -> None:
    assert tuning.stem(name) == own
    note = tuning.note_of(name, capability)
    assert tuning.table_of(name, capability) == taken
    if own == taken:
        assert note is None
    else:
        assert note == f"{name} has no table of block sizes of its own: kernels take those of tuning/{taken}.json"


@pytest.mark.parametrize(("name", "capability", "said"), [("Tesla T4", 75, "7.5"), ("Tesla V100-SXM2-16GB", 70, "7.0")])
def test_a_card_without_kernels_is_refused(name: str, capability: int, said: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: compute capability {said}, .* need 8\.0 .*--device cpu works"):
        tuning.note_of(name, capability)


def test_a_launch_has_the_sizes_of_its_tensors_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each device's own, and an H100's on no GPU; nothing is set, so that the order of launches is no matter."""
    cards = {0: ("NVIDIA H100 80GB HBM3", 9, 0), 1: ("NVIDIA A100-SXM4-80GB", 8, 0), 2: ("NVIDIA L40S", 8, 9)}

    def properties(device: torch.device) -> SimpleNamespace:
        assert device.index is not None
        return SimpleNamespace(**dict(zip(("name", "major", "minor"), cards[device.index], strict=True)))

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    tuning.card_of.cache_clear()
    try:
        gpus = [torch.device("cuda", index) for index in (2, 0, 1)]
        rows = [tuning.choose("int8", 4096, 4096, 4096, device) for device in (*gpus, torch.device("meta"))]
        assert [row["tma"] for row in rows] == [0, 1, 0, 1]
        assert rows[0]["programs"] == 142
        assert rows[1] == rows[3]
    finally:
        tuning.card_of.cache_clear()


@pytest.mark.parametrize("path", sorted(tuning.TUNING.glob("*.json")), ids=lambda path: path.stem)
def test_a_table_has_a_row_for_every_size(path: object) -> None:
    stem = getattr(path, "stem", "")
    table = tuning.rows_of(stem)
    assert set(table) == GEMMS | OTHERS | CHOICES | (
        set() if stem == "a100" else FP8_GEMMS
    )  # an A100 multiplies no fp8
    assert {name: tuning.BOUNDS for name, those in table.items() if set(those[-1]) & set(tuning.BOUNDS)} == {}
    if stem in ("a100", "l40s"):
        assert not any(row.get("tma") for those in table.values() for row in those)  # no memory accelerator before 9.0


@pytest.mark.parametrize("capability", [80, 89, 90])
def test_proofs_take_every_row(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled ahead has all sizes of a card's table: a GEMM's by `rows`, all others by the rooms' examples."""
    assert set(card_tables.FAMILIES) == GEMMS | FP8_GEMMS
    taken: dict[str, list[dict[str, int]]] = {}
    row_of = tuning.row_of

    def noted(kernel: str, *size: int | str) -> dict[str, int]:
        row = row_of(kernel, *size)
        taken.setdefault(kernel, []).append(row)
        return row

    monkeypatch.setattr(tuning, "row_of", noted)
    ahead.proofs(capability)
    table = tuning.rows_of(tuning.of_capability(capability))
    bare = {
        kernel: [{name: size for name, size in row.items() if name not in tuning.BOUNDS} for row in table[kernel]]
        for kernel in OTHERS
    }
    missing = {kernel: [row for row in those if row not in taken.get(kernel, [])] for kernel, those in bare.items()}
    assert {kernel: those for kernel, those in missing.items() if those} == {}
