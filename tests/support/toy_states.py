"""The toy model with a state: what it says is a hash of a number that each token changes, and of nothing else."""

from __future__ import annotations

import torch
from torch import Tensor
from toy_model import VOCAB, ToyModel, logits_after

from octavo.kernels.attention.cache import LayerCache
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.linear_attention.states import Cache, StateCache, StateShape
from octavo.runtime.engine import Engine
from octavo.runtime.messages import AddRequest
from octavo.runtime.model.model import KVShape
from octavo.runtime.scheduling.plan import SchedulerConfig
from octavo.runtime.worker.worker import Worker

_PRIME = 65_521  # times 31 it is exact in float32


def changed(state: int, token: int) -> int:
    return (state * 31 + token + 1) % _PRIME


class StatefulToy(ToyModel):
    num_layers = 2

    def __init__(self) -> None:
        super().__init__()
        self.kv_shapes = [KVShape(1, 1), StateShape(((1,),))]
        self.kv_windows = [None, None]

    def forward(self, inputs: StepInputs, caches: list[Cache], *_: object) -> Tensor:
        assert inputs.states is not None
        (store,) = next(cache for cache in caches if isinstance(cache, StateCache)).parts
        copies = dict(inputs.states.saves.tolist())
        starts = inputs.query_starts.tolist()
        tokens = inputs.token_ids.tolist()
        before = store.clone()
        behind = []
        for s, (row, source) in enumerate(
            zip(inputs.states.rows.tolist(), inputs.states.sources.tolist(), strict=True)
        ):
            state = 0 if source < 0 else int(before[source, 0])
            for place in range(starts[s], starts[s + 1]):
                state = changed(state, tokens[place])
                behind.append(state)
                if place in copies:
                    store[copies[place]] = state
            store[row] = state
        rows = [logits_after([behind[place]]) for place in inputs.logits_index.tolist()]
        return torch.stack(rows) if rows else torch.empty(0, VOCAB)


def make_stateful_engine(*, overlaps: bool = True, **limits: int) -> Engine:
    """All rows of states begin as nonsense."""
    config = SchedulerConfig(
        **({"num_blocks": 64, "block_size": 4, "max_model_len": 128, "max_num_seqs": 8} | limits), has_states=True
    )
    shape = (config.num_blocks, 1, config.block_size, 1)
    one = torch.ones(1)
    states = StateCache((torch.full((config.max_num_seqs + config.num_snapshots, 1), 12_345.0),))
    caches = [LayerCache(torch.zeros(shape), torch.zeros(shape), one, one), states]
    return Engine(Worker(StatefulToy(), caches, config), config, overlaps=overlaps)


def greedy_of_state(request: AddRequest) -> list[int]:
    """What it says, without an engine."""
    state = 0
    for token in request.token_ids:
        state = changed(state, token)
    said: list[int] = []
    while len(said) < request.params.max_tokens:
        said.append(int(logits_after([state]).argmax()))
        if said[-1] in request.params.stop_token_ids:
            break
        state = changed(state, said[-1])
    return said
