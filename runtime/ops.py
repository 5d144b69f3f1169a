"""The operators that the decoder calls besides its linear layers, as one value chosen at load.

Signatures are the contract between the decoder and the kernels room; `octavo.kernels.*.reference` is what they mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from octavo.kernels.attention.cache import LayerCache
from octavo.runtime.step import StepInputs
