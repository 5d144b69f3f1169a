"""Inputs of down projections that are rotated while serving (R4), as a checkpoint's `transform_config` says."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from octavo.kernels.quantized_activation import ActivationQuant, Hidden
from octavo.quant.formats.format import FormatError
from octavo.quant.head_name import head_name
from octavo.runtime.model.layers import GatedMlp
from octavo.runtime.model.names import LinearParts, layer_linears
from octavo.runtime.model.operators import GatedActivation, HadamardBody, Ops
from octavo.runtime.model.sources import LoadError, Source
from octavo.runtime.model.spec import DecoderSpec


@dataclass(frozen=True, slots=True)
class RotatedActivation:
    """An MLP's activation, and behind it a Hadamard transform in blocks of so many columns."""

    act: GatedActivation
    hadamard: HadamardBody
    block: int

    def __call__(self, gate_up: Tensor, input_quant: ActivationQuant | None = None, /) -> Hidden:
        hidden = self.act(gate_up, input_quant)
        assert isinstance(hidden, Tensor)  # devices whose activations quantize have no `hadamard`
        return self.hadamard(hidden, self.block)


def input_block(source: Source, parts: LinearParts) -> int | None:
    """The Hadamard blocks of a down projection's input; None: it isn't rotated. Raises LoadError."""
    (module,) = parts.modules
    return _block(source, module, parts.in_features)


def _block(source: Source, module: str, columns: int) -> int | None:
    try:
        return source.transforms.block_of(module, columns)
    except FormatError as e:
        raise LoadError(str(e)) from e


def _rotated_module(source: Source, parts: LinearParts) -> str | None:
    """The first module of a linear layer whose input is rotated."""
    return next((it for it in parts.modules if _block(source, it, parts.in_features) is not None), None)


def rotated(mlp: GatedMlp, source: Source, down: LinearParts, ops: Ops) -> GatedMlp:
    """The MLP with the transform of its down projection's input, where the checkpoint has one."""
    block = input_block(source, down)
    if block is None:
        return mlp
    assert ops.hadamard is not None  # as `check_rotated_inputs` has seen to
    return replace(mlp, act=RotatedActivation(mlp.act, ops.hadamard, block))


def check_rotated_inputs(spec: DecoderSpec, source: Source, ops: Ops, *, is_divided: bool, adapts: bool) -> None:
    """Raise LoadError for inputs that aren't rotated here, and for what rotated ones don't go along with.

    is_divided: over ranks; adapts: adapters are served.
    """
    transforms = source.transforms
    if not transforms:
        return
    reasons = {
        f"no {ops.name} kernel rotates inputs while serving; --device cpu has one": ops.hadamard is None,
        "an input that is rotated isn't divided over ranks; one rank works, and so does -dp": is_divided,
        "adapters read inputs as they were before they were rotated; leave --enable-lora out": adapts,
    }
    for reason, holds in reasons.items():
        if holds:
            raise LoadError(f"the checkpoint's transform_config ({transforms.names}): {reason}")
    layers = [layer_linears(spec, index, source.prefix, source.has) for index in range(len(spec.layers))]
    head = LinearParts({head_name(source.prefix): spec.vocab_size}, spec.hidden_size)
    for kinds in (*layers, {"lm_head": head}):
        for kind, parts in kinds.items():
            where = None if kind == "down" else _rotated_module(source, parts)
            if where is not None:
                raise LoadError(
                    f"{where}: transform_config ({transforms.names}) rotates its input while "
                    "serving; octavo does so before down_proj of an MLP that is no expert, and nowhere else"
                )
