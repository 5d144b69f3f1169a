"""The block runner against the decoder that serves: block by block the same numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_oracle import CASES, make_hf, save
from torch import Tensor

from octavo.calibration.algorithms.input_statistics import InputStats
from octavo.calibration.algorithms.scale_folding import fold_scales
from octavo.kernels.attention.step import StepInputs
from octavo.quant.checkpoint import Checkpoint
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.blocks import BlockRunner
from octavo.runtime.model.device import Device
from octavo.runtime.model.families.registry import LAYOUTS
from octavo.runtime.model.weights import load_model
from octavo.runtime.worker.kv_cache import allocate

LENGTH = 24


def whole_model(directory: Path, token_ids: Tensor) -> Tensor:
    """Logits [B, T, vocab] of the serving path, one sequence at a time."""
    model = load_model(EngineConfig(model=str(directory), dtype="float32"))
    rows = []
    for row in token_ids:
        step = StepInputs.prefill([LENGTH], LENGTH, token_ids=row, logits_index=range(LENGTH))
        rows.append(model.forward(step, allocate(model, 1, LENGTH, model.dtype)))
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["tiny", "tiny-qwen2", "tiny-moe"])
def test_blocks_in_a_row_are_the_decoder(fixtures: Path, name: str) -> None:
    directory = fixtures / name
    checkpoint = Checkpoint.open(directory)
    runner = BlockRunner(checkpoint.config | {"dtype": "float32"}, "model.", LENGTH)
    token_ids = torch.randint(3, 1000, (3, LENGTH), generator=torch.Generator().manual_seed(1))

    hidden = runner.embed(token_ids, checkpoint.tensor(runner.embedding_name).float())
    seen: dict[str, Tensor] = {}
    for index in range(runner.num_blocks):
        tensors = {n: checkpoint.tensor(n).float() for n in checkpoint.names if f".layers.{index}." in n}
        layer = runner.build(index, tensors)
        groups = runner.groups(index, layer)
        assert {m for group in groups for m in group.modules} == {
            n.removesuffix(".weight") for n, t in tensors.items() if t.ndim == 2 and not n.endswith("mlp.gate.weight")
        }
        seen.clear()
        hidden = runner.forward(layer, hidden, lambda group, x: seen.__setitem__(group, x))
        assert seen.keys() == {group.name for group in groups}

    logits = runner.head(checkpoint.tensor)(hidden.flatten(0, 1)).view(3, LENGTH, -1)
    # Batches differ in how a GEMM splits its sums: float32 rounding, over some hundred products of numbers near 1.
    torch.testing.assert_close(logits, whole_model(directory, token_ids), rtol=1e-4, atol=1e-4)


def test_a_gpu_sees_every_expert_s_input(fixtures: Path) -> None:
    """Serving stacks experts there for grouped GEMMs; calibration has them one by one, as on a CPU."""
    device = replace(Device.choose("cpu"), capability=90)
    checkpoint = Checkpoint.open(fixtures / "tiny-moe")
    runner = BlockRunner(checkpoint.config | {"dtype": "bfloat16"}, "model.", LENGTH, device)
    assert runner.dtype == torch.bfloat16
    layer = runner.build(0, {n: checkpoint.tensor(n) for n in checkpoint.names if ".layers.0." in n})
    assert [group.name for group in runner.groups(0, layer)] == ["qkv", "o", "experts.gate_up", *EXPERT_DOWNS]
    assert runner.expert_counts is not None


EXPERT_DOWNS = [f"experts.{i}.down" for i in range(4)]


@pytest.mark.parametrize(
    ("name", "groups"),
    [("tiny", ["qkv", "o", "gate_up", "down"]), ("tiny-moe", ["qkv", "o", "experts.gate_up", *EXPERT_DOWNS])],
)
def test_a_folded_scale_changes_nothing(fixtures: Path, name: str, groups: list[str]) -> None:
    """Each Fold really names the op whose channels the group reads: dividing there and multiplying here is nothing."""
    checkpoint = Checkpoint.open(fixtures / name)
    runner = BlockRunner(checkpoint.config | {"dtype": "float32"}, "model.", LENGTH)
    tensors = {n: checkpoint.tensor(n).float().clone() for n in checkpoint.names if ".layers.0." in n}
    hidden = torch.randn(2, LENGTH, runner.hidden_size, generator=torch.Generator().manual_seed(2))
    layer = runner.build(0, tensors)
    before = runner.forward(layer, hidden)
    readers = {group.name: group.modules for group in runner.groups(0, layer)}
    folds = runner.folds(0)
    assert [fold.group for fold in folds] == groups
    for fold in folds:
        weight = tensors[f"{fold.producer}.weight"]
        scale = torch.rand(weight.shape[0], generator=torch.Generator().manual_seed(3)) + 0.5
        weight.div_(scale if weight.ndim == 1 else scale.unsqueeze(1))
        heads = scale.view(-1, 1, fold.head_dim) if fold.repeats > 1 else scale.view(-1, 1, 1)
        spread = heads.expand(-1, fold.repeats, -1).flatten()
        for module in (*readers[fold.group], *fold.also):
            tensors[f"{module}.weight"].mul_(spread)
    after = runner.forward(runner.build(0, tensors), hidden)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_every_expert_sees_every_token_and_only_the_routed_ones_are_counted(fixtures: Path) -> None:
    checkpoint = Checkpoint.open(fixtures / "tiny-moe")
    runner = BlockRunner(checkpoint.config | {"dtype": "float32"}, "model.", LENGTH)
    tensors = {n: checkpoint.tensor(n).float() for n in checkpoint.names if ".layers.0." in n}
    layer = runner.build(0, tensors)
    hidden = torch.randn(2, LENGTH, runner.hidden_size, generator=torch.Generator().manual_seed(2))
    seen: dict[str, Tensor] = {}
    recorded = runner.forward(layer, hidden, lambda group, x: seen.__setitem__(group, x))
    # Summed expert by expert instead of in the order of their weights: float32 rounding of numbers near 1.
    torch.testing.assert_close(recorded, runner.forward(layer, hidden), rtol=1e-5, atol=1e-5)
    x = seen["experts.gate_up"]
    assert x.shape == (2 * LENGTH, runner.hidden_size)
    for i in range(4):
        gate, up = (x @ tensors[f"model.layers.0.mlp.experts.{i}.{n}_proj.weight"].t() for n in ("gate", "up"))
        torch.testing.assert_close(seen[f"experts.{i}.down"], torch.nn.functional.silu(gate) * up)
    best = (x @ tensors["model.layers.0.mlp.gate.weight"].t()).argsort(dim=1, descending=True)[:, :2]
    assert runner.expert_counts is not None
    assert runner.expert_counts.tolist() == [int((best == i).sum()) for i in range(4)]


def test_scales_before_experts_are_folded_into_routers_too(tmp_path: Path) -> None:
    """Qwen2-MoE, whose shared expert and its gate read the same input: by calibration's own folding."""
    checkpoint = Checkpoint.open(save(make_hf(*CASES["qwen2_moe"]), tmp_path))
    runner = BlockRunner(checkpoint.config, "model.", LENGTH)
    tensors = {n: checkpoint.tensor(n).clone() for n in checkpoint.names if ".layers.1." in n}
    hidden = torch.randn(2, LENGTH, runner.hidden_size, generator=torch.Generator().manual_seed(2))
    layer = runner.build(1, tensors)
    before = runner.forward(layer, hidden)
    readers = {group.name: group.modules for group in runner.groups(1, layer)}
    folds = [fold for fold in runner.folds(1) if fold.group not in ("qkv", "o")]
    downs = [*(f"experts.{i}.down" for i in range(6)), "shared.down"]
    assert [fold.group for fold in folds] == ["experts.gate_up", *downs]
    assert [fold.also for fold in folds if fold.also] == [
        ("model.layers.1.mlp.gate", "model.layers.1.mlp.shared_expert_gate")
    ]
    for fold in folds:
        k = tensors[f"{readers[fold.group][0]}.weight"].shape[1]
        scales = torch.rand(k, generator=torch.Generator().manual_seed(3)) + 0.5
        stats = InputStats(torch.eye(k), scales, scales, 1, torch.empty(0, k))
        fold_scales(tensors, fold, readers[fold.group], scales, stats)
    after = runner.forward(runner.build(1, tensors), hidden)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "falcon_h1", "granitemoehybrid-dense", "lfm2"])
