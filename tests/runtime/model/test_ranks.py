"""A model over several ranks, in processes of their own, against the same model on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from divided import Pretended, divergence, prefilled, prompts
from hf_oracle import CASES, HAS_STATES, make_hf, save, scattered_logits
from ranks import Ranks
from torch import Tensor
from trimmed import whole

from octavo.runtime.config import EngineConfig
from octavo.runtime.model.sources import LoadError
from octavo.runtime.model.weights import load_model
from octavo.runtime.parallel.config import ParallelConfig
from octavo.runtime.parallel.group import ALONE, Group
from octavo.runtime.parallel.layout import LayoutError

pytestmark = pytest.mark.long


def scattered(group: Group, directory: Path, stages: int = 1) -> list[Tensor]:
    """float32 logits of chunks and single tokens in mixed batches, on each rank what its head gives."""
    parallel = ParallelConfig(pipeline_parallel_size=stages)
    config = EngineConfig(model=str(directory), dtype="float32", parallel=parallel)
    return scattered_logits(load_model(config, group=group), prompts())


OFTEN = ("llama", "qwen2", "gemma3_text", "qwen3_moe", "olmo2", "phi3")
"""One of each way to divide a model; the others run with `-m slow`."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow)
        for name in CASES
        if not name.startswith(("gemma3n", "gemma4")) and name not in HAS_STATES
    ],
)
def test_logits_are_those_of_one_rank(name: str, ranks: Ranks, tmp_path: Path) -> None:
    """Every architecture, with biases, windows, caps, norms over all heads, tied heads, mixtures, and fused files."""
    directory = save(make_hf(*CASES[name]), tmp_path)
    alone = scattered(ALONE, directory)
    spread = float(torch.cat(alone).std())
    assert spread > 0.3, "trivially small logits prove nothing"
    for size, stages in ((2, 1), (3, 1), (4, 1), (2, 2), (3, 3), (4, 2)):
        driver = ranks.run(scattered, size, directory, stages)[0]
        for ours, theirs in zip(driver, alone, strict=True):
            assert float((ours - theirs).abs().max()) <= 1e-4 * max(1.0, spread), (size, stages)


def test_layers_of_several_sizes_are_divided_into_stages_alone(ranks: Ranks, tmp_path: Path) -> None:
    """And those that read another one's cache are not divided."""
    directories = {name: save(make_hf(*CASES[name]), tmp_path / name) for name in CASES if name.startswith("gemma4")}
    alone = scattered(ALONE, directories["gemma4_text"])
    driver = ranks.run(scattered, 2, directories["gemma4_text"], 2)[0]
    for ours, theirs in zip(driver, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    for name, stages, reason in (
        ("gemma4_text", 1, "-tp 2: gemma4_text has values made of keys, which are not divided"),
        ("gemma4_text-moe", 1, "-tp 2: gemma4_text has experts beside an MLP, which are not divided"),
        ("gemma4_text-small", 1, "-tp 2: gemma4_text has layers that read the cache of others"),
        ("gemma4_text-small", 2, "-pp 2: gemma4_text has layers that read the cache of others"),
    ):
        with pytest.raises(Exception, match=reason):
            ranks.run(scattered, 2, directories[name], stages)


def bests(group: Group, directory: Path, hidden: Tensor) -> tuple[list[int], list[float], list[int]]:
    """(the best tokens, their logits, bytes that were gathered) of hidden states."""
    model = load_model(EngineConfig(model=str(directory), dtype="float32"), group=group)
    sizes: list[int] = []
    gather = group.gather

    def counted(x: Tensor) -> Tensor | None:
        sizes.append(x.nbytes)
        return gather(x)

    group.gather = counted  # type: ignore[method-assign]
    assert model.best is not None
    best = model.best(hidden, None)
    return best.ids.tolist(), best.logits.tolist(), sizes


def test_the_best_token_is_that_of_one_rank_whatever_ties(ranks: Ranks, tmp_path: Path) -> None:
    """Logits are small integers, of which several tokens on several ranks have the same, and now and then NaN."""
    hf = make_hf(*CASES["llama"])
    generator = torch.Generator().manual_seed(4)
    hf.lm_head.weight.data = torch.randint(-1, 2, hf.lm_head.weight.shape, generator=generator).float()
    directory = save(hf, tmp_path)
    hidden = torch.randint(-1, 2, (40, 64), generator=generator).float() * (torch.arange(40) % 3).unsqueeze(1)
    hidden[5, 3] = torch.inf  # NaN where a weight is 0
    logits = load_model(EngineConfig(model=str(directory), dtype="float32")).logits(hidden)
    expected = logits.numpy().argmax(axis=1)
    tied = [int((row == row[token]).sum()) for row, token in zip(logits, expected, strict=True)]
    assert sum(count > 1 for count in tied) > 15
    for size in (2, 3):
        ids, found, sent = ranks.run(bests, size, directory, hidden)[0]
        assert ids == expected.tolist()
        assert torch.equal(torch.tensor(found).nan_to_num(-7.0), logits[range(40), expected].nan_to_num(-7.0))
        assert sent == [8 * len(hidden)]


def kept_of_embedding(group: Group, directory: Path) -> int:
    """Bytes in memory for the sake of a rank's embedding, with two stages."""
    parallel = ParallelConfig(pipeline_parallel_size=2)
    model = load_model(EngineConfig(model=str(directory), dtype="float32", parallel=parallel), group=group)
    return model._embedding.table.untyped_storage().nbytes()


def test_only_the_first_stage_keeps_the_embedding(ranks: Ranks, tmp_path: Path) -> None:
    """The last one reads it too where the head is tied to it, and packs it."""
    hf = make_hf(*CASES["qwen3"])
    assert hf.config.tie_word_embeddings
    embedding = hf.get_input_embeddings().weight
    assert ranks.run(kept_of_embedding, 2, save(hf, tmp_path)) == [0, embedding.nbytes]


QUANTIZED = [
    "tiny--llmc-w8a8",
    "tiny--llmc-w4a16-asym-g32",
    "tiny--gptqmodel-w4g32-act",
    "tiny--llmc-fp8-static",
    "tiny-qwen2--llmc-fp8-block",
    "tiny-moe--llmc-w4a16-g32",
]


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_checkpoints_differ_within_rounding(name: str, ranks: Ranks, fixtures: Path, tmp_path: Path) -> None:
    """In bfloat16; and the ranks' residual streams are equal, bit for bit.

    Narrower groups of a rank's inputs are rounded otherwise, no worse: those logits are as near to float32's.
    """
    directory = whole(fixtures / name, tmp_path)
    settings = {"dtype": "bfloat16"}
    alone, _ = prefilled(ALONE, directory, settings, [40, 24])
    exact, _ = prefilled(ALONE, directory, {"dtype": "float32"}, [40, 24])
    for size in (2, 3):
        driver, *others = ranks.run(prefilled, size, directory, settings, [40, 24])
        assert driver[0].shape == alone.shape
        assert divergence(driver[0], alone) <= max(1e-3, divergence(alone, exact))
        for other in others:
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(driver[1], other[1], strict=True))


