"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) over a cache of latents, in plain torch.

Keys and values of all heads are made of one vector a token, its latent, which is what the cache holds, beside a rotated
key that all heads share. Head h has queries (qn, qr), and over tokens j with latents c and rotated keys r

    score(j) = scale * (qn . (K_h c_j) + qr . r_j)        out = V_h (sum over j of softmax(score)(j) c_j)

qn . (K_h c) is (K_h^T qn) . c, so that no key and no value of a head is ever computed: each head attends, with the
query (K_h^T qn, qr), to the one key (c, r) of each token. That is attention with one KV head, whose values are its keys
without their rotated part; the paged kernels take it as it is, and their outputs beyond c are dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.reference import encode, rotate
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.norm.reference import rms_norm

WriteLatents = Callable[[Tensor, Tensor, StepInputs, LayerCache, "LatentShape", Tensor, Tensor, float], Tensor]
Attend = Callable[[Tensor, StepInputs, LayerCache, AttentionShape], Tensor]


@dataclass(frozen=True)
class LatentShape:
    """What is constant about one layer.

    rank         numbers of a latent
    plain_dim    of each query's part that isn't rotated; rotary_dim: of the rotated one, and of the shared key
    value_dim    of each head's output
    interleaved  rotations turn (x0, x1), (x2, x3), ...; else (x0, x_half), (x1, x_half+1), ...
    """

    num_heads: int
    rank: int
    plain_dim: int
    rotary_dim: int
    value_dim: int
    scale: float
    interleaved: bool

    @property
    def query_dim(self) -> int:
        return self.plain_dim + self.rotary_dim

    @cached_property
    def cached(self) -> AttentionShape:
        """Attention over the cache."""
        return AttentionShape(self.num_heads, 1, self.rank + self.rotary_dim, self.scale)


def write_latents(
    queries: Tensor,
    latents: Tensor,
    inputs: StepInputs,
    cache: LayerCache,
    shape: LatentShape,
    cos_sin: Tensor,
    norm: Tensor,
    eps: float,
) -> Tensor:
    """Norm latents, rotate keys and queries, write latents and keys into the cache; return what queries begin as.

    queries [T, Hq * query_dim], latents [T, rank + rotary_dim], cos_sin as of `rope_and_cache` or one row for all
    positions (`unturned`), norm [rank] float32 -> [T, Hq, rank + rotary_dim], of which the last rotary_dim numbers are
    there, and the others are to be written.
    """
    normed = rms_norm(latents[:, : shape.rank].contiguous(), norm, eps)
    rows = cos_sin[turning(inputs.positions, cos_sin)]
    key = rotate_part(latents[:, shape.rank :].unsqueeze(1), rows, shape)
    kept = inputs.slot_mapping >= 0
    slots = inputs.slot_mapping[kept]
    stored = torch.cat((normed.unsqueeze(1), key), dim=-1)[kept]
    scale = cache.key_scale.reshape(-1, 1)
    cache.key[slots // cache.block_size, :, slots % cache.block_size] = encode(stored, scale, cache.key.dtype)
    heads = queries.view(-1, shape.num_heads, shape.query_dim)
    out = queries.new_empty(len(heads), shape.num_heads, shape.rank + shape.rotary_dim)
    out[..., shape.rank :] = rotate_part(heads[..., shape.plain_dim :], rows, shape)
    return out


def unturned(rotary_dim: int) -> Tensor:
    """[1, rotary_dim]: the rotation of layers without positions, which turns nothing at any of them."""
    return torch.cat((torch.ones(rotary_dim // 2), torch.zeros(rotary_dim // 2))).unsqueeze(0)


def turning(positions: Tensor, cos_sin: Tensor) -> Tensor:
    """The rows of cos_sin that tokens turn by."""
    return positions if len(cos_sin) > 1 else torch.zeros_like(positions)


def rotate_part(x: Tensor, cos_sin: Tensor, shape: LatentShape) -> Tensor:
    """x [T, H, rotary_dim] turned; interleaved pairs stand behind as the others do, which no dot product sees."""
    return rotate(torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1) if shape.interleaved else x, cos_sin)


@dataclass(frozen=True, slots=True)
class LatentBody:
    """Attention of queries over latents, of two bodies: how latents are written, and attention over a paged cache."""

    write: WriteLatents
    attend: Attend

    def attention(
        self,
        queries: Tensor,
        latents: Tensor,
        step: StepInputs,
        cache: LayerCache,
        shape: LatentShape,
        cos_sin: Tensor,
        norm: Tensor,
        eps: float,
        to_keys: Tensor,
        to_values: Tensor,
    ) -> Tensor:
        """queries, latents, cos_sin and norm as of `write_latents` -> [T, Hq * value_dim].

        to_keys    [Hq, plain_dim, rank]: K of each head, transposed as queries are multiplied by it
        to_values  [Hq, rank, value_dim]: V of each head, transposed
        """
        absorbed = self.write(queries, latents, step, cache, shape, cos_sin, norm, eps)
        plain = queries.view(-1, shape.num_heads, shape.query_dim)[..., : shape.plain_dim]
        absorbed[..., : shape.rank] = torch.bmm(plain.transpose(0, 1), to_keys).transpose(0, 1)
        mixed = self.attend(absorbed, step, cache, shape.cached).view_as(absorbed)[..., : shape.rank]
        return torch.bmm(mixed.transpose(0, 1), to_values).transpose(0, 1).flatten(1)
