"""What a model of transformers must prove before it is served over the paged cache. Nothing is taken on trust.

The cache serves a model right if four things hold, and each is looked at by itself:

1. Each layer calls attention once, with nothing that paged attention doesn't have (hf_attention.py, while probing).
2. Each layer's mask is causal, or causal with the layer's window, at every length that is served.
3. Each layer's own formula of attention is paged attention's, on numbers for which a soft cap or a sink changes the
   result.
4. Outside attention no token depends on another: not through a convolution, a state or a dropped expert, and not
   through a rope that depends on the longest position in the batch. And each token has the position that it is given.

Lastly two prompts, in chunks and single tokens, must give what transformers gives for each alone with its own cache.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.step import StepInputs
from octavo.runtime.model.hf.attention import SERVE, Call, HFModelError, MaskRule, Probe, Step, attend, call
from octavo.runtime.model.model import Model
from octavo.runtime.model.operators import Ops
from octavo.runtime.worker import kv_cache

BLOCK_SIZE = 16
PROMPTS = (12, 8)  # lengths; a block each is enough
# Logits through some tens of layers: 2^-24 an operator in float32, 2^-8 in bfloat16; a wrong feature is of order 1.
LOGITS_LIMIT = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
# One attention in float32: scores of some 30 have errors of 30 * 2^-24 * sqrt(head_dim), and so have their weights.
FORMULA_LIMIT = 1e-4


@dataclass(frozen=True)
class Proven:
    """What the checks found out.

    shapes       of each layer
    vocab_size   width of the logits
    takes_index  the model's logits_to_keep may be a tensor of token indices
    """

    shapes: list[AttentionShape]
    vocab_size: int
    takes_index: bool


@torch.inference_mode()
def probe_model(model: Any, dtype: torch.dtype, ops: Ops, max_position: int) -> Proven:
    """Checks 1 to 4 of a model that is on its device, computes in dtype and has the attention PROBE."""
    name = type(model).__name__
    probe = Probe()
    positions = torch.arange(BLOCK_SIZE, device=model.device)
    token_ids = (positions + 1) % _num_embeddings(model)
    logits = call(model, token_ids, positions, probe)
    layers = sorted(probe.calls)
    if missing := sorted(set(range(_num_layers(model, layers))) - set(layers)):
        numbers = ", ".join(map(str, missing))
        raise HFModelError(f"{name}: no attention is called in layer {numbers}, so something else mixes its tokens")
    if logits.shape[-1] > _num_embeddings(model):
        raise HFModelError(f"{name} answers {logits.shape[-1]} tokens, but knows {_num_embeddings(model)}")
    calls = [probe.calls[layer] for layer in layers]
    check_masks(calls, max_position, model.device)
    for layer, made in enumerate(calls):
        check_formula(layer, made, ops, model.device)
    shapes = [made.shape for made in calls]
    check_tokens_stand_alone(model, shapes, dtype, max_position)
    takes_index = "logits_to_keep" in inspect.signature(model.forward).parameters
    if takes_index:
        index = positions[::3]
        kept = call(model, token_ids, positions, Probe(), logits_to_keep=index)
        takes_index = len(kept) == len(index) and difference_of(kept, logits[index], dtype, 0.5) < LOGITS_LIMIT[dtype]
    return Proven(shapes, logits.shape[-1], takes_index)


def _num_embeddings(model: Any) -> int:
    count: int = model.get_input_embeddings().weight.shape[0]
    return count


def _num_layers(model: Any, layers: list[int]) -> int:
    named: int = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", 1)
    return max([named, *(layer + 1 for layer in layers)])


def check_masks(calls: list[Call], max_position: int, device: torch.device) -> None:
    """Check 2. Transformers makes masks from rules; a rule is asked here about positions that no prompt reaches."""
    known: set[tuple[int, int | None, int]] = set()
    for layer, made in enumerate(calls):
        shape = made.shape
        key = (id(made.mask), shape.window, shape.num_heads)
        row = None if key in known else _first_difference(made.mask, shape, max_position, device)
        known.add(key)
        if row is not None:
            what = "causal" if shape.window is None else f"causal with a window of {shape.window}"
            remedy = f"; --max-model-len {row} can be served" if row >= BLOCK_SIZE else ""
            raise HFModelError(f"layer {layer}'s mask isn't {what} for the token at position {row}{remedy}")


def _first_difference(mask: MaskRule, shape: AttentionShape, length: int, device: torch.device) -> int | None:
    """The first query position, by telling rows, for which a mask isn't the paged cache's; None: there is none."""
    good = -1
    for row in _telling_rows(shape.window, length):
        if not _sees_otherwise(mask, shape, row, length, device):
            good = row
            continue
        while row - good > 1:
            middle = (row + good) // 2
            if _sees_otherwise(mask, shape, middle, length, device):
                row = middle
            else:
                good = middle
        return row
    return None


def _sees_otherwise(mask: MaskRule, shape: AttentionShape, row: int, length: int, device: torch.device) -> bool:
    """Whether the query at a position sees other keys by the mask's rule than by the paged cache's."""
    heads = torch.tensor([0, shape.num_heads - 1], device=device).view(2, 1, 1)
    query = torch.full((1, 1, 1), row, device=device)
    key = torch.arange(min(row + BLOCK_SIZE, length), device=device).view(1, 1, -1)
    ours = (key <= query) if shape.window is None else (key <= query) & (key > query - shape.window)
    try:
        theirs = mask.sees(torch.zeros_like(query), heads, query, key)
    except (IndexError, RuntimeError):  # a rule that reads a tensor of the probe's length is no rule of positions
        return True
    return bool((theirs != ours).any())


def _telling_rows(window: int | None, length: int) -> list[int]:
    """The first rows, the last, and those around the window and around powers of two, where chunks begin."""
    edges = [*(2**i for i in range(4, length.bit_length())), window or 0, length - 1]
    rows = {*range(BLOCK_SIZE), *(edge + offset for edge in edges for offset in (-1, 0, 1))}
    return sorted(row for row in rows if 0 <= row < length)


def check_formula(layer: int, made: Call, ops: Ops, device: torch.device) -> None:
    """Check 3, in float32, with scores of some 30, from which a cap of 50 takes a ninth."""
    module = made.module
    shape = made.shape
    n = BLOCK_SIZE
    eager = inspect.unwrap(type(module).forward).__globals__.get("eager_attention_forward")
    if eager is None:
        raise HFModelError(f"{type(module).__name__} has no eager_attention_forward to compare the paged cache with")
    generator = torch.Generator().manual_seed(layer)
    query, key, value = (
        torch.randn((1, heads, n, shape.head_dim), generator=generator).to(device)
        for heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    )
    query *= 10 / (abs(shape.scale) * shape.head_dim**0.5)
    ids = torch.arange(n, device=device)
    sees = made.mask.sees(ids[0], ids[:1].view(1, 1, 1), ids.view(1, n, 1), ids.view(1, 1, n)).expand(1, n, n)
    mask = torch.zeros((1, 1, n, n), device=device).masked_fill(~sees, torch.finfo(torch.float32).min)
    theirs = eager(module, query, key, value, mask, **made.keywords)[0]
    one = torch.ones(shape.num_kv_heads, device=device)
    store = torch.zeros(1, shape.num_kv_heads, n, shape.head_dim)
    cache = LayerCache(store.to(device), store.to(device, copy=True), one, one)
    inputs = chunks([[0] * n], [0], [n], device)
    ours = attend(query, key, value, Step(ops, [inputs], [shape], [cache]), 0)
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    if not difference < FORMULA_LIMIT:
        raise HFModelError(
            f"layer {layer}'s formula of attention ({type(module).__name__}) isn't that of the paged cache: they "
            f"differ by {difference:.1g} of the largest value"
        )


def check_tokens_stand_alone(model: Any, shapes: list[AttentionShape], dtype: torch.dtype, max_position: int) -> None:
    """Check 4. With an attention that mixes nothing, a token's logits depend on itself and its position alone.

    So a few tokens of neighbouring positions give what they give among all others, out of order, up to the last one.
    """
    generator = torch.Generator().manual_seed(1)
    device = model.device
    last = max_position - 1
    positions = torch.tensor(sorted({0, last, *(min(int(1.6**i), last) for i in range(32))}))
    ids = torch.randint(_num_embeddings(model), positions.shape, generator=generator)
    order = torch.randperm(len(ids), generator=generator).to(device)
    probe = Probe()
    ids = ids.to(device)
    positions = positions.to(device)
    few = [call(model, ids[i : i + 4], positions[i : i + 4], Probe()) for i in range(0, len(ids), 4)]
    together = call(model, ids[order], positions[order], probe)
    if [probe.calls[layer].shape for layer in range(len(shapes))] != shapes:
        raise HFModelError(f"{type(model).__name__} gives attention a scale, window or cap that changes with the batch")
    difference = difference_of(together, torch.cat(few)[order], dtype, 0.75)
    if not difference < LOGITS_LIMIT[dtype]:
        raise HFModelError(
            f"{type(model).__name__} lets tokens meet outside of attention, or counts places in the batch instead of "
            f"positions (a convolution, a state, a rope that turns with the length): logits differ by {difference:.2g}"
        )


@torch.inference_mode()
def check_against_transformers(served: Model, model: Any) -> None:
    """The last check, of a model that has the attention SERVE: logits of two prompts, together and each alone."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(served.vocab_size, (n,), generator=generator).tolist() for n in PROMPTS]
    caches = kv_cache.allocate(served, len(prompts), BLOCK_SIZE, served.dtype)
    rows: list[list[Tensor]] = [[], []]
    done = [0, 0]
    for ends in ([7, 4], [11, 5], [11, 8], [12, 8]):  # prompts, a token beside a chunk, a chunk alone, a token alone
        logits = served.forward(chunks(prompts, done, ends, served.device), caches)
        size = ends[0] - done[0]
        rows[0].append(logits[:size])
        rows[1].append(logits[size:])
        done = ends
    model.set_attn_implementation("eager")
    theirs = torch.cat([_alone(model, prompt) for prompt in prompts])
    model.set_attn_implementation(SERVE)
    difference = difference_of(torch.cat([*rows[0], *rows[1]]), theirs, served.dtype, 0.5)
    if not difference < LOGITS_LIMIT[served.dtype]:
        raise HFModelError(
            f"{served.architecture} over the paged cache doesn't give what it gives by itself: logits of two prompts "
            f"differ by {difference:.2g}"
        )


