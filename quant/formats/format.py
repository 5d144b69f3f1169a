"""The interface of every on-disk format: one layer's tensors to and from the canonical weight.

A `QuantizationConfig` gives the format, and so the scheme, of each linear layer in a checkpoint. Loader, writer, memory
planner and tests take names, types and shapes from `tensors` alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

from torch import Tensor

from octavo.quant.qparams import QuantizedWeight
from octavo.quant.safetensors_file import TensorSpec
from octavo.quant.scheme import QuantScheme


class FormatError(ValueError):
    """Tensors or a config that the format doesn't allow or octavo doesn't support; the message says which."""


class QuantFormat(Protocol):
    """Converts a linear layer's tensors, keyed by suffix ('weight_scale'), to and from the canonical weight [N, K]."""

    @property
    def scheme(self) -> QuantScheme: ...

    def tensors(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Names, types and shapes of the tensors that `write` returns for a weight of this shape."""
        ...

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """[N, K] of the weight that `read` makes of these, told by their shapes. Raises FormatError."""
        ...

    def write(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors that `tensors` announces. Raises FormatError for a weight that the format can't hold."""
        ...

    def read(self, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """The canonical weight. Raises FormatError if a tensor is missing, unexpected, or of a wrong shape or type."""
        ...


class QuantizationConfig(Protocol):
    """A checkpoint's quantization config, parsed.

    name      the format's common name, such as 'compressed-tensors'
    kv_cache  the KV cache's type, 'fp8_e4m3' or 'int8', if the checkpoint has scales for it
    """

    @property
    def name(self) -> str: ...

    @property
    def kv_cache(self) -> str | None: ...

    def format_of(self, module: str, suffixes: Collection[str] | None = None) -> QuantFormat | None:
        """The format of a linear layer, given its full name; None if it is not quantized.

        suffixes: the tensors that the checkpoint has for it ('qweight', 'scales'); None if there is no file to ask.
        Raises FormatError if octavo doesn't support its scheme.
        """
        ...
