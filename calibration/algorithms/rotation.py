"""Orthogonal matrices that rotate channels, made of Hadamard matrices: QuaRot's and SpinQuant's without learning.

Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs" (2024). A rotation is never a whole matrix here:
signs, one small matrix and Sylvester's fast transform make it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.kernels.hadamard.reference import hadamard, is_block, largest_block

LARGEST_ORDER = 1024  # of a matrix that is multiplied by as it is


@dataclass(frozen=True)
class Rotation:
    """x R for rows x of `size` channels: signs first, then, in each block, a small matrix times Sylvester's.

    signs   [size] of +-1, or None: all are 1
    middle  [m, m] orthogonal, over the m runs of `block` channels of a block; None: there is one run
    block   channels of Sylvester's transform, a power of two
    """

    size: int
    block: int
    middle: Tensor | None = None
    signs: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        """x [..., size] float64 -> x R."""
        if self.signs is not None:
            x = x * self.signs
        x = hadamard(x, self.block)
        if self.middle is None:
            return x
        runs = x.reshape(*x.shape[:-1], -1, len(self.middle), self.block)
        return torch.matmul(self.middle.t(), runs).flatten(-3)

    @property
    def span(self) -> int:
        """Over how many channels one is spread."""
        return self.block * (1 if self.middle is None else len(self.middle))


def make_rotation(size: int, *, block_size: int | None = None, seed: int | None = None) -> Rotation:
    """Sylvester's matrix, times Paley's for what of a size is no power of two; seed: with random signs before.

    A size for which Paley has none is divided into blocks of the largest power of two, as all are by `block_size`.
    Raises ValueError for a block size that is no power of two or doesn't divide the size.
    """
    signs = None
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(2, (size,), generator=generator, dtype=torch.float64) * 2 - 1
    block = largest_block(size)
    if block_size is not None:
        if not is_block(block_size, size):
            raise ValueError(
                f"transform_block_size {block_size} is no power of two that divides {size}; {block} is the largest"
            )
        return Rotation(size, block_size, None, signs)
    order = size // block
    while 1 < order <= min(size, LARGEST_ORDER):
        if (matrix := paley(order)) is not None:
            return Rotation(size, size // order, matrix * order**-0.5, signs)
        order *= 2
    return Rotation(size, block, None, signs)


def paley(order: int) -> Tensor | None:
    """A Hadamard matrix [order, order] of +-1, float64, by Paley's constructions over primes; None: they give none."""
    if _is_prime(order - 1) and order % 4 == 0:
        return torch.eye(order, dtype=torch.float64) + _bordered(order - 1)
    if order % 4 == 0 and _is_prime(order // 2 - 1) and order // 2 % 4 == 2:
        one = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        other = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        half = order // 2
        return torch.kron(_bordered(half - 1), one) + torch.kron(torch.eye(half, dtype=torch.float64), other)
    return None


def _bordered(prime: int) -> Tensor:
    """The conference matrix of order prime + 1: quadratic residues of differences, with a border of ones.

    Symmetric where prime is 1 modulo 4, skew where it is 3.
    """
    numbers = torch.arange(prime)
    character = -torch.ones(prime, dtype=torch.float64)
    character[(numbers * numbers) % prime] = 1
    character[0] = 0
    matrix = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    matrix[0, 1:] = 1
    matrix[1:, 0] = 1 if prime % 4 == 1 else -1
    matrix[1:, 1:] = character[(numbers[None, :] - numbers[:, None]) % prime]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
