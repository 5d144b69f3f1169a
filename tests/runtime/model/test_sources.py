"""What a rank reads of a checkpoint: its shard of each weight and bias, in memory of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from trimmed import whole

from octavo.quant.checkpoint import Checkpoint
from octavo.quant.qparams import QuantizedWeight, Weight
from octavo.quant.shard import Axis, Shard
from octavo.runtime.model.sources import CheckpointSource, LoadError

LAYER = "model.layers.0"


def numbers(weight: Weight) -> Tensor:
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight.float()


@pytest.mark.parametrize("name", ["tiny", "tiny--autoawq-w4g32", "tiny--llmc-w8a8"])
@pytest.mark.parametrize(
    ("module", "shape", "axis"), [("gate_proj", (352, 128), "rows"), ("down_proj", (128, 352), "columns")]
)
def test_a_rank_reads_its_share(
    name: str, module: str, shape: tuple[int, int], axis: Axis, fixtures: Path, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(whole(fixtures / name, tmp_path))
    source = CheckpointSource(checkpoint)
    module = f"{LAYER}.mlp.{module}"
    expected = numbers(source.linear(module, *shape))
    shards = [source.linear(module, *shape, Shard(axis, rank, 2, 32)) for rank in range(2)]
    dim = 0 if axis == "rows" else 1
    assert [shard.shape[dim] for shard in shards] == [192, 160]
    assert torch.equal(torch.cat([numbers(shard) for shard in shards], dim), expected)
    for shard in shards:
        codes = shard if isinstance(shard, Tensor) else shard.codes
        assert codes.untyped_storage().nbytes() == codes.nbytes


def test_a_rank_adds_its_rows_of_a_bias(fixtures: Path, tmp_path: Path) -> None:
    source = CheckpointSource(Checkpoint.open(whole(fixtures / "tiny-qwen2", tmp_path)))
    module = f"{LAYER}.self_attn.q_proj"
    bias = source.bias(module, 128, expected=True)
    assert bias is not None
    shares = [source.bias(module, 128, expected=True, shard=Shard("rows", rank, 2, 32)) for rank in range(2)]
    assert torch.equal(torch.cat([share for share in shares if share is not None]), bias)


def test_what_cannot_be_cut_names_the_layer(fixtures: Path, tmp_path: Path) -> None:
    source = CheckpointSource(Checkpoint.open(whole(fixtures / "tiny--gptqmodel-w4g32-act", tmp_path)))
    with pytest.raises(LoadError, match=r"model.layers.0.self_attn.o_proj: .*act-order.*one rank works"):
        source.linear(f"{LAYER}.self_attn.o_proj", 128, 128, Shard("columns", 0, 2, 32))
