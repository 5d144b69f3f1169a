"""The specification of attention over a paged cache, in plain torch, one sequence after another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.kernels.attention.cache import AttentionShape, LayerCache, first_key
from octavo.kernels.attention.cross import Sources
from octavo.kernels.attention.packed import PackedShape
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.attention.token_rows import decode_rows, encode_rows, hadamard, type_of
from octavo.kernels.norm.reference import rms_norm


def rope_and_cache(
    qkv: Tensor,
    inputs: StepInputs,
    cache: LayerCache,
    shape: AttentionShape,
    cos_sin: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """Split qkv [T, (Hq + kv_parts Hkv) D], norm and rotate q and k, write k and v into the cache; return q [T, Hq, D].

    Values are normed where the shape says so.
    """
    d = shape.head_dim
    q, *kv = torch.split(qkv, [shape.num_heads * d, *[shape.num_kv_heads * d] * shape.kv_parts], dim=-1)
    rows = None if cos_sin is None else cos_sin[inputs.positions]  # [T, rotary_dim]
    q = _positioned(q, q_norm, rows, cache, shape, eps)
    if kv:
        k = _positioned(kv[0], k_norm, rows, cache, shape, eps)
        write_cache(k, values_of(kv[-1], shape, eps), inputs.slot_mapping, cache)
    return q.to(qkv.dtype)


def _positioned(
    x: Tensor, weight: Tensor | None, rows: Tensor | None, cache: LayerCache, shape: AttentionShape, eps: float
) -> Tensor:
    """Queries or keys [T, H * D] -> [T, H, D], normed, rotated by rows [T, rotary_dim], and as the cache has keys."""
    heads = norm_heads(x, weight, shape.head_dim, eps)
    heads = heads if rows is None else rotate(heads, rows, interleaved=shape.interleaved)
    own = type_of(cache.key, shape.head_dim)
    return hadamard(heads) if own is not None and own.rotates_keys else heads


def values_of(x: Tensor, shape: AttentionShape, eps: float) -> Tensor:
    """[T, Hkv * D] -> [T, Hkv, D], normed where the layer norms its values."""
    heads = x.reshape(x.shape[0], -1, shape.head_dim)
    return rms_norm(heads, torch.ones(shape.head_dim, device=x.device), eps) if shape.norms_values else heads


def norm_heads(x: Tensor, weight: Tensor | None, head_dim: int, eps: float) -> Tensor:
    """[T, H * D] -> [T, H, D], normalized over each head (weight [D]) or over all of them (weight [H * D])."""
    if weight is not None and weight.numel() != head_dim:
        x = rms_norm(x, weight, eps)
    heads = x.reshape(x.shape[0], -1, head_dim)
    return rms_norm(heads, weight, eps) if weight is not None and weight.numel() == head_dim else heads


def rotate(x: Tensor, cos_sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotary embedding (arXiv 2104.09864): x [T, H, D], cos_sin [T, rotary_dim]; interleaved as of `AttentionShape`."""
    rotary = cos_sin.shape[-1]
    cos, sin = (c.unsqueeze(1) for c in cos_sin.chunk(2, dim=-1))  # [T, 1, rotary / 2]
    turning = x[..., :rotary].float()
    a, b = (turning[..., 0::2], turning[..., 1::2]) if interleaved else turning.chunk(2, dim=-1)
    pairs = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.stack(pairs, dim=-1).flatten(-2) if interleaved else torch.cat(pairs, dim=-1)
    return torch.cat((turned.to(x.dtype), x[..., rotary:]), dim=-1)


def write_cache(k: Tensor, v: Tensor, slot_mapping: Tensor, cache: LayerCache) -> None:
    """Store k and v [T, Hkv, D] at their slots, divided by the scales, rounded to the nearest, saturated.

    Rows with scales of their own saturate nothing.
    """
    kept = slot_mapping >= 0
    k = k[kept]
    v = v[kept]
    slot_mapping = slot_mapping[kept]
    block = slot_mapping // cache.block_size
    offset = slot_mapping % cache.block_size
    for x, store, scale in ((k, cache.key, cache.key_scale), (v, cache.value, cache.value_scale)):
        rows = type_of(store, x.shape[-1])
        store[block, :, offset] = (
            encode(x, scale.reshape(-1, 1), store.dtype) if rows is None else encode_rows(x, rows.bits)
        )


