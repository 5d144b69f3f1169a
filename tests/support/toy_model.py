"""A model whose every answer is exact: its logits are a hash of the tokens as read back out of the cache."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from octavo.kernels.attention.cache import LayerCache
from octavo.kernels.attention.step import StepInputs
from octavo.runtime.engine import Engine
from octavo.runtime.messages import AddRequest, SamplingParams, TokenOutput
from octavo.runtime.model.model import KVShape
from octavo.runtime.scheduling.plan import SchedulerConfig
from octavo.runtime.source_messages import Source
from octavo.runtime.speculation.speculation import Speculation
from octavo.runtime.worker.worker import Worker

VOCAB = 61
_PRIME = 2_147_483_647


def logits_after(token_ids: list[int]) -> Tensor:
    """The toy model's logits of the next token: [VOCAB] float32, from 0 to 8 in steps of 2^-20."""
    state = 0
    for position, token in enumerate(token_ids):
        state = (state + (position + 1) * (token * 7919 + 13)) % _PRIME
    return _mix(torch.tensor([state]))[0]


def _mix(states: Tensor) -> Tensor:
    """[L] int64 -> [L, VOCAB] float32, exact."""
    tokens = torch.arange(VOCAB)
    mixed = (states.unsqueeze(1) * 48271 + (tokens + 1) * 69621) % _PRIME
    mixed = (mixed * 16807 + tokens) % _PRIME
    return (mixed % 8_388_593).float() / 2**20


