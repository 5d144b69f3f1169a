"""A linear layer over one or several quantized weights, and the choice of the kernel that runs it.

The choice is a pure function of (scheme, shape, device, dtype), made once at load; what changes with the number of
tokens changes inside the body. Kernels know no schemes: this file is where bits get their meaning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.kernels.attention.step import StepInputs
from octavo.kernels.fp8 import reference as fp8_reference
from octavo.kernels.int8 import reference as int8_reference
from octavo.kernels.native import cpu_features
from octavo.kernels.quantized_activation import Hidden, Rounding
from octavo.quant.body import Body
from octavo.quant.linear_gpu import gpu_body, multiplies
from octavo.quant.qparams import QuantizedWeight
from octavo.quant.scheme import CHANNEL, PRESETS, TENSOR, ActivationScheme, Granularity, QuantScheme, WeightScheme

MAX_INT8_COLUMNS = 65_792  # an int32 sum of products holds no more

Round = Callable[[Tensor], Tensor]
"""Rounds a layer's input [M, K] as its scheme says and returns the rounded values in float32."""


class Linear(nn.Module):
    """x [T, K] -> [T, N]: bodies side by side along N (one, when all parts could be fused), and a bias.

    wants: how the kernel before may round x, which then comes as `Rounded`; None: x is a plain tensor.
    """

    def __init__(self, scheme: str, bodies: list[Body], bias: Tensor | None) -> None:
        super().__init__()
        self._scheme = scheme
        self._bodies = bodies
        self._bias = bias
        alone = bodies[0] if len(bodies) == 1 and bias is None else None
        self.wants: Rounding | None = None if alone is None else alone.wants
        self._partial = None if alone is None else alone.partial

    def forward(self, x: Hidden, step: StepInputs | None = None) -> Tensor:  # noqa: ARG002
        """step: what the step is told beside x, for what a layer does per token: an adapter, a rank's sum."""
        out = self._bodies[0].run(x) if len(self._bodies) == 1 else torch.cat([b.run(x) for b in self._bodies], dim=-1)
        return out if self._bias is None else out.add_(self._bias)

    def partial(self, x: Hidden, step: StepInputs | None = None) -> Tensor:
        """As forward, or [S, T, N] float32 for the next kernel to add up."""
        return self.forward(x, step) if self._partial is None else self._partial(x)

    def describe(self) -> tuple[str, str]:
        """(scheme, body), for the table that is printed at start."""
        return self._scheme, " + ".join(dict.fromkeys(body.name for body in self._bodies))

    @property
    def weight_bytes(self) -> int:
        """Bytes that one pass over the weights reads."""
        return sum(body.weight_bytes for body in self._bodies)


def make_linear(
    parts: list[QuantizedWeight | Tensor],
    biases: list[Tensor | None],
    *,
    dtype: torch.dtype,
    device: torch.device,
    out_dtype: torch.dtype | None = None,
    capability: int = 0,
    rounds_inputs: bool = False,
) -> Linear:
    """One layer out of parts that share their input (q, k, v; gate, up), each [N_i, K], with a bias [N_i] or None.

    out_dtype: the output's type where it isn't `dtype`: float32 for logits, which bf16 would round to 8 bits.
    capability: a GPU's, 90 for an H100: which kernels it can run. 0 on a CPU.
    rounds_inputs: also where a GPU has no product of rounded inputs, which leaves them as they are otherwise.
    Raises ValueError when the parts' K differ. With dtype float32 everything is computed in float32, activations
    rounded as the scheme says: the truth that the other bodies are compared with.
    """
    columns = {part.shape[1] for part in parts}
    if len(columns) != 1 or len(parts) != len(biases):
        raise ValueError(f"parts of one layer must share their input and have a bias each: K {sorted(columns)}")
    fused = [_join(run) for run in _runs(parts)]
    out = out_dtype or dtype
    bias = _join_biases(parts, biases, out, device)
    inside = bias if len(fused) == 1 else None
    bodies = [_choose(part, inside, dtype, device, out, capability, rounds_inputs) for part in fused]
    schemes = dict.fromkeys(str(p.scheme) if isinstance(p, QuantizedWeight) else str(dtype)[6:] for p in parts)
    return Linear(" + ".join(schemes), bodies, None if bodies[0].has_bias else bias)


