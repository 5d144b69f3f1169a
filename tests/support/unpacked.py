"""GPTQ and AWQ weights dequantized in numpy, as the layouts' descriptions have it, sharing no code with octavo."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from torch import Tensor

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # of a word's fields, lowest bits first


def fields(words: npt.NDArray[np.int32], bits: int) -> Integers:
    """[rows, W] int32 to its bit stream's fields [rows, 32 W / bits], unsigned."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    return stream.reshape(len(words), -1, bits).astype(np.int64) @ (1 << np.arange(bits))


def gptq(tensors: Mapping[str, Tensor], bits: int, version: int, group_size: int) -> Floats:
    """A layer's weight [N, K]."""
    codes = fields(tensors["qweight"].numpy().T, bits)
    zeros = fields(tensors["qzeros"].numpy(), bits)  # [G, N]
    if version == 1:
        zeros = (zeros + 1) % 2**bits
    columns = np.arange(codes.shape[1])
    groups = tensors["g_idx"].numpy() if "g_idx" in tensors else columns // (group_size if group_size > 0 else 1 << 30)
    scales = tensors["scales"].double().numpy()
    return (codes - zeros[groups].T) * scales[groups].T


def awq(tensors: Mapping[str, Tensor], group_size: int) -> Floats:
    """A layer's weight [N, K] in the gemm layout."""

    def unpack(words: npt.NDArray[np.int32]) -> Integers:
        out = np.empty((words.shape[0], words.shape[1] * 8), np.int64)
        for field, column in enumerate(AWQ_COLUMNS):
            out[:, column::8] = (words.astype(np.int64) >> (4 * field)) & 15
        return out

    codes, zeros = unpack(tensors["qweight"].numpy()), unpack(tensors["qzeros"].numpy())
    groups = np.arange(codes.shape[0]) // (group_size if group_size > 0 else 1 << 30)
    return ((codes - zeros[groups]) * tensors["scales"].double().numpy()[groups]).T
