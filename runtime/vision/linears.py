"""Linear layers of a tower that are quantized: by the kernels of the decoder's table, as data or as a plan of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor, nn

from octavo.quant.checkpoint import Checkpoint
from octavo.quant.kernel import LayerShape
from octavo.quant.kernel_table import KernelChoice, choose_kernel
from octavo.quant.linear import Linear, make_linear
from octavo.quant.target import Target
from octavo.runtime.model.kernel_plan import stored_order
from octavo.runtime.model.sources import SOUND_PREFIXES, TOWER_PREFIXES, CheckpointSource
from octavo.runtime.vision.kinds import MAKERS

POOLING = re.compile(r"(^|\.)head\.attention\.")
"""SigLIP's pooling head, which no model here reads: torch's own attention, which takes its layers' weights alone."""


class TowerLinear(nn.Module):
    """x [..., K] -> [..., N] in the place of a module of transformers."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear.forward(x.reshape(-1, x.shape[-1]).contiguous(), None)
        return out.view(*x.shape[:-1], out.shape[-1])


def tower_target(target: Target) -> Target:
    """Where a tower's linear layers run: an image is seen alone, so that no kernel has to be batch-invariant."""
    return replace(target, many_tokens=True, batch_invariant=False)


def spellings(name: str) -> Iterator[str]:
    """Names that a tower's parameter or module has in checkpoints: transformers 4 had a module more around CLIP and
    SigLIP.
    """
    tower, _, rest = name.partition(".")
    for prefix in ("model.", ""):
        yield prefix + name
        yield f"{prefix}{tower}.vision_model.{rest}"


def packed_linears(module: nn.Module, source: CheckpointSource, target: Target) -> dict[str, Linear]:
    """The quantized linear layers of a tower, by their names in it, packed for their kernels.

    module: the tower on torch's meta device. Raises LoadError and SchemeError.
    """
    found = {}
    for name, layer in module.named_modules():
        if type(layer) is not nn.Linear or POOLING.search(name):
            continue
        owner = next((one for one in spellings(name) if source.has(one)), None)
        if owner is None or not source.is_quantized(owner):
            continue
        weight = source.linear(owner, layer.out_features, layer.in_features)
        bias = source.bias(owner, layer.out_features, expected=layer.bias is not None)
        found[name] = make_linear([weight], [bias], target)
    return found


def put_in_place(module: nn.Module, linears: dict[str, Linear]) -> None:
    """Have a tower compute with these."""
    for name, linear in linears.items():
        module.set_submodule(name, TowerLinear(linear))


def plan_tower(checkpoint: Checkpoint, target: Target) -> dict[str, KernelChoice]:
    """The kernel of each quantized linear layer of a tower that is served, by full name, from headers alone.

    Raises SchemeError.
    """
    if checkpoint.config.get("model_type") not in MAKERS or target.device.type != "cpu" or target.capability:
        return {}
    found = {}
    for module in checkpoint.quantized:
        if not module.startswith(TOWER_PREFIXES) or module.startswith(SOUND_PREFIXES) or POOLING.search(module):
            continue
        format_ = checkpoint.stored_format_of(module)
        if format_ is not None:
            stored = {suffix: checkpoint.tensor(f"{module}.{suffix}") for suffix in checkpoint.suffixes(module)}
            rows, columns = format_.shape(stored)
            shape = LayerShape(rows, columns, order=stored_order(checkpoint, module, format_.scheme, columns))
            found[module] = choose_kernel(format_.scheme, shape, tower_target(target))
    return found
