"""What the GEMM bodies can multiply, in numbers: importable where neither Triton nor numba is."""

from __future__ import annotations

FP8_BLOCK = 128  # rows and columns of an FP8 weight that share a scale, and columns of a token that do
MAX_INT8_COLUMNS_CPU = 65_792  # 2**31 / (255 * 128): the CPU's int8 kernel stores codes as unsigned bytes
MAX_INT8_COLUMNS_GPU = (2**31 - 1) // 128**2  # an int32 sum of products of two signed bytes holds no more
MIN_GROUP = 32  # columns: 8-bit groups on a GPU are multiples of this
INT4_TILE = 128  # columns: an expert's groups of int4 are 32, 64 or a multiple of this
STEP_OF_INTEGERS = {4: 8, 5: 32, 6: 16, 8: 2}  # by bits: columns that a CPU decodes at a time, of one group
LANES = 16  # rows of a weight that lie side by side in a CPU's layouts
