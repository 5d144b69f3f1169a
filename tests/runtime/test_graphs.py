"""Decode steps through buckets: what is padded and copied must not be seen. On a GPU the same with real CUDA graphs.

On a CPU a replay runs the model again on the graph's own buffers (`device.capture`): all but CUDA itself is tested.
"""

from __future__ import annotations

import random

import pytest
import torch
from toy_model import VOCAB, ToyModel, logits_after, make_engine, make_request, run_with_arrivals, tokens_of

from octavo.kernels.attention.cache import LayerCache
from octavo.kernels.attention.step import StepInputs
from octavo.runtime.graphs import BUCKETS, DecodeGraphs, buckets_for


class Recorder(ToyModel):
    """Notes how many sequences each step had."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def forward(self, inputs: StepInputs, caches: list[LayerCache]) -> torch.Tensor:
        if inputs.max_query_len == 1:
            self.sizes.append(inputs.seq_lens.shape[0])
        return super().forward(inputs, caches)


@pytest.mark.parametrize("seed", range(20))
def test_answers_are_those_without_graphs(seed: int) -> None:
    rng = random.Random(seed)
    model = Recorder()
    engine = make_engine(model, max_num_seqs=11, max_model_len=64)
    engine.graphs = DecodeGraphs(model, engine.caches, 11, 64)
    requests = [
        make_request(
            f"r{i}", [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 30))], max_tokens=rng.randrange(1, 20)
        )
        for i in range(30)
    ]
    outputs = run_with_arrivals(engine, requests, rng)
    for request in requests:
        tokens = list(request.token_ids)
        for _ in range(request.params.max_tokens):
            tokens.append(int(logits_after(tokens).argmax()))
        assert tokens_of(outputs[request.request_id]) == tokens[len(request.token_ids) :]
    assert set(model.sizes) <= {1, 2, 4, 8, 16}, "a decode step ran as it was"


def test_a_bucket_holds_every_number_of_sequences() -> None:
    for most in (1, 3, 8, 100, 256, 300, 512):
        held = buckets_for(most)
        assert held == sorted(held)
        assert held[-1] >= most
        assert all(size < most for size in held[:-1])
    assert buckets_for(10_000) == list(BUCKETS), "larger batches run without a graph"


def test_a_batch_that_no_bucket_holds_runs_as_it_is() -> None:
    model = Recorder()
    engine = make_engine(model, max_num_seqs=6, max_model_len=64)
    engine.graphs = DecodeGraphs(model, engine.caches, 3, 64)  # up to 4 sequences
    model.sizes.clear()
    requests = [make_request(f"r{i}", [i], max_tokens=9) for i in range(6)]
    run_with_arrivals(engine, requests, random.Random(1))
    assert {5, 6} & set(model.sizes)