class ToyModel:
    """Writes each token into the cache at its slot, and makes logits of what the block tables lead to."""

    architecture = "toy"
    vocab_size = VOCAB
    kv_scales = None
    kv_dtype = None
    pooler = None
    num_token_types = 0
    tower = None
    source: Source | None = None
    num_layers = 1
    dtype = torch.float32
    device = torch.device("cpu")
    weight_bytes = 0
    ranks = ()
    best = None
    first_layer = 0

    def __init__(self, max_position: int = 4096) -> None:
        self.max_position = max_position
        self.kv_shapes = [KVShape(1, 1)]
        self.kv_windows = [None]
        self.notes: list[str] = []

    def forward(self, inputs: StepInputs, caches: list[LayerCache], *_: object) -> Tensor:
        store = caches[0].key  # [num_blocks, 1, block_size, 1]
        size = store.shape[2]
        slots = inputs.slot_mapping[inputs.slot_mapping >= 0]
        store[slots // size, 0, slots % size, 0] = inputs.token_ids[inputs.slot_mapping >= 0].float()
        states = []
        for row in inputs.logits_index.tolist():
            sequence = int(torch.searchsorted(inputs.query_starts, row, right=True)) - 1
            length = int(inputs.positions[row]) + 1
            table = inputs.block_tables[sequence, : -(-length // size)].long()
            tokens = store[table, 0, :, 0].flatten()[:length].long()
            states.append(((tokens * 7919 + 13) * torch.arange(1, length + 1)).sum() % _PRIME)
        return _mix(torch.stack(states)) if states else torch.empty(0, VOCAB)

    def tensors(self) -> list[Tensor]:
        return []

    def report_layers(self) -> list[tuple[str, str, str]]:
        return []


def make_engine(
    model: ToyModel | None = None, *, overlaps: bool = True, speculation: Speculation | None = None, **limits: int
) -> Engine:
    """An engine on the toy model; the cache starts full of nonsense."""
    config = SchedulerConfig(**({"num_blocks": 64, "block_size": 4, "max_model_len": 128} | limits))
    shape = (config.num_blocks, 1, config.block_size, 1)
    one = torch.ones(1)
    cache = LayerCache(torch.full(shape, -99.0), torch.empty(shape), one, one)
    worker = Worker(model or ToyModel(), [cache], config)
    return Engine(worker, config, overlaps=overlaps, speculation=speculation)


def make_request(request_id: str, token_ids: list[int], **params: object) -> AddRequest:
    """Greedy unless told otherwise."""
    settings = {"max_tokens": 8, "temperature": 0.0} | params
    return AddRequest(request_id, token_ids, SamplingParams(**settings), 0.0)


def run_to_end(engine: Engine, requests: list[AddRequest]) -> dict[str, list[TokenOutput]]:
    """All outputs of each answer to each request, when all are added first."""
    outputs: dict[str, list[TokenOutput]] = {name: [] for request in requests for name in request.request_ids}
    for request in requests:
        outputs[request.request_id] += engine.add(request)
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].append(output)
    return outputs


def run_with_arrivals(engine: Engine, requests: list[AddRequest], rng: random.Random) -> dict[str, list[TokenOutput]]:
    """Requests arrive between steps, and now and then one that nobody asked about is added and aborted."""
    outputs: dict[str, list[TokenOutput]] = {request.request_id: [] for request in requests}
    pending = list(requests)
    extras = 0
    while pending or engine.has_work:
        while pending and rng.random() < 0.4:
            assert not engine.add(pending.pop(0))
        if pending and rng.random() < 0.2:
            extras += 1
            engine.add(make_request(f"extra{extras}", rng.choice(requests).token_ids, max_tokens=20))
        if rng.random() < 0.1 and extras:
            engine.scheduler.abort([f"extra{rng.randrange(extras) + 1}"])
        if engine.has_work:
            for output in engine.step():
                outputs.setdefault(output.request_id, []).append(output)
    return outputs


def preemptions_and_hits(random_engine: Callable[[random.Random], Engine], seeds: range) -> tuple[int, int]:
    """How many of each random schedules of such engines make: a test of schedules that makes none says little."""
    preemptions = hits = 0
    for seed in seeds:
        rng = random.Random(seed)
        requests = random_requests(rng, 12)
        engine = random_engine(rng)
        run_with_arrivals(engine, requests, rng)
        preemptions += engine.scheduler.stats().num_preemptions
        hits += engine.scheduler.stats().prefix_cache_hits
    return preemptions, hits


def answers_to(engine: Engine, requests: list[AddRequest]) -> dict[str, list[int]]:
    """The tokens of each answer, none of which ends in an error."""
    found = run_to_end(engine, requests)
    assert [output.error for outputs in found.values() for output in outputs if output.error is not None] == []
    return {name: tokens_of(outputs) for name, outputs in found.items()}


def tokens_of(outputs: list[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def greedy(request: AddRequest) -> list[int]:
    """What the toy model says, without an engine."""
    tokens = list(request.token_ids)
    for _ in range(request.params.max_tokens):
        tokens.append(int(logits_after(tokens).argmax()))
        if tokens[-1] in request.params.stop_token_ids:
            break
    return tokens[len(request.token_ids) :]


def random_requests(rng: random.Random, count: int, longest: int = 40, **params: object) -> list[AddRequest]:
    """Prompts that share beginnings, so that prefix hits, shared blocks and evictions all happen."""
    stems = [[rng.randrange(VOCAB) for _ in range(longest)] for _ in range(3)]
    requests = []
    for i in range(count):
        prompt = rng.choice(stems)[: rng.randrange(1, longest - 5)] + [rng.randrange(VOCAB)] * rng.randrange(5)
        stops = tuple(rng.randrange(VOCAB) for _ in range(rng.randrange(3)))
        requests.append(make_request(f"r{i}", prompt, max_tokens=rng.randrange(1, 24), stop_token_ids=stops, **params))
    return requests


class NaNModel(ToyModel):
    """Poisons the logits of every sequence in which token 13 stands."""

    def forward(self, inputs, caches, *_):  # type: ignore[no-untyped-def]
        logits = super().forward(inputs, caches)
        for i, row in enumerate(inputs.logits_index.tolist()):
            if 13 in inputs.token_ids[: row + 1].tolist():
                logits[i] = torch.nan
        return logits
