"""What a request's parameters do to logits, and the log-probabilities that are reported."""

from __future__ import annotations

import weakref

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor
from toy_model import make_request

from octavo.runtime.scheduling.kv_groups import BlockTables
from octavo.runtime.scheduling.plan import ScheduledSequence, StepPlan, StepResult
from octavo.runtime.scheduling.sequence import Sequence
from octavo.runtime.worker import sampler
from octavo.runtime.worker.logits_processors import ChangedSequence, ChangesCache, LogitChanges, change_logits
from octavo.runtime.worker.sampler import Sampler
from octavo.runtime.worker.sampling_ops import SamplingOps, select_sampling, uniform
from octavo.runtime.worker.token_counts import TokenCounts

VOCAB = 40


def sequence(prompt: list[int], output: list[int] | None = None, **params: object) -> Sequence:
    it = Sequence(make_request("r", prompt, **params), 0, BlockTables([[]], [0]))
    it.token_ids += output or []
    return it


def decode(it: Sequence, slot: int = 0) -> ScheduledSequence:
    """Its share of a step that decodes: its last token is computed, and the next one wanted."""
    start = len(it.token_ids) - 1
    end = start + 1
    return ScheduledSequence(
        it, slot, start, end, it.token_ids[start:], start, "token", False, 0, [[]], end - it.num_prompt
    )


def sample(logits: Tensor, *sequences: Sequence) -> StepResult:
    """Sample one step in which each sequence decodes."""
    scheduled = [decode(it, slot) for slot, it in enumerate(sequences)]
    sampler = Sampler(0, torch.device("cpu"), max_num_seqs=len(sequences))
    return sampler.sample(logits.clone(), StepPlan(scheduled, len(scheduled)))


def change(logits: Tensor, rows: list[int], sequences: list[Sequence], ops: SamplingOps) -> None:
    """Change rows[i] as sequences[i] asks."""
    states = [ChangedSequence(LogitChanges(it.params, logits.shape[1], logits.device)) for it in sequences]
    change_logits(logits, rows, [decode(it) for it in sequences], states, ops)


def changed(row: Tensor, it: Sequence) -> Tensor:
    logits = torch.stack((torch.zeros(VOCAB), row))
    change(logits, [1], [it], select_sampling(logits.device))
    assert not logits[0].any(), "another request's row was touched"
    return logits[1]


@pytest.fixture
def row() -> Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 4


def test_penalties_are_vllms(row: Tensor) -> None:
    prompt, output = [1, 2, 2, 3], [3, 4, 4, 5, 4]
    it = sequence(prompt, output, presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=1.7)
    expected = row.clone()
    for token in set(prompt + output):
        expected[token] = expected[token] / 1.7 if expected[token] > 0 else expected[token] * 1.7
    for token in set(output):
        expected[token] -= 0.25 * output.count(token) + 0.5
    torch.testing.assert_close(changed(row, it), expected, rtol=0, atol=2e-6)  # float32: a few roundings of 16


def test_counts_grow_with_the_sequence() -> None:
    counts = TokenCounts(num_prompt=3)
    tokens = [5, 6, 5]
    for token in [6, *range(200), 6]:
        tokens.append(token)
        counts.extend(tokens[counts.num_counted :])
    found = dict(zip(counts.token_ids.tolist(), counts.output_counts.tolist(), strict=True))
    assert found == {token: tokens[3:].count(token) for token in set(tokens)}


def test_bias_is_added_allowed_tokens_remain_and_stop_tokens_wait(row: Tensor) -> None:
    biased = changed(row, sequence([1], logit_bias={4: 2.5, 7: -100.0}))
    assert torch.equal(biased - row != 0, torch.isin(torch.arange(VOCAB), torch.tensor([4, 7])))
    only = changed(row, sequence([1], allowed_token_ids=(3, 9)))
    assert only.isfinite().nonzero().flatten().tolist() == [3, 9]
    assert torch.equal(only[[3, 9]], row[[3, 9]])
    for output, is_open in (([], False), ([1], False), ([1, 2], True)):
        it = sequence([1], output, min_tokens=2, stop_token_ids=(6, VOCAB + 5))
        assert bool(changed(row, it)[6].isfinite()) == is_open


def test_a_bias_does_not_lift_what_is_not_allowed(row: Tensor) -> None:
    it = sequence([1], allowed_token_ids=(3,), logit_bias={5: 100.0, 3: -100.0}, repetition_penalty=2.0)
    assert changed(row, it).isfinite().nonzero().flatten().tolist() == [3]