def _join_biases(
    parts: list[QuantizedWeight | Tensor], biases: list[Tensor | None], dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    if all(bias is None for bias in biases):
        return None
    pieces = [
        torch.zeros(part.shape[0]) if bias is None else bias.cpu().float()
        for part, bias in zip(parts, biases, strict=True)
    ]
    return torch.cat(pieces).to(device=device, dtype=dtype)


def _runs(parts: list[QuantizedWeight | Tensor]) -> list[list[QuantizedWeight | Tensor]]:
    """Neighbours that can be one weight, together: q and k of int4 beside a v of int8 are two runs."""
    runs: list[list[QuantizedWeight | Tensor]] = []
    if len(parts) > 1:
        parts = [per_channel(part) for part in parts]
        if any(_ends_within_a_block(part) for part in parts[:-1]):
            parts = [_rows_of_blocks(part) for part in parts]
    for part in parts:
        if runs and _can_fuse(runs[-1], part):
            runs[-1].append(part)
        else:
            runs.append([part])
    return runs


def _join(parts: list[QuantizedWeight | Tensor]) -> QuantizedWeight | Tensor:
    """Parts that `_can_fuse` allows, as one weight along N."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    weights = [part for part in parts if isinstance(part, QuantizedWeight)]
    return replace(
        first,
        codes=torch.cat([w.codes for w in weights]),
        scale=torch.cat([w.scale for w in weights]),
        zero_point=None if first.zero_point is None else torch.cat([_present(w.zero_point) for w in weights]),
    )


def join_parts(parts: list[QuantizedWeight | Tensor]) -> QuantizedWeight | Tensor | None:
    """Parts that share their input as one weight along N; None where they can't be one."""
    runs = _runs(parts)
    return _join(runs[0]) if len(runs) == 1 else None


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def per_channel(w: QuantizedWeight | Tensor) -> QuantizedWeight | Tensor:
    """A weight with one scale as one with a scale per row, so that parts with different scales can be joined."""
    if isinstance(w, Tensor) or w.scheme.weight.granularity != TENSOR:
        return w
    n = w.shape[0]
    old = w.scheme.weight
    return replace(
        w,
        scheme=QuantScheme(WeightScheme(old.dtype, CHANNEL, old.symmetric), w.scheme.activation),
        scale=w.scale.reshape(1, 1).expand(n, 1),
        zero_point=None if w.zero_point is None else w.zero_point.reshape(1, 1).expand(n, 1),
    )


def _ends_within_a_block(w: QuantizedWeight | Tensor) -> bool:
    return isinstance(w, QuantizedWeight) and w.shape[0] % w.scheme.weight.granularity.tile(*w.shape)[0] != 0


def _rows_of_blocks(w: QuantizedWeight | Tensor) -> QuantizedWeight | Tensor:
    """A weight with a scale per block as one with a scale per row of a block, behind which any row may begin."""
    block = w.scheme.weight.granularity.block if isinstance(w, QuantizedWeight) else None
    if isinstance(w, Tensor) or block is None:
        return w
    n = w.shape[0]
    old = w.scheme.weight
    rows, columns = block
    return replace(
        w,
        scheme=QuantScheme(
            WeightScheme(old.dtype, Granularity("block", block=(1, columns)), old.symmetric), w.scheme.activation
        ),
        scale=w.scale.repeat_interleave(rows, dim=0)[:n],
        zero_point=None if w.zero_point is None else w.zero_point.repeat_interleave(rows, dim=0)[:n],
    )


def _can_fuse(run: list[QuantizedWeight | Tensor], part: QuantizedWeight | Tensor) -> bool:
    """Whether a part can be joined behind those of a run. Static scales of the input must be the same."""
    last = run[-1]
    if isinstance(last, Tensor) or isinstance(part, Tensor):
        return isinstance(last, Tensor) and isinstance(part, Tensor)
    return (
        part.scheme == last.scheme
        and part.scale.dtype == last.scale.dtype
        and _same(part.g_idx, last.g_idx)
        and _same(part.input_scale, last.input_scale)
        and (part.zero_point is None) == (last.zero_point is None)
    )


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)


def _choose(
    part: QuantizedWeight | Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
    out: torch.dtype,
    capability: int,
    rounds_inputs: bool,
) -> Body:
    """The body for one weight: what runs it natively here, else the weight dequantized at load.

    float32 is never native: it is the truth that the native bodies are compared with.
    """
    native = device.type == "cpu" and dtype != torch.float32 and cpu_features.has_dot_products()
    if isinstance(part, Tensor):
        return _dense(part, bias, None, dtype, device, native, out)
    rounds = input_rounding(part.scheme.activation, part.input_scale, device)
    if capability and dtype != torch.float32:
        lacks_product = rounds is not None and not multiplies(part.scheme, part.shape[1], capability)
        found = None if lacks_product and rounds_inputs else gpu_body(part.to(device), bias, out, capability)
        if found is not None:
            return found
        rounds = rounds if rounds_inputs else None
    if native and dtype == torch.bfloat16 and part.scheme.activation is None:
        body = _weight_only(part, out)
        if body is not None:
            return body
    if native and part.scheme == PRESETS["W8A8"] and part.shape[1] <= MAX_INT8_COLUMNS:
        return _int8(part, out)
    return _dense(part.dequantize(dtype), bias, rounds, dtype, device, native, out, "dequantized at load, ")


