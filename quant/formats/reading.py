"""Helpers for reading a layer's tensors in any format: take one of those that are there, and check it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from octavo.quant.formats.format import FormatError

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}  # as configs spell them


def take(left: dict[str, Tensor], name: str) -> Tensor:
    """Remove a tensor from `left` and return it; what is left at the end was not expected."""
    tensor = left.pop(name, None)
    if tensor is None:
        raise FormatError(f"{name} is missing")
    return tensor


def take_words(left: dict[str, Tensor], name: str) -> Tensor:
    """Take a matrix of int32 words."""
    words = take(left, name)
    if words.dtype != torch.int32 or words.ndim != 2 or not words.numel():
        raise FormatError(f"{name} is {words.dtype} {list(words.shape)}; a matrix of int32 words is expected")
    return words


def take_scales(left: dict[str, Tensor], name: str) -> Tensor:
    """Take a matrix of finite numbers. They may be negative: AutoRound writes such scales."""
    scale = take(left, name)
    if scale.dtype not in FLOATS or scale.ndim != 2:
        raise FormatError(f"{name} is {scale.dtype} {list(scale.shape)}; a matrix of floats is expected")
    if not bool(scale.isfinite().all()):
        raise FormatError(f"{name} holds NaN or infinity")
    return scale


def sides(tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """The shape of one of a layer's tensors, which must be a matrix."""
    shape = take(dict(tensors), name).shape
    if len(shape) != 2:
        raise FormatError(f"{name} is {list(shape)}; a matrix is expected")
    return shape[0], shape[1]


def reshape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`tensor` in `shape`, allowing only sides of 1 to come and go: [N] for [N, 1], [1] for []."""
    if [s for s in tensor.shape if s != 1] != [s for s in shape if s != 1]:
        raise FormatError(f"{name} is {list(tensor.shape)} where {list(shape)} is expected")
    return tensor.reshape(shape)


def check_input_scale(scale: Tensor) -> Tensor:
    """Return a static activation scale [], which must be a positive number."""
    if not 0 < float(scale) < math.inf:
        raise FormatError(f"input_scale is {float(scale)}; a positive number is needed")
    return scale


def check_nothing_left(left: dict[str, Tensor], where: str) -> None:
    """Raise FormatError for tensors that nobody has taken, since they mean something unknown."""
    if left:
        raise FormatError(f"{', '.join(sorted(left))} not expected {where}")


def check_shape(name: str, tensor: Tensor, wanted: tuple[int, ...], why: str) -> None:
    """Raise FormatError unless `tensor` has the shape that follows from `why`."""
    if tuple(tensor.shape) != wanted:
        raise FormatError(f"{name} is {list(tensor.shape)} where {list(wanted)} is expected ({why})")


def exactly(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale in the type that a format stores. Raises FormatError if that can't hold its numbers exactly."""
    stored = scale.to(dtype)
    if not torch.equal(stored.to(torch.float64), scale.to(torch.float64)):
        worst = scale.flatten()[(stored.to(torch.float64) != scale.to(torch.float64)).flatten()][0]
        raise FormatError(
            f"its scales are {str(scale.dtype)[6:]}, and {str(dtype)[6:]}, which the format stores, can't hold "
            f"{float(worst):.9g}; compressed-tensors stores them as they are"
        )
    return stored
