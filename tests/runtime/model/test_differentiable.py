"""The block that back-propagates against the block that serves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hf_oracle import CASES, READS_MORE, make_hf, save

from octavo.quant.checkpoint import Checkpoint
from octavo.runtime.model.blocks import BlockRunner
from octavo.runtime.model.differentiable import HALVED, causal_attention
from octavo.runtime.model.families.registry import LAYOUTS
from octavo.runtime.model.sources import CheckpointSource

LENGTH = 24  # beyond the cases' windows, and beyond the 16 positions that their ropes were pretrained for
EPS = torch.finfo(torch.float32).eps


def in_int8(x: torch.Tensor) -> torch.Tensor:
    """Each token's numbers as multiples of a 127th of the largest."""
    step = x.abs().amax(-1, keepdim=True) / 127
    return (x / step).round() * step


@pytest.mark.parametrize("length", [1, LENGTH])
@pytest.mark.parametrize("name", [name for name in CASES if name not in READS_MORE])
def test_its_output_is_the_serving_block_s(name: str, length: int, tmp_path: Path) -> None:
    """Every block of every family, in float32: both round some hundred sums, each by a part of EPS."""
    checkpoint = Checkpoint.open(save(make_hf(*CASES[name]), tmp_path), LAYOUTS)
    runner = BlockRunner(checkpoint.config | {"dtype": "float32"}, CheckpointSource(checkpoint).prefix, LENGTH)
    token_ids = torch.randint(3, 90, (3, length), generator=torch.Generator().manual_seed(1))
    hidden = runner.embed(token_ids, checkpoint.tensor(runner.embedding_name))
    for index in range(runner.num_blocks):
        tensors = {n: checkpoint.tensor(n) for n in checkpoint.names if f".layers.{index}." in n}
        layer = runner.build(index, tensors)
        weights = {
            linear: torch.cat([tensors[f"{module}.weight"] for module in modules]).requires_grad_()
            for linear, modules in runner.modules(index).items()
        }
        expected = runner.forward(layer, hidden)
        found = runner.differentiable(layer).forward(hidden.clone(), weights)
        found.square().sum().backward()
        worst = (found.detach() - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert float(worst.max()) < 200 * EPS
        used = [weight.grad for linear, weight in weights.items() if not linear.startswith("experts.")]
        assert all(gradient is not None for gradient in used)
        assert length == 1 or all(bool((gradient != 0).any()) for gradient in used)  # one key is all that a query sees
        hidden = expected


@pytest.mark.parametrize("rounded", [False, True], ids=["plain", "rounded"])
def test_its_gradients_are_those_of_transformers(tmp_path: Path, rounded: bool) -> None:
    """Through grouped-query attention, biases and the MLP, of one block whose output is the model's hidden state.

    With inputs of linear layers in int8, whose gradients are those of what was rounded.
    """
    hf = make_hf("Llama", CASES["llama"][1] | {"num_hidden_layers": 1})
    checkpoint = Checkpoint.open(save(hf, tmp_path), LAYOUTS)
    token_ids = torch.randint(3, 90, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    direction = torch.randn(2, LENGTH, 64, generator=torch.Generator().manual_seed(2))
    layer = hf.model.layers[0]
    outputs = []
    layer.register_forward_hook(lambda *given: outputs.append(given[2]))
    for module in layer.modules():
        if rounded and isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, given: (given[0] + (in_int8(given[0]) - given[0]).detach(),))
    hf(token_ids)
    (output,) = outputs
    (output[0] if isinstance(output, tuple) else output).mul(direction).sum().backward()

    runner = BlockRunner(checkpoint.config | {"dtype": "float32"}, "model.", LENGTH)
    hidden = runner.embed(token_ids, checkpoint.tensor(runner.embedding_name)).clone()
    tensors = {n: checkpoint.tensor(n) for n in checkpoint.names if ".layers.0." in n}
    built = runner.build(0, tensors)
    block = runner.differentiable(built, dict.fromkeys(built.linears(), in_int8) if rounded else {})
    weights = {
        linear: torch.cat([tensors[f"{module}.weight"] for module in modules]).requires_grad_()
        for linear, modules in runner.modules(0).items()
    }
    block.forward(hidden, weights).mul(direction).sum().backward()
    expected = {name.removesuffix(".weight"): parameter.grad for name, parameter in layer.named_parameters()}
    for linear, modules in runner.modules(0).items():
        wanted = torch.cat([expected[module.removeprefix("model.layers.0.")] for module in modules])
        gradient = weights[linear].grad
        assert gradient is not None
        assert float((gradient - wanted).norm() / wanted.norm()) < 200 * EPS, linear


@pytest.mark.parametrize("length", [2 * HALVED - 1, 2 * HALVED, 2 * HALVED + 1])
def test_attention_in_halves_and_its_gradients(length: int) -> None:
    """Against float64, with values of another width than keys, as latents' are."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, length, 16), (2, 3, length, 16), (2, 3, length, 8)]
    exact = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    inputs = [each.detach().float().requires_grad_() for each in exact]
    direction = torch.randn(2, 3, length, 8, generator=generator, dtype=torch.float64)
    q, k, v = exact
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    expected = (q @ k.mT * 0.25).masked_fill(hidden, -torch.inf).softmax(-1) @ v
    expected.backward(direction)
    found = causal_attention(*inputs, 0.25)
    found.backward(direction.float())
    torch.testing.assert_close(found, expected.float(), rtol=length * EPS, atol=length * EPS)
    for given, wanted in zip(inputs, exact, strict=True):
        torch.testing.assert_close(given.grad, wanted.grad.float(), rtol=length * EPS, atol=length * EPS)
