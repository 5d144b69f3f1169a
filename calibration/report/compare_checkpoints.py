"""Two checkpoints side by side, weight by weight: what an evaluation can tell of a quantization that others did."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.calibration.layers import BLOCK
from octavo.calibration.report.weight_error import LayerRow, layer_row, squared_error
from octavo.kernels.hadamard.reference import hadamard
from octavo.quant.checkpoint import Checkpoint
from octavo.quant.printable import some
from octavo.quant.qparams import QuantizedWeight
from octavo.quant.scheme import QuantScheme

SAME_NORM = 0.02  # relative; a quantizer that only stores norms in float16 or bfloat16 changes them by 0.004 at most
HEADS = ("v_proj", "o_proj")  # where R2 turns values, and back
FUSED = "qkv_proj"  # whose last rows are values
SAME_PRODUCT = 0.6  # relative; 2 bits in groups of 32 change it by 0.38, and another weight by 1 and more


@dataclass(frozen=True)
class SideBySide:
    """schemes: of all quantized layers. rows: empty, with a note that says why, where weights can't be compared."""

    schemes: tuple[QuantScheme, ...]
    rows: tuple[LayerRow, ...]
    notes: tuple[str, ...]


def compare_checkpoints(original: Checkpoint, quantized: Checkpoint) -> SideBySide:
    """Read every quantized layer of the decoder's blocks, one at a time, and compare it with the original's weight.

    Raises CheckpointError for what can't be read.
    """
    modules = _quantized_modules(quantized)
    schemes = tuple(dict.fromkeys(modules.values()))
    scaled = _scaled_norm(original, quantized)
    if scaled is not None:
        note = (
            f"{scaled} differs: the quantizer folded scales or rotations into weights (AWQ, SmoothQuant, R1), so they "
            "aren't compared"
        )
        return SideBySide(schemes, (), (note,))
    rows = [row for module in modules if (row := _row(module, original, quantized)) is not None]
    notes = []
    if missing := len(modules) - len(rows):
        notes.append(f"{missing} quantized layers have no weight of that name and shape in the original")
    others = [row.module for row in rows if _is_rotated(row, original, quantized)]
    if others:
        notes.append(f"{some(others)}: weights of another basis (rotated heads, R2), which aren't compared")
    return SideBySide(schemes, tuple(row for row in rows if row.module not in others), tuple(notes))


def _is_rotated(row: LayerRow, original: Checkpoint, quantized: Checkpoint) -> bool:
    """Whether R2 has turned the weight: that changes it, and not its product with itself, which heads are summed in."""
    module = row.module
    is_fused = module.endswith(FUSED)
    if not is_fused and (row.noise <= row.signal or not module.endswith(HEADS)):
        return False
    weight = quantized.linear(module)
    assert isinstance(weight, QuantizedWeight)  # it has a row
    before = original.tensor(f"{module}.weight").float()
    after = weight.dequantize()
    if is_fused:
        first = _first_turned(before, after)
        before = before[first:]
        after = after[first:]
    elif module.endswith("o_proj"):
        before = before.t()
        after = after.t()
    product = before.t() @ before
    return bool((after.t() @ after - product).norm() < SAME_PRODUCT * product.norm())


def _first_turned(before: Tensor, after: Tensor) -> int:
    """Where the last rows begin that are other ones in the two, for the most part; behind the last row if none are."""
    is_other = (after - before).square().sum(1) > before.square().sum(1)
    balance = (2 * is_other.int() - 1).flip(0).cumsum(0)  # of the last 1, 2, ... rows: others over the rest
    best = int(balance.argmax())
    return len(before) - 1 - best if balance[best] > 0 else len(before)


def _quantized_modules(checkpoint: Checkpoint) -> dict[str, QuantScheme]:
    """Linear layers in blocks that have a scheme, in the order of their names."""
    modules = [module for module in checkpoint.quantized if BLOCK.match(f"{module}.weight")]
    formats = {module: checkpoint.format_of(module) for module in modules}
    return {module: format_.scheme for module, format_ in formats.items() if format_ is not None}


def _row(module: str, original: Checkpoint, quantized: Checkpoint) -> LayerRow | None:
    match = BLOCK.match(f"{module}.weight")
    weight = quantized.linear(module)
    name = f"{module}.weight"
    if match is None or not isinstance(weight, QuantizedWeight) or not original.has(name):
        return None
    before = original.tensor(name)
    shape = weight.shape
    if tuple(before.shape) != shape:
        return None
    if (block := quantized.transforms.block_of(module, shape[1])) is not None:
        before = hadamard(before.float(), block)
    return layer_row(
        module,
        int(match["index"]),
        match["kind"],
        shape,
        scheme=weight.scheme,
        bytes_before=original.spec(name).nbytes,
        bytes_after=sum(quantized.spec(f"{module}.{suffix}").nbytes for suffix in quantized.suffixes(module)),
        error=squared_error(before, weight),
    )


def _scaled_norm(original: Checkpoint, quantized: Checkpoint) -> str | None:
    """The first norm of a block whose weight is another one in the two."""
    for name in sorted(original.names & quantized.names):
        if BLOCK.match(name) and name.endswith("norm.weight"):
            before, after = (checkpoint.tensor(name).float() for checkpoint in (original, quantized))
            if before.shape != after.shape or not torch.allclose(before, after, rtol=SAME_NORM, atol=1e-6):
                return name
    return None