@pytest.mark.parametrize("name", ["tiny--llmc-w8a8", "tiny--llmc-fp8-dynamic", "tiny--llmc-w4a8-g32"])
def test_inputs_are_rounded_as_those_of_one_rank(name: str, ranks: Ranks, fixtures: Path, tmp_path: Path) -> None:
    """Token by token, by the largest number of all ranks' columns: in float32 few inputs, near a tie, differ.

    That was worth 3e-05 nats on the processor where most did; by its own columns each rank rounds 8e-04 and more away.
    """
    directory = whole(fixtures / name, tmp_path)
    settings = {"dtype": "float32"}
    alone, _ = prefilled(ALONE, directory, settings, [40, 24])
    for size in (2, 3):
        driver = ranks.run(prefilled, size, directory, settings, [40, 24])[0]
        assert divergence(driver[0], alone) <= 1e-4


def test_what_is_rounded_at_load_is_rounded_as_on_one_rank(ranks: Ranks, fixtures: Path) -> None:
    """Before it is cut: the groups are the same, in float32 to the last bits."""
    settings = {"dtype": "int4", "lm_head_dtype": "int8"}
    alone, _ = prefilled(ALONE, fixtures / "tiny", settings, [40])
    for size in (2, 3):
        driver = ranks.run(prefilled, size, fixtures / "tiny", settings, [40])[0]
        assert divergence(driver[0], alone) <= 1e-3


def kv_scales(group: Group, directory: Path) -> list[list[float]]:
    model = load_model(EngineConfig(model=str(directory)), group=group)
    assert model.kv_scales is not None
    assert [len(value) for _, value in model.kv_scales] == [shape.num_heads for shape in model.kv_shapes]
    return [value.tolist() for _, value in model.kv_scales]


def test_each_rank_has_the_kv_scales_of_its_heads(ranks: Ranks, fixtures: Path, tmp_path: Path) -> None:
    directory = whole(fixtures / "tiny--llmc-fp8-kv", tmp_path)
    (alone,) = [kv_scales(ALONE, directory)]
    of_ranks = ranks.run(kv_scales, 2, directory)
    for layer, expected in enumerate(alone):
        assert [scale for rank in of_ranks for scale in rank[layer]] == expected


@pytest.mark.parametrize(
    ("settings", "size", "error", "said"),
    [
        ({}, 5, LayoutError, "-tp 5: the model has 4 query heads; 1 to 4 work"),
        ({"parallel": ParallelConfig(pipeline_parallel_size=3)}, 3, LayoutError, "-pp 3: .* 2 layers; 1 to 2 work"),
        (
            {"model_impl": "hf"},
            2,
            LoadError,
            "-tp 2: transformers' own code is not divided over ranks .*one rank works",
        ),
        (
            {"model_impl": "hf", "parallel": ParallelConfig(pipeline_parallel_size=2)},
            4,
            LoadError,
            "-tp 2 -pp 2: transformers' own code",
        ),
    ],
)
def test_what_can_not_be_divided_is_refused_by_name(
    settings: dict[str, Any], size: int, error: type[Exception], said: str, fixtures: Path
) -> None:
    config = EngineConfig(model=str(fixtures / "tiny"), **settings)
    with pytest.raises(error, match=said):
        load_model(config, group=Pretended(size))


def test_the_table_says_what_each_rank_holds(ranks: Ranks, fixtures: Path) -> None:
    assert ranks.run(described, 2, fixtures / "tiny")[1] == (
        "rank 0 of 2: query heads 0-2, kv heads 0-1, inner 0-192, vocabulary 0-512; shared memory",
        "rank 1 of 2: query heads 2-4, kv heads 1-2, inner 192-352, vocabulary 512-1024; shared memory",
    )


def described(group: Group, directory: Path) -> tuple[str, ...]:
    return load_model(EngineConfig(model=str(directory)), group=group).ranks