def test_the_norm_behind_a_block_is_the_one_that_transformers_puts_there(tmp_path: Path, name: str) -> None:
    """Its input is the block's output, and it multiplies by its weight and what is said to be added."""
    hf = make_hf(*CASES[name])
    save(hf, tmp_path)
    checkpoint = Checkpoint.open(tmp_path, LAYOUTS)
    runner = BlockRunner(checkpoint.config, "model.", LENGTH)
    outputs = list[Tensor]()
    for layer in hf.model.layers:
        layer.register_forward_hook(lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    modules = dict(hf.named_modules())
    reads = {}
    behind = [runner.norm_behind(index) for index in range(runner.num_blocks)]
    for found in behind:
        assert found is not None
        module = modules[found[0].removesuffix(".weight")]
        module.register_forward_hook(lambda _, args, out, key=found[0]: reads.update({key: (args[0], out)}))
    hf(torch.randint(3, 90, (1, LENGTH), generator=torch.Generator().manual_seed(1)))
    for output, found in zip(outputs, behind, strict=True):
        assert found is not None
        read, given = reads[found[0]]
        torch.testing.assert_close(read, output, rtol=0, atol=0)
        unit = read / read.square().mean(-1, keepdim=True).sqrt()
        factor = checkpoint.tensor(found[0]) + found[1]
        torch.testing.assert_close(given, unit * factor, rtol=1e-3, atol=1e-3)


def test_no_norm_is_behind_a_block_whose_reader_has_none(tmp_path: Path) -> None:
    hf = make_hf(*CASES["olmo2"])
    save(hf, tmp_path)
    runner = BlockRunner(Checkpoint.open(tmp_path).config, "model.", LENGTH)
    assert [runner.norm_behind(i) for i in range(runner.num_blocks)] == [
        *[None] * (runner.num_blocks - 1),
        ("model.norm.weight", 0.0),
    ]