def _alone(model: Any, prompt: list[int]) -> Tensor:
    """Logits of one prompt as transformers generates, with its own cache: a few tokens at once, then one by one."""
    from transformers import DynamicCache

    # the keyword was past_key_values until transformers 5.24
    keyword = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    keywords = {keyword: DynamicCache(config=model.config), "use_cache": True}
    ids = torch.tensor([prompt], device=model.device)
    bounds = [(0, 4), *((i, i + 1) for i in range(4, len(prompt)))]
    return torch.cat([model(ids[:, begin:end], **keywords).logits[0].float() for begin, end in bounds])


def difference_of(ours: Tensor, theirs: Tensor, dtype: torch.dtype, share: float) -> float:
    """How far rows of logits are from what they should be, relative to their size.

    In float32 it is the worst row's difference. In 16 bits a router sometimes takes another expert, which moves single
    rows and isn't wrong, so it is the difference that a `share` of the rows doesn't exceed.
    """
    theirs = theirs.float()
    rows = (ours.float() - theirs).norm(dim=-1) / theirs.norm(dim=-1)
    return float(rows.max() if dtype == torch.float32 else rows.quantile(share))


def chunks(prompts: list[list[int]], begins: list[int], ends: list[int], device: torch.device) -> StepInputs:
    """Tokens begin .. end of each prompt that has any, prompt s in block s alone; the logits of all of them."""
    parts = [(s, begin, end) for s, (begin, end) in enumerate(zip(begins, ends, strict=True)) if begin < end]
    tokens = [token for s, begin, end in parts for token in prompts[s][begin:end]]
    return StepInputs.prefill(
        [end for _, _, end in parts],
        BLOCK_SIZE,
        sizes=[end - begin for _, begin, end in parts],
        token_ids=tokens,
        tables=[[s] for s, _, _ in parts],
        logits_index=range(len(tokens)),
    ).to(device)
