"""An encoder-decoder's blocks as calibration runs them, against transformers on the same weights in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_encdec
import torch
from slow_cases import slow
from tiny_encdec import VOCABULARY
from torch import Tensor

from octavo.calibration.algorithms.input_statistics import StatsCollector
from octavo.calibration.algorithms.scale_folding import fold_scales
from octavo.quant.checkpoint import Checkpoint
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.encdec import EncoderDecoder
from octavo.runtime.model.encdec_blocks import EncDecBlockRunner
from octavo.runtime.model.families.registry import LAYOUTS
from octavo.runtime.model.sources import LoadError
from octavo.runtime.model.weights import load_model

LENGTH = 24
EPS = torch.finfo(torch.float32).eps
SHORT = ("t5, FLAN's", "umt5", "mbart", "marian")  # gated, biases of each layer, norms before sums, and behind them
CASES = [name if name in SHORT else slow(name) for name in tiny_encdec.CASES]


class Made:
    """A tiny model, its runner, and samples of it: tokens that both halves read."""

    def __init__(self, name: str, directory: Path) -> None:
        self.directory = directory
        self.theirs = tiny_encdec.make(name, directory)
        self.checkpoint = Checkpoint.open(directory, LAYOUTS)
        self.runner = EncDecBlockRunner(self.checkpoint, LENGTH)
        drawn = torch.Generator().manual_seed(1)
        self.token_ids = torch.randint(3, VOCABULARY, (3, 2 * LENGTH), generator=drawn)

    def tensors(self, index: int) -> dict[str, Tensor]:
        """Of a block, by the names of its layer."""
        first = self.runner.spec.encoder.num_layers
        stack, number = ("encoder", index) if index < first else ("decoder", index - first)
        owner = self.runner.spec.names.layer.format(stack, number)
        return {name: self.checkpoint.tensor(name).clone() for name in self.checkpoint.names if name.startswith(owner)}

    def embedded(self) -> Tensor:
        return self.runner.embed(self.token_ids, self.checkpoint.tensor(self.runner.embedding_name))


def assert_near(found: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4, msg=lambda why: f"{what}: {why}")


@pytest.mark.parametrize("name", CASES)
def test_blocks_in_a_row_are_the_model(name: str, tmp_path: Path) -> None:
    """The encoder's output and logits, and the input of each linear layer, as transformers' own module has it."""
    made = Made(name, tmp_path)
    read, written = made.token_ids.chunk(2, dim=1)
    theirs: dict[str, Tensor] = {}
    for module_name, module in made.theirs.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, given, __, name=module_name: theirs.__setitem__(name, given[0]))
    with torch.inference_mode():
        truth = made.theirs(input_ids=read, decoder_input_ids=written)
    hidden = made.embedded()
    for index in range(made.runner.num_blocks):
        layer = made.runner.build(index, made.tensors(index))
        seen: dict[str, Tensor] = {}
        hidden = made.runner.forward(layer, hidden, lambda group, x, seen=seen: seen.__setitem__(group, x.clone()))
        groups = made.runner.groups(index, layer)
        assert seen.keys() == {group.name for group in groups}
        for group in groups:
            for module in group.modules:
                expected = theirs[module].flatten(0, -2)
                torch.testing.assert_close(
                    seen[group.name], expected, atol=2e-4, rtol=2e-4, msg=lambda m, n=module: f"{n}: {m}"
                )
    first, second = hidden.chunk(2, dim=1)
    torch.testing.assert_close(first, truth.encoder_last_hidden_state, atol=1e-4, rtol=1e-4)
    model = load_model(EngineConfig(model=str(tmp_path), dtype="float32", max_num_seqs=1))
    assert isinstance(model, EncoderDecoder)
    logits = model.logits(model.normed(second.reshape(-1, made.runner.hidden_size))).view(*written.shape, -1)
    torch.testing.assert_close(logits, truth.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_a_folded_scale_changes_nothing(name: str, tmp_path: Path) -> None:
    """By calibration's own folding, of every input that the runner says can be scaled."""
    made = Made(name, tmp_path)
    drawn = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, 2 * LENGTH, made.runner.hidden_size, generator=drawn)
    first = made.runner.spec.encoder.num_layers
    norms = made.runner.spec.row.norms == "pre"
    for index in (0, first - 1, first):
        tensors = made.tensors(index)
        layer = made.runner.build(index, tensors)
        before = made.runner.forward(layer, hidden)
        folds = {fold.group: fold for fold in made.runner.folds(index)}
        modules = made.runner.modules(index)
        assert ("qkv" in folds) == norms
        assert {"o", "cross_o"} & modules.keys() <= folds.keys() <= modules.keys() - {"cross_kv"}
        for group, fold in folds.items():
            columns = tensors[f"{modules[group][0]}.weight"].shape[1]
            collector = StatsCollector(columns, torch.device("cpu"))
            collector.add(torch.randn(4, columns, generator=drawn))
            scales = torch.rand(columns, generator=drawn) + 0.5
            fold_scales(tensors, fold, modules[group], scales, collector.result())
        after = made.runner.forward(made.runner.build(index, tensors), hidden)
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_the_differentiable_block_computes_the_same(name: str, tmp_path: Path) -> None:
    """Every block in float32, and every weight has a gradient."""
    made = Made(name, tmp_path)
    hidden = made.embedded()
    for index in range(made.runner.num_blocks):
        tensors = made.tensors(index)
        layer = made.runner.build(index, tensors)
        weights = {
            linear: torch.cat([tensors[f"{module}.weight"] for module in modules]).requires_grad_()
            for linear, modules in made.runner.modules(index).items()
        }
        expected = made.runner.forward(layer, hidden)
        found = made.runner.differentiable(layer).forward(hidden.clone(), weights)
        found.square().sum().backward()
        worst = (found.detach() - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert float(worst.max()) < 200 * EPS
        assert all(bool((weight.grad != 0).any()) for weight in weights.values() if weight.grad is not None)
        assert all(weight.grad is not None for weight in weights.values())
        hidden = expected


def test_positions_bound_a_half(tmp_path: Path) -> None:
    tiny_encdec.make("bart", tmp_path)
    checkpoint = Checkpoint.open(tmp_path, LAYOUTS)
    with pytest.raises(LoadError, match="--max-seq-length 65: the model has 64 positions; 64 works"):
        EncDecBlockRunner(checkpoint, 65)
