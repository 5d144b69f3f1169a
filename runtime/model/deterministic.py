"""What --deterministic asks of a model: each body batch-invariant, or the start refused with the name of what isn't.

Which kernel multiplies a weight, and whether that one is, the table of kernels says (quant/kernel_table.py). A model is
refused before its weights are read.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from octavo.quant.target import Target
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.device import Device
from octavo.runtime.model.operators import Ops
from octavo.runtime.model.sources import LoadError
from octavo.runtime.model.spec import DecoderSpec

FLAG = "--deterministic"


def make_target(config: EngineConfig, device: Device, dtype: torch.dtype, *, rounds_inputs: bool = False) -> Target:
    """Where a model's linear layers run, and which of their kernels may be chosen."""
    return Target.of(
        device.torch_device,
        dtype,
        device.capability,
        rounds_inputs=rounds_inputs,
        batch_invariant=config.deterministic,
    )


def choose_ops(config: EngineConfig, spec: DecoderSpec, device: Device, dtype: torch.dtype, *, is_divided: bool) -> Ops:
    """The operators of a decoder on a device. Raises LoadError where the mode is on and something isn't invariant.

    is_divided: over the ranks of an engine.
    """
    ops = device.ops(dtype)
    if not config.deterministic:
        return ops
    target = make_target(config, device, dtype)
    for reason in _refusals(ops, spec, target, is_divided=is_divided):
        raise LoadError(f"{FLAG}: {reason}")
    assert ops.invariant is not None
    return ops.invariant


def refuse_transformers(config: EngineConfig, reason: str) -> None:
    """Raise LoadError where the mode is on: `reason` says why transformers' own code is to run."""
    if config.deterministic:
        raise LoadError(f"{FLAG}: transformers' own code is not batch-invariant ({reason}); leave it out")


def _refusals(ops: Ops, spec: DecoderSpec, target: Target, *, is_divided: bool) -> Iterator[str]:
    if target.device.type != "cpu" or target.capability:
        yield f"no kernel of {target} is known to be batch-invariant; --device cpu has such kernels"
    if not target.has_dot_products or ops.invariant is None:
        yield "this processor has no AVX-512 with BF16 and VNNI, which the batch-invariant kernels need; leave it out"
    if is_divided:
        yield "sums over the ranks of an engine are not known to be batch-invariant; one rank works, and so does -dp"
    if spec.moe is not None:
        yield f"the router of {spec.architecture} is not batch-invariant; leave it out"
    if spec.streams is not None:
        yield f"alternating updates, which {spec.architecture} has, are not batch-invariant; leave it out"
    if variant := next((mixer.title for mixer in spec.states if not mixer.batch_invariant), None):
        yield f"{variant}, which {spec.architecture} has, is not batch-invariant; leave it out"
    if spec.has_latents:
        yield f"attention over latents, which {spec.architecture} has, is not batch-invariant; leave it out"
    for size in {layer.mixer.head_dim for layer in spec.layers if layer.mixer.head_dim % 16}:
        yield f"heads of {size} elements have no batch-invariant attention, multiples of 16 have; leave it out"
