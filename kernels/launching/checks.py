"""What launchers expect of tensors: sizes that go together, and numbers that lie row by row without gaps.

A kernel is given addresses and reads as far as its arguments say: a tensor that is laid out otherwise makes wrong
numbers, and no error. A launch of `meta` tensors is compiled and never run, so there it is let be.
"""

from __future__ import annotations

from torch import Tensor

Size = int | tuple[int, ...]


def expect(**tensors: tuple[Tensor | None, Size]) -> None:
    """Each tensor, by its name, has a shape, or so many numbers in any, and no gaps; None is left out.

    A quarter of a microsecond for each: launchers call this at every step.
    """
    for name, (tensor, size) in tensors.items():
        if tensor is None:
            continue
        if (tensor.numel() if type(size) is int else tensor.shape) != size or not tensor.is_contiguous():
            refuse(name, tensor, size)


def refuse(name: str, tensor: Tensor, size: Size) -> None:
    """Say what is wrong with a tensor that should have a size and no gaps."""
    if tensor.is_meta:
        return
    if (tensor.numel() if isinstance(size, int) else tensor.shape) != size:
        wanted = f"{size} numbers" if isinstance(size, int) else f"the shape {list(size)}"
        raise ValueError(f"{name} has the shape {list(tensor.shape)}; with the other arguments it needs {wanted}")
    raise ValueError(
        f"{name} {list(tensor.shape)} has strides {list(tensor.stride())}; a kernel takes what lies row by row without "
        "gaps, as torch.empty or contiguous() makes it"
    )
