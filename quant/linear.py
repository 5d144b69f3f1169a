"""A linear layer as data: packed weights, the kernels that multiply them, and a bias.

Which kernel it is, and why, `octavo.quant.kernel_table` says, once at load. What changes with the number of tokens
changes inside the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.kernels.attention.step import StepInputs
from octavo.kernels.packed_weight import PackedWeight
from octavo.kernels.quantized_activation import ActivationQuant, Hidden
from octavo.quant.adapters import AdapterSlots
from octavo.quant.body import Body, PackOptions, Run
from octavo.quant.fusion import fuse
from octavo.quant.input_rounding import input_rounding
from octavo.quant.kernel_table import KernelChoice, choose_for
from octavo.quant.qparams import QuantizedWeight, Weight
from octavo.quant.target import Target


@dataclass(frozen=True, slots=True)
class PackedPart:
    """Rows of a layer that are one weight to a kernel, and the choice of that kernel."""

    weight: PackedWeight
    choice: KernelChoice
    body: Body

    def run(self, x: Hidden, out_dtype: torch.dtype) -> Tensor:
        return self.body.run(x, self.weight, out_dtype)


class Linear:
    """x [T, K] -> [T, N]: parts side by side along N (one, where all weights could be fused), and a bias.

    scheme       of its weights, for the table at start
    bias         [N] of the output's type, added here; None: there is none, or the kernel adds it
    out_dtype    the output's type
    input_quant  how the kernel before may round x, which then comes as `QuantizedActivation`; None: x is a plain tensor
    whole_bias   [N], whoever adds it; None: there is none
    adapters     what is added for tokens that use an adapter, of x as it comes; None: none is served
    """

    def __init__(self, scheme: str, parts: Sequence[PackedPart], bias: Tensor | None, out_dtype: torch.dtype) -> None:
        self.scheme = scheme
        self.parts = tuple(parts)
        self.bias = bias
        self.out_dtype = out_dtype
        self.input_quant: ActivationQuant | None = None
        self.adapters: AdapterSlots | None = None
        self.whole_bias = bias
        self._split_k: Run | None = None
        # bound here, so that a call of the usual layer, of one part, costs one plain function call more than its kernel
        self._run: Run = self._run_side_by_side
        self._weight: PackedWeight | None = None
        if len(self.parts) == 1:
            (part,) = self.parts
            self._run = part.body.run
            self._weight = part.weight
            if bias is None:
                self.input_quant = part.body.input_quant(part.weight)
                self._split_k = part.body.split_k

    def forward(self, x: Hidden, step: StepInputs | None) -> Tensor:
        """x [T, K], or as `input_quant` says, to [T, N].

        step: what the step is told beside x, for what a layer does per token: adapters, whose rows are x's. None: x's
        rows are others, such as those that an expert was chosen for.
        """
        out = self._run(x, self._weight, self.out_dtype)
        if self.bias is not None:
            out.add_(self.bias)
        return self.adapted(out, x, step)

    def adapted(self, out: Tensor, x: Hidden, step: StepInputs | None) -> Tensor:
        """out [T, N], of x [T, K], with what adapters add to it, in place."""
        if self.adapters is not None and step is not None and step.adapters is not None:
            assert isinstance(x, Tensor)  # no kernel before rounds it, on a CPU
            self.adapters.add(out, x, step.adapters)
        return out

    def partial(self, x: Hidden, step: StepInputs | None) -> Tensor:
        """As forward, or [S, T, N] float32 split along K, for the next kernel to add up."""
        if self._split_k is None:
            return self.forward(x, step)
        return self._split_k(x, self._weight, self.out_dtype)

    def without_weights(self) -> Linear:
        """What stays of it where its input multiplies other weights: its bias."""
        bare = Linear(self.scheme, (), None, self.out_dtype)
        bare.whole_bias = self.whole_bias
        return bare

    def describe(self) -> tuple[str, str]:
        """(scheme, kernel), for the table that is printed at start."""
        return self.scheme, " + ".join(dict.fromkeys(part.choice.kernel.name for part in self.parts))

    def tensors(self) -> Iterator[Tensor]:
        """Of its packed weights."""
        for part in self.parts:
            yield from part.weight.tensors()

    @property
    def weight_bytes(self) -> int:
        """Bytes of its packed weights."""
        return sum(part.weight.num_bytes for part in self.parts)

    def _run_side_by_side(self, x: Hidden, weight: PackedWeight | None, out_dtype: torch.dtype) -> Tensor:  # noqa: ARG002
        return torch.cat([part.run(x, out_dtype) for part in self.parts], dim=-1)


def make_linear(
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    target: Target,
    *,
    out_dtype: torch.dtype | None = None,
) -> Linear:
    """One layer out of weights that share their input (q, k, v; gate, up), each [N_i, K], with a bias [N_i] or None.

    out_dtype: the output's type where it isn't the target's: float32 for logits, which bf16 would round to 8 bits.
    Raises ValueError when the weights' K differ, SchemeError where nothing rounds inputs as a scheme says. A target of
    float32 computes everything in float32, activations rounded as the scheme says: the truth for the other kernels.
    """
    columns = {weight.shape[1] for weight in weights}
    if len(columns) != 1 or len(weights) != len(biases):
        raise ValueError(f"parts of one layer must share their input and have a bias each: K {sorted(columns)}")
    out = out_dtype or target.dtype
    bias = _join_biases(weights, biases, out, target.device)
    fused = fuse(list(weights))
    alone = len(fused) == 1
    options = PackOptions(target, out, bias if alone else None)
    parts = [_pack(weight, options) for weight in fused]
    schemes = dict.fromkeys(str(w.scheme) if isinstance(w, QuantizedWeight) else target.dtype_name for w in weights)
    is_added = alone and parts[0].body.adds_bias
    linear = Linear(" + ".join(schemes), parts, None if is_added else bias, out)
    linear.whole_bias = bias
    return linear


def _pack(weight: Weight, options: PackOptions) -> PackedPart:
    target = options.target
    if isinstance(weight, QuantizedWeight):
        # a static scale that is missing is told whoever multiplies
        input_rounding(weight.scheme.activation, weight.input_scale, target.device)
        if target.capability:
            weight = weight.to(target.device)
    choice = choose_for(weight, target)
    body = choice.kernel.body
    return PackedPart(body.pack(weight, options), choice, body)


def _join_biases(
    weights: Sequence[Weight], biases: Sequence[Tensor | None], dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    if all(bias is None for bias in biases):
        return None
    pieces = [
        torch.zeros(weight.shape[0]) if bias is None else bias.cpu().float()
        for weight, bias in zip(weights, biases, strict=True)
    ]
    return torch.cat(pieces).to(device=device, dtype=dtype)


Change = Callable[[str, Linear], Linear]
"""(name in the layer of a model, linear layer) -> what stands in its place."""