def encode(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x / scale in the cache's type, saturating; scale broadcasts over x. Float caches wider than fp8 have scale 1."""
    if dtype == torch.int8:
        return (x.float() / scale).round().clamp(-127, 127).to(dtype)
    if dtype == torch.float8_e4m3fn:
        return (x.float() / scale).clamp(-448, 448).to(dtype)
    return x.to(dtype)


def paged_attention(q: Tensor, inputs: StepInputs, cache: LayerCache, shape: AttentionShape) -> Tensor:
    """softmax(scale q k^T) v over each sequence's cached tokens, causal; q [T, Hq, D] -> [T, Hq * D], in float32.

    Query i of a sequence with n queries and L cached tokens stands at position L - n + i and sees the cached tokens
    at or before it; with a window w, only the last w of those, or those of its own chunk of w positions.
    """
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    starts = inputs.query_starts.tolist()
    lengths = inputs.seq_lens.tolist()
    for s, length in enumerate(lengths):
        begin = starts[s]
        end = starts[s + 1]
        table = inputs.block_tables[s, : -(-length // cache.block_size)].long()
        k = gather(cache.key, cache.key_scale, table, length, shape.head_dim)  # [Hkv, L, D]
        v = gather(cache.value, cache.value_scale, table, length, shape.head_dim)
        repeat = shape.num_heads // shape.num_kv_heads
        k = k.repeat_interleave(repeat, dim=0)
        v = v.repeat_interleave(repeat, dim=0)
        scores = q[begin:end].transpose(0, 1).float() @ k.transpose(1, 2) * shape.scale  # [Hq, n, L]
        seen = seen_keys(end - begin, length, shape, device=q.device)
        out[begin:end] = (weigh(scores, seen, shape) @ v).transpose(0, 1)
    return out.to(q.dtype).reshape(q.shape[0], -1)


def attention_ahead(
    hidden: Tensor,
    qkv: Tensor,
    inputs: StepInputs,
    cache: LayerCache,
    shape: AttentionShape,
    cos_sin: Tensor | None,
    q_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """hidden [T, Hq * D], attention's output, with that of tokens which see some behind them; those of a window see no
    less ahead. qkv and the others are RopeAndAttention's, which has written the cache.
    """
    out = hidden.clone()
    for s, begin, end, length, in_windows, past_windows in inputs.ahead:
        if in_windows and shape.window is None:
            continue
        positions = inputs.positions[begin:end]
        rows = None if cos_sin is None else cos_sin[positions]
        q = _positioned(qkv[begin:end, : shape.num_heads * shape.head_dim], q_norm, rows, cache, shape, eps)
        first = 0 if past_windows else first_key(int(positions[0]), shape.span) // cache.block_size
        table = inputs.block_tables[s, first : -(-length // cache.block_size)].long()
        first *= cache.block_size
        k, v = (
            gather(store, scale, table, length - first, shape.head_dim)
            for store, scale in ((cache.key, cache.key_scale), (cache.value, cache.value_scale))
        )
        groups = q.to(qkv.dtype).float().view(end - begin, shape.num_kv_heads, -1, shape.head_dim).permute(1, 2, 0, 3)
        scores = groups @ k.unsqueeze(1).transpose(2, 3) * shape.scale  # [Hkv, group, n, L]
        seen = torch.ones(end - begin, length - first, dtype=torch.bool, device=q.device)
        if shape.window is not None and not past_windows:
            keys = torch.arange(first, length, device=q.device)
            seen = keys > positions.unsqueeze(1) - shape.window
        weights = weigh(scores, seen, shape)
        out[begin:end] = (weights @ v.unsqueeze(1)).permute(2, 0, 1, 3).reshape(end - begin, -1).to(out.dtype)
    return out


def seen_keys(
    n: int, length: int, shape: AttentionShape, *, begin: int = 0, device: torch.device | None = None
) -> Tensor:
    """[n, length - begin] bool: which cached tokens, from the one at `begin` on, each of the last n tokens sees."""
    position = torch.arange(length - n, length, device=device).unsqueeze(1)
    key = torch.arange(begin, length, device=device)
    seen = key <= position
    if shape.window is None:
        return seen
    if shape.is_chunked:
        return seen & (key >= position // shape.window * shape.window)
    return seen & (key > position - shape.window)


def weigh(scores: Tensor, seen: Tensor, shape: AttentionShape) -> Tensor:
    """The weights of keys by their scores [..., Hq, n, L], which are scaled, and may be overwritten; seen [n, L].

    A softmax of capped scores, in which each head's sink has a share, too.
    """
    if shape.soft_cap is not None:
        scores = shape.soft_cap * torch.tanh(scores / shape.soft_cap)
    scores = scores.masked_fill_(~seen, float("-inf"))
    if shape.sinks is None:
        return scores.softmax(dim=-1)
    sink = shape.sinks.view(-1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat((scores, sink.to(scores.dtype)), dim=-1).softmax(dim=-1)[..., :-1]


def gather(
    store: Tensor, scale: Tensor, table: Tensor, length: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """One sequence's keys or values out of its blocks, as numbers: [Hkv, length, D]."""
    rows = store[table].transpose(0, 1).flatten(1, 2)[:, :length]  # of [Hkv, blocks, block_size, row]
    if type_of(store, head_dim) is not None:
        return decode_rows(rows, head_dim).to(dtype)
    if store.dtype in (torch.int8, torch.float8_e4m3fn):
        return (rows.float() * scale.reshape(-1, 1, 1)).to(dtype)
    return rows.to(dtype)


def packed_attention(qkv: Tensor, lengths: Sequence[int], shape: PackedShape, bias: Tensor | None = None) -> Tensor:
    """qkv [T, 3 * heads * D] of whole sequences -> [T, heads * D]; no mask but a window on both sides.

    bias: what is added to scores [heads, T', T'], T' the longest length; of shorter sequences its beginning.
    """
    outputs = []
    for part in torch.split(qkv, list(lengths)):
        size = len(part)
        q, k, v = part.float().view(size, 3, shape.num_heads, shape.head_dim).permute(1, 2, 0, 3)
        scores = q @ k.transpose(1, 2) * shape.scale
        if bias is not None:
            scores = scores + bias[:, :size, :size].float()
        if shape.window is not None:
            places = torch.arange(size, device=qkv.device)
            scores = scores.masked_fill((places[:, None] - places).abs() > shape.window, float("-inf"))
        outputs.append((scores.softmax(dim=-1) @ v).transpose(0, 1).reshape(size, -1).to(qkv.dtype))
    return torch.cat(outputs)


def cross_attention(q: Tensor, keys: Tensor, values: Tensor, sources: Sources, scale: float) -> Tensor:
    """q [T, heads * D] -> [T, heads * D], without a mask; keys, values [places, heads, positions, D]."""
    _, heads, _, dim = keys.shape
    outputs = []
    starts, places, lengths = sources
    parts = torch.split(q, torch.tensor(starts).diff().tolist())
    for place, length, part in zip(places, lengths, parts, strict=True):
        queries = part.float().view(len(part), heads, dim).transpose(0, 1)
        scores = queries @ keys[place, :, :length].float().transpose(1, 2) * scale
        attended = scores.softmax(dim=-1) @ values[place, :, :length].float()
        outputs.append(attended.transpose(0, 1).reshape(len(part), -1).to(q.dtype))
    return torch.cat(outputs)


def distance_attention(
    q: Tensor, inputs: StepInputs, cache: LayerCache, shape: AttentionShape, table: Tensor
) -> Tensor:
    """`paged_attention` of one KV head a head, with table[h, p - k] added to the scores of query p and key k."""
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    starts = inputs.query_starts.tolist()
    for s, length in enumerate(inputs.seq_lens.tolist()):
        begin = starts[s]
        end = starts[s + 1]
        blocks = inputs.block_tables[s, : -(-length // cache.block_size)].long()
        k = gather(cache.key, cache.key_scale, blocks, length, shape.head_dim)
        v = gather(cache.value, cache.value_scale, blocks, length, shape.head_dim)
        scores = q[begin:end].transpose(0, 1).float() @ k.transpose(1, 2) * shape.scale
        seen = seen_keys(end - begin, length, shape)
        behind = torch.arange(length - (end - begin), length)[:, None] - torch.arange(length)
        scores = scores + table[:, behind.clamp(min=0)].float()
        out[begin:end] = (weigh(scores, seen, shape) @ v).transpose(0, 1)
    return out.to(q.dtype).reshape(q.shape[0], -1)
