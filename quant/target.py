"""Where a linear layer is to run, as a value: all that the choice of its kernel may depend on beside the weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from octavo.kernels.native import cpu_features


@dataclass(frozen=True)
class Target:
    """A device, and the type to compute in.

    device            where tensors lie
    dtype             the activations': float32, bfloat16 or float16
    capability        a GPU's compute capability, 90 for an H100; 0: no GPU
    has_dot_products  the CPU has AVX-512 with BF16 and VNNI
    rounds_inputs     inputs are rounded as schemes say, also where a GPU has no product of rounded inputs: what a
                      measurement of quality asks for, from dequantized weights
    batch_invariant   only batch-invariant kernels are chosen (see `Kernel.batch_invariant`)
    many_tokens       each product has hundreds of tokens, as those of an image: a CPU's kernels that decode weights are
                      slower there than torch's product of dequantized ones

    Kernels of a GPU run where capability is set, which in Triton's interpreter is on a CPU.
    """

    device: torch.device
    dtype: torch.dtype
    capability: int = 0
    has_dot_products: bool = False
    rounds_inputs: bool = False
    batch_invariant: bool = False
    many_tokens: bool = False

    @staticmethod
    def of(
        device: torch.device,
        dtype: torch.dtype,
        capability: int = 0,
        *,
        rounds_inputs: bool = False,
        batch_invariant: bool = False,
    ) -> Target:
        """This machine's device."""
        dots = device.type == "cpu" and cpu_features.has_dot_products()
        return Target(device, dtype, capability, dots, rounds_inputs, batch_invariant)

    @property
    def keeps_inputs(self) -> bool:
        """Inputs stay as they are where no kernel multiplies rounded ones: a GPU's alternatives are far slower, and so
        are a CPU's with many tokens.
        """
        return (self.capability > 0 or self.many_tokens) and self.dtype != torch.float32 and not self.rounds_inputs

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        if self.capability:
            major, minor = divmod(self.capability, 10)
            return f"a GPU of compute capability {major}.{minor}"
        return "a CPU with AVX-512 BF16 and VNNI" if self.has_dot_products else "a CPU without AVX-512 BF16 and VNNI"
