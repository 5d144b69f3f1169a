"""Steps through buckets: what is padded and copied must not be seen.

On a CPU a replay runs the model again on the graph's own buffers (`device.GraphCapture`): all but CUDA itself is
tested, and `test_cuda` has that.
"""

from __future__ import annotations

import random

import pytest
import torch
from toy_model import VOCAB, ToyModel, logits_after, make_engine, make_request, run_with_arrivals, tokens_of

from octavo.kernels.attention.cache import LayerCache
from octavo.kernels.attention.step import StepInputs
from octavo.runtime.worker.graphs import BUCKETS, MOST_TOKENS, StepGraphs, sizes_for


class Recorder(ToyModel):
    """Notes how many tokens and sequences each step had, and counts those that were copied for a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, int]] = []

    def forward(self, inputs: StepInputs, caches: list[LayerCache], *_: object) -> torch.Tensor:
        self.sizes.append((inputs.token_ids.shape[0], inputs.seq_lens.shape[0]))
        assert inputs.query_starts.tolist() == sorted(inputs.query_starts.tolist())
        assert inputs.query_starts[-1] == inputs.token_ids.shape[0]
        return super().forward(inputs, caches)


@pytest.mark.parametrize("seed", range(20))
def test_answers_are_those_without_graphs(seed: int) -> None:
    rng = random.Random(seed)
    model = Recorder()
    engine = make_engine(model, max_num_seqs=11, max_model_len=64)
    engine.worker.graphs = StepGraphs(model, engine.worker.caches, 11, 64)
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
    larger = {(tokens, seqs) for tokens, seqs in model.sizes if tokens > MOST_TOKENS}
    assert set(model.sizes) - larger <= set(sizes_for(11)), "a step ran as it was"
    assert {(1, 1), (16, 16)} <= set(model.sizes)
    assert any(tokens != seqs for tokens, seqs in model.sizes[len(sizes_for(11)) :])


def test_a_bucket_holds_every_number_of_sequences() -> None:
    for most in (1, 3, 8, 100, 256, 300, 512):
        sizes = sizes_for(most)
        assert sizes == sorted(set(sizes))
        decodes = [tokens for tokens, seqs in sizes if tokens == seqs]
        assert decodes[-1] >= most
        assert all(size < most for size in decodes[:-1])
        prompts = [(tokens, seqs) for tokens, seqs in sizes if tokens != seqs]
        assert max(prompts)[0] == MOST_TOKENS
        assert max(seqs for _, seqs in prompts) == min(most, MOST_TOKENS) + 1  # one for the tokens left over
    for most_tokens, bucket in ((1, 16), (64, 64), (65, 96), (256, 256), (2048, 256)):
        assert max(tokens for tokens, seqs in sizes_for(8, most_tokens) if tokens != seqs) == bucket
    assert [a for a, b in sizes_for(10_000) if a == b] == list(BUCKETS), "larger batches run without a graph"


@pytest.mark.parametrize(("tokens", "is_held"), [(MOST_TOKENS, True), (MOST_TOKENS + 1, False)])
def test_long_prompts_run_as_they_are(tokens: int, is_held: bool) -> None:
    model = Recorder()
    engine = make_engine(model, max_num_seqs=2, max_model_len=300, num_blocks=100, max_num_batched_tokens=300)
    engine.worker.graphs = StepGraphs(model, engine.worker.caches, 2, 300)
    model.sizes.clear()
    request = make_request("r", [i % VOCAB for i in range(tokens)], max_tokens=3)
    outputs = run_with_arrivals(engine, [request], random.Random(1))
    assert tokens_of(outputs["r"])[0] == int(logits_after(list(request.token_ids)).argmax())
    assert ((tokens, 1) in model.sizes) is not is_held


def test_prompt_logprobs_have_a_row_for_each_token() -> None:
    """More rows than a bucket has: the step runs as it is."""
    model = Recorder()
    plain, graphed = make_engine(max_num_seqs=2, max_model_len=64), make_engine(model, max_num_seqs=2, max_model_len=64)
    graphed.worker.graphs = StepGraphs(model, graphed.worker.caches, 2, 64)
    request = make_request("r", list(range(20)), max_tokens=3, prompt_logprobs=2, logprobs=2)
    ours, theirs = (run_with_arrivals(engine, [request], random.Random(1))["r"] for engine in (graphed, plain))
    assert [(o.token_ids, o.logprobs, o.prompt_logprobs) for o in ours] == [
        (o.token_ids, o.logprobs, o.prompt_logprobs) for o in theirs
    ]


def test_a_batch_that_no_bucket_holds_runs_as_it_is() -> None:
    model = Recorder()
    engine = make_engine(model, max_num_seqs=6, max_model_len=64)
    engine.worker.graphs = StepGraphs(model, engine.worker.caches, 3, 64)  # up to 4 sequences
    model.sizes.clear()
    requests = [make_request(f"r{i}", [i], max_tokens=9) for i in range(6)]
    run_with_arrivals(engine, requests, random.Random(1))
    assert {(5, 5), (6, 6)} & set(model.sizes)