def _int8(part: QuantizedWeight, out: torch.dtype) -> Body:
    from octavo.kernels.int8 import cpu as int8_cpu

    packed = int8_cpu.pack(part.codes, part.scale)
    return Body("int8 x int8 VNNI", lambda x: int8_cpu.linear(x, packed, out), packed.num_bytes)


def _weight_only(part: QuantizedWeight, out: torch.dtype) -> Body | None:
    """Integers decoded to bf16 in registers, 2 and 3 bits in int4's layout; None where groups don't fit it."""
    from octavo.kernels.dense import cpu as dense_cpu

    if part.scheme.weight.is_float or part.scheme.weight.granularity.kind not in ("channel", "group"):
        return None
    k = part.shape[1]
    groups = part.scale.shape[1]
    bits = 8 if part.scheme.weight.dtype == "int8" else 4
    if k % groups or not dense_cpu.fits(bits, k, k // groups):
        return None
    order = None
    if groups > 1 and part.g_idx is not None:
        order = part.g_idx.long().argsort(stable=True)
        if not torch.equal(part.g_idx[order].long(), torch.arange(k) // (k // groups)):
            return None  # groups of different sizes
    elif part.scheme.weight.granularity.group_size not in (None, k // groups):
        return None  # a short last group
    codes = part.codes if order is None else part.codes[:, order]
    packed = dense_cpu.pack_int(codes, part.scale, part.zero_point, bits)
    name = f"{part.scheme.weight.dtype} weights {'' if part.scheme.weight.bits in (4, 8) else 'in 4 bits '}x bf16"
    if order is None or torch.equal(order, torch.arange(k)):
        return Body(name, lambda x: dense_cpu.linear(x, packed, out), packed.num_bytes)
    return Body(
        f"{name}, columns in order of their groups",
        lambda x: dense_cpu.linear(x[:, order], packed, out),
        packed.num_bytes,
    )


def _dense(
    weight: Tensor,
    bias: Tensor | None,
    rounds: Round | None,
    dtype: torch.dtype,
    device: torch.device,
    native: bool,
    out: torch.dtype,
    how: str = "",
) -> Body:
    """A weight that isn't quantized, or no more. torch's product adds the bias, too, where it is of the same type."""
    if native and dtype == torch.bfloat16 and weight.shape[1] % 2 == 0:
        from octavo.kernels.dense import cpu as dense_cpu

        packed = dense_cpu.pack_bf16(weight)
        return Body(
            f"{how}bf16 x bf16",
            lambda x: dense_cpu.linear(x if rounds is None else rounds(x).to(dtype), packed, out),
            packed.num_bytes,
        )
    weight = weight.to(device=device, dtype=dtype).contiguous()
    inside = bias if out == dtype else None
    # CUDA's product can leave its float32 sums as they are
    sums = device.type == "cuda" and out == torch.float32 != dtype

    def run(x: Tensor) -> Tensor:
        x = x if rounds is None else rounds(x).to(dtype)
        return torch.mm(x, weight.T, out_dtype=out) if sums else F.linear(x, weight, inside).to(out)

    name = f"{how}torch {str(dtype)[6:]}"
    num_bytes = weight.numel() * weight.element_size()
    return Body(name, run, num_bytes, has_bias=inside is not None)


def input_rounding(
    activation: ActivationScheme | None, input_scale: Tensor | None, device: torch.device
) -> Round | None:
    """How the scheme rounds an input, in float32; None when it doesn't."""
    if activation is None:
        return None
    if not activation.dynamic:
        if input_scale is None:
            raise ValueError("the scheme has a static activation scale, but the checkpoint stores no input_scale")
        scale = input_scale.to(device=device, dtype=torch.float32)
        if activation.dtype == "int8":
            return lambda x: int8_reference.fake_quantize_static(x, scale)
        return lambda x: fp8_reference.fake_quantize_static(x, scale)
    return _dynamic_rounding(activation.dtype, activation.granularity)


def _dynamic_rounding(dtype: str, granularity: Granularity) -> Round:
    match dtype, granularity.kind:
        case "int8", "channel":
            return int8_reference.fake_quantize_per_token
        case "fp8_e4m3", "channel":
            return fp8_reference.fake_quantize_per_token
        case "fp8_e4m3", "group":
            size = granularity.group_size
            assert size is not None
            return lambda x: fp8_reference.fake_quantize_per_group(x, size)
    raise ValueError(f"{dtype} activations per {granularity}: no kernel has that; per token is what is served")
