"""Heads: one decoder layer that reads what the model that is served says of each token, and the token behind it.

At position i stand what the model says of token i, its hidden state h, and token i + 1, its embedding e; what comes out
is about token i + 2. Behind the last token that is known, a head goes on with what it says itself in place of h.

    EAGLE-3 (arXiv 2503.01840)      MTP (as MiMo and Qwen3 have it)
    h = fc(hidden states of layers)  h = the model's last hidden state, normed
    x = [norm(e), norm(h)]           x = norm(input_proj([norm(h), norm(e)])), or of [norm(e), norm(h)]
    y = h + attention(x)             y = input_proj(..) + attention(x)
    g = y + mlp(norm(y))             g = norm(y + mlp(norm(y)))
    logits = head(norm(g))           logits = the model's head(g)

and g stands in place of h behind it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from octavo.kernels.attention.cache import LayerCache
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.quantized_activation import Hidden
from octavo.quant.linear import Linear
from octavo.runtime.model.layers import AddNorm, DecoderLayer, Embedding
from octavo.runtime.model.model import Model, distinct_bytes


@dataclass(frozen=True, slots=True)
class Said:
    """Of some tokens [S, hidden_size] each. normed: what logits are of. hidden: what the next position reads."""

    normed: Tensor
    hidden: Tensor


class Head(Protocol):
    """token_ids: of its own vocabulary [draft vocabulary] int64, the model's; None: it has the model's.

    layers: of the model, what is said behind these is read.
    """

    @property
    def token_ids(self) -> Tensor | None: ...

    @property
    def layers(self) -> tuple[int, ...]: ...

    @property
    def layer(self) -> DecoderLayer: ...

    @property
    def weight_bytes(self) -> int:
        """What a draft reads."""
        ...

    def hidden_of(self, states: Tensor) -> Tensor:
        """h of tokens, out of what the layers say of them [T, layers x the model's hidden_size]."""
        ...

    def forward(self, hidden: Tensor, step: StepInputs, cache: LayerCache) -> Said:
        """What it says at logits_index, of h [T, hidden_size] and of the tokens behind, which are the step's."""
        ...

    def logits(self, normed: Tensor) -> Tensor:
        """[S, draft vocabulary] float32."""
        ...


@dataclass(frozen=True, slots=True)
class EagleHead:
    """EAGLE-3's.

    lm_head          None: the model's own
    state_norms      of what each layer says, or one of all of it side by side; none: there is no norm before fc
    residual_normed  norm(h) is what attention's output is added to
    hidden_normed    norm(g) is what the next position reads
    """

    layers: tuple[int, ...]
    layer: DecoderLayer
    embedding: Embedding
    hidden_norm: AddNorm
    fc: Linear
    model: Model
    lm_head: Linear | None = None
    token_ids: Tensor | None = None
    state_norms: tuple[AddNorm, ...] = ()
    residual_normed: bool = False
    hidden_normed: bool = False

    @property
    def weight_bytes(self) -> int:
        linears = [self.fc, *self.layer.linears().values(), *([] if self.lm_head is None else [self.lm_head])]
        return _bytes_of(linears) + (self.model.token_table.nbytes if self.lm_head is None else 0)

    @torch.inference_mode()
    def hidden_of(self, states: Tensor) -> Tensor:
        if self.state_norms:
            parts = states.chunk(len(self.state_norms), dim=-1)
            normed = [plain(norm.norm(part)) for norm, part in zip(self.state_norms, parts, strict=True)]
            states = torch.cat(normed, dim=-1)
        return self.fc.forward(states, None)

    @torch.inference_mode()
    def forward(self, hidden: Tensor, step: StepInputs, cache: LayerCache) -> Said:
        embedded = plain(self.layer.enter.norm(self.embedding.forward(step.token_ids)))
        normed = plain(self.hidden_norm.norm(hidden))
        x = torch.cat([embedded, normed], dim=-1)
        said = through(self.layer, x, normed if self.residual_normed else hidden, step, cache)
        return replace(said, hidden=said.normed) if self.hidden_normed else said

    @torch.inference_mode()
    def logits(self, normed: Tensor) -> Tensor:
        return self.model.logits(normed) if self.lm_head is None else self.lm_head.forward(normed, None)


@dataclass(frozen=True, slots=True)
class MtpHead:
    """MTP's. token_first: input_proj reads [norm(e), norm(h)]."""

    layers: tuple[int, ...]
    layer: DecoderLayer
    embedding: Embedding
    token_norm: AddNorm
    hidden_norm: AddNorm
    input_proj: Linear
    model: Model
    token_first: bool
    token_ids: Tensor | None = None

    @property
    def weight_bytes(self) -> int:
        linears = [self.input_proj, *self.layer.linears().values()]
        return _bytes_of(linears) + self.model.token_table.nbytes

    def hidden_of(self, states: Tensor) -> Tensor:
        return self.model.normed(states)

    @torch.inference_mode()
    def forward(self, hidden: Tensor, step: StepInputs, cache: LayerCache) -> Said:
        halves = [
            plain(self.hidden_norm.norm(hidden)),
            plain(self.token_norm.norm(self.embedding.forward(step.token_ids))),
        ]
        x = self.input_proj.forward(torch.cat(halves[::-1] if self.token_first else halves, dim=-1), None)
        said = through(self.layer, self.layer.enter.norm(x), x, step, cache)
        return replace(said, hidden=said.normed)

    def logits(self, normed: Tensor) -> Tensor:
        return self.model.logits(normed)


def _bytes_of(linears: Iterable[Linear]) -> int:
    return distinct_bytes(tensor for linear in linears for tensor in linear.tensors())


def through(layer: DecoderLayer, x: Hidden, residual: Tensor, step: StepInputs, cache: LayerCache) -> Said:
    """What a layer whose `leave` is the head's last norm says at the step's logits_index."""
    rows = step.logits_index if len(step.logits_index) < len(step.token_ids) else None
    normed, hidden = layer.forward(x, residual, step, cache, rows)
    return Said(plain(normed), hidden)


def plain(hidden: Hidden) -> Tensor:
    """What a norm gives that no linear layer has asked to quantize."""
    assert isinstance(hidden, Tensor)
    return hidden
