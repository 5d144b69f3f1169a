"""What every on-disk format is to the rest of the house: one layer's tensors to and from the canonical weight.

A format is made by a `QuantizationConfig`, which says for each linear layer of a checkpoint which format, and so which
scheme, it has. Loader, writer, memory planner and tests take names, types and shapes from `tensors` alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

from torch import Tensor

from octavo.quant.qparams import QuantizedWeight
from octavo.quant.safetensors_file import TensorSpec
from octavo.quant.scheme import QuantScheme


class FormatError(ValueError):
    """Tensors or a config that the format doesn't allow, or that octavo doesn't read; the message says which."""


class QuantFormat(Protocol):
    """One linear layer's tensors, by their names after the module's, to and from the canonical weight [N, K]."""

    @property
    def scheme(self) -> QuantScheme: ...

    def tensors(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """What `write` will return for a weight of this shape."""
        ...

    def write(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors that `tensors` announced. Raises FormatError for what the format can't carry."""
        ...

    def read(self, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """The canonical weight. Raises FormatError when a tensor is missing, left over, or of a wrong shape or type."""
        ...


class QuantizationConfig(Protocol):
    """A checkpoint's quantization config, parsed.

    name      as a person calls the format: 'compressed-tensors'
    kv_cache  the cache's type, 'fp8_e4m3' or 'int8', when the checkpoint has scales for it
    """

    @property
    def name(self) -> str: ...

    @property
    def kv_cache(self) -> str | None: ...

    def format_of(self, module: str, suffixes: Collection[str] | None = None) -> QuantFormat | None:
        """The format of a linear layer by its full name; None when it is not quantized.

        suffixes: which tensors the checkpoint has of it ('qweight', 'scales'); None where there is no file to ask.
        Raises FormatError when its scheme is one that octavo doesn't have.
        """
        ...
