"""Biases by distance, as T5 (arXiv 1910.10683, section 2.1) and MPNet have them: a number for each bucket of distances.

Near distances have a bucket of their own, far ones share theirs by logarithm, up to a last one for all beyond.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def both_ways(distances: Tensor, count: int, farthest: int) -> Tensor:
    """The bucket of each distance, key minus query: half of the buckets for keys ahead."""
    half = count // 2
    return torch.where(distances > 0, half, 0) + behind(distances.abs(), half, farthest)


def behind(sizes: Tensor, count: int, farthest: int) -> Tensor:
    """The bucket of each distance >= 0, of so many, the last of which begins at `farthest` at the latest."""
    exact = count // 2
    logarithm = torch.log(sizes.clamp(min=1).float() / exact) / math.log(farthest / exact)
    far = exact + (logarithm * (count - exact)).to(torch.long).clamp(max=count - 1 - exact)
    return torch.where(sizes < exact, sizes, far)