def test_what_a_request_names_is_made_into_arrays_once() -> None:
    """For all of its answers and steps, also where each answer has a seed of its own; and forgotten with the last."""
    sent = make_request("r", [1], allowed_token_ids=tuple(range(30)), logit_bias={3: 1.0}, seed=5)
    answers = msgspec.structs.replace(sent, other_ids=["s", "t"]).answers()
    cache = ChangesCache(torch.device("cpu"))
    first, *others = [cache.get(answer.params, VOCAB) for answer in answers]
    assert all(other is first for other in others)
    same = make_request("u", [1], allowed_token_ids=tuple(range(30)), logit_bias={3: 1.0})
    assert cache.get(same.params, VOCAB) is not first, "another request's"
    gone = weakref.ref(first)
    del first, others
    assert gone() is None


def test_a_gpu_changes_logits_as_a_cpu_does(device: torch.device) -> None:
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(5)) * 4
    sequences = [
        sequence([1, 2], [3, 3, 2], repetition_penalty=1.5, frequency_penalty=0.5, logit_bias={3: 2.0, 9: -1.0}),
        sequence([4], min_tokens=2, stop_token_ids=(6, 7), logit_bias={6: 5.0, 8: 1.0}),
        sequence([5], [5, 6], presence_penalty=0.75, allowed_token_ids=(5, 6, 7)),
    ]
    on_cpu, on_gpu = logits.clone(), logits.clone().to(device)
    for changed_there, ops in ((on_cpu, torch.device("cpu")), (on_gpu, torch.device("cuda"))):
        change(changed_there, [4, 1, 2], sequences, select_sampling(ops))
    assert torch.equal(on_cpu[[0, 3]], logits[[0, 3]])
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=0, atol=2e-6)  # as above


def test_each_request_is_sampled_by_its_own_rule() -> None:
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(4))
    best = logits.argmax(-1).tolist()
    sampled = sample(
        logits,
        sequence([1]),
        sequence([1], temperature=1.0, top_k=1),
        sequence([1], temperature=1.0, allowed_token_ids=(8,)),
        sequence([1], logit_bias={11: 50.0}),
        sequence([1], temperature=1e-9),
    )
    assert sampled.tokens == [[best[0]], [best[1]], [8], [11], [best[4]]]
    assert not sampled.errors


def test_logprobs_are_the_models_own_whatever_changes_the_choice() -> None:
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(5)) * 3
    truth = logits.double().log_softmax(-1)
    sampled = sample(
        logits,
        sequence([1], logprobs=2),
        sequence([1]),
        sequence([1], logprobs=0, allowed_token_ids=(17,), repetition_penalty=3.0),
        sequence([1], logprobs=VOCAB + 9, temperature=4.0, seed=1),
    )
    assert set(sampled.logprobs) == {0, 2, 3}
    for index, count in ((0, 2), (2, 0), (3, VOCAB)):
        (entry,), row = sampled.logprobs[index], truth[index]
        assert [entry.token_id] == sampled.tokens[index]
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=4e-6)  # float32: numbers below 16
        assert entry.rank == int((row > row[entry.token_id]).sum()) + 1
        assert entry.top_ids == row.topk(count).indices.tolist()
        assert entry.top_logprobs == pytest.approx(row.topk(count).values.tolist(), abs=4e-6)
    assert sampled.tokens[2] == [17]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}, {"logprobs": 1}, {"repetition_penalty": 2.0}],
)
def test_a_row_that_is_not_finite_is_an_error_of_its_request(bad: float, params: dict[str, object]) -> None:
    logits = torch.zeros(3, VOCAB)
    logits[:, 3] = 1
    logits[1, 20] = bad
    sampled = sample(logits, sequence([1]), sequence([1], **params), sequence([1]))
    assert set(sampled.errors) == {1}
    assert (sampled.tokens[0], sampled.tokens[2]) == ([3], [3])
    assert 0 <= sampled.tokens[1][0] < VOCAB  # the next step has begun with it


def test_uniform_is_uniform_and_depends_on_key_and_position() -> None:
    numbers = np.array([uniform(f"seed {key}", position) for key in range(40) for position in range(500)])
    assert len(set(numbers.tolist())) == len(numbers)
    counts, _ = np.histogram(numbers, bins=50, range=(0, 1))
    expected = len(numbers) / 50
    assert ((counts - expected) ** 2 / expected).sum() < 85.4  # chi-square, 49 degrees of freedom, p = 0.001
    assert uniform("seed 1", 2) == uniform("seed 1", 2)


def test_a_gpu_draws_each_row_with_its_own_parameters(
    row: Tensor, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from octavo.kernels.sampling.gpu.draw import draw

    kinds: list[dict[str, object]] = [
        {"temperature": 9.0},
        {"temperature": 1.0, "top_p": 0.01},
        {"temperature": 5.0, "min_p": 0.99},
    ]
    rows = torch.stack([row] * 6).to(device)
    sequences = [sequence([1], seed=seed, **kinds[seed % 3]) for seed in range(6)]
    expected = sample(rows.cpu(), *sequences).tokens
    monkeypatch.setattr(sampler, "select_sampling", lambda _, **__: SamplingOps(draw))
    assert sample(rows, *sequences).tokens == expected
    assert len({token for (token,) in expected}) > 1
