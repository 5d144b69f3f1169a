"""Mixtures whose experts are dealt out over ranks (--enable-expert-parallel), against the same model on one rank."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from divided import Pretended, divergence, prefilled, prompts
from hf_oracle import CASES, HAS_STATES, Sequences, make_hf, save, scattered_logits
from ranks import Ranks
from torch import Tensor
from trimmed import whole

from octavo.calibration.prepare import prepare
from octavo.calibration.quantize_model import quantize_model
from octavo.calibration.recipe import Recipe
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.families.registry import LAYOUTS, VISION
from octavo.runtime.model.model import Model
from octavo.runtime.model.sources import LoadError
from octavo.runtime.model.weights import load_model
from octavo.runtime.parallel.config import ParallelConfig
from octavo.runtime.parallel.group import ALONE, Group
from octavo.runtime.parallel.layout import LayoutError

pytestmark = pytest.mark.long

DIVIDED = [name for name in CASES if name in LAYOUTS and name not in HAS_STATES]
WHOLE = {"gemma4_text"}  # whose mixture isn't divided over ranks (test_ranks.py)
MIXTURES = [name for name in DIVIDED if LAYOUTS[name].experts is not None and name not in WHOLE]
DEALT = {"parallel": ParallelConfig(enable_expert_parallel=True)}


def load(group: Group, directory: Path, **settings: Any) -> Model:
    """A rank's share; with one rank the flag changes nothing."""
    return load_model(EngineConfig(model=str(directory), **DEALT, **settings), group=group)


def scattered(group: Group, directory: Path, token_ids: list[list[int]]) -> list[Tensor]:
    return scattered_logits(load(group, directory, dtype="float32"), token_ids)


def with_greedy_answers(directory: Path, count: int) -> list[list[int]]:
    """Prompts, each with one rank's greedy answer behind it."""
    token_ids = [[*prompt, *[0] * count] for prompt in prompts()]
    sequences = Sequences(load(ALONE, directory, dtype="float32"), token_ids, seed=1)
    counts = {s: len(prompt) for s, prompt in enumerate(prompts())}
    for _ in range(count):
        for s, position, logits in sequences.step(counts):
            if position + 1 == sequences.done[s]:
                token_ids[s][position + 1] = int(logits.argmax())
        counts = dict.fromkeys(counts, 1)
    return token_ids


@pytest.mark.parametrize("name", MIXTURES)
def test_logits_are_those_of_one_rank(name: str, ranks: Ranks, tmp_path: Path) -> None:
    """Every architecture with experts, also where they don't divide evenly: 5 over 2, 4 over 3.

    Tokens of greedy answers, given as they would come, are the likeliest on ranks too; so ranks give these answers.
    """
    directory = save(make_hf(*CASES[name]), tmp_path)
    token_ids = with_greedy_answers(directory, 8)
    alone = scattered(ALONE, directory, token_ids)
    spread = float(torch.cat(alone).std())
    assert spread > 0.3, "trivially small logits prove nothing"
    for size in (2, 3):
        driver = ranks.run(scattered, size, directory, token_ids)[0]
        for ids, prompt, ours, theirs in zip(token_ids, prompts(), driver, alone, strict=True):
            assert float((ours - theirs).abs().max()) <= 1e-4 * max(1.0, spread), size
            begin = len(prompt) - 1
            assert ours[begin:-1].argmax(-1).tolist() == ids[begin + 1 :]


def test_all_architectures_with_experts_are_there() -> None:
    known = {model_type for model_type, layout in LAYOUTS.items() if layout.experts is not None}
    known -= {"kimi_k2", "qwen3_vl_moe_text", *VISION, *HAS_STATES, *WHOLE}
    assert known == set(MIXTURES), "kimi_k2 is a deepseek_v3, and Qwen3-VL's half has no class of its own"


def codes(group: Group, directory: Path, settings: dict[str, Any]) -> dict[tuple[int, str], list[Tensor]]:
    """Packed weights of this rank's experts, by layer and name."""
    model = load(group, directory, **settings)
    return {
        (index, name): [tensor for part in linear.parts for tensor in part.weight.tensors()]
        for index, layer in enumerate(model._layers)
        for name, linear in layer.mlp.linears().items()
        if name.startswith("experts.")
    }


QUANTIZED: dict[str, tuple[str, dict[str, Any]]] = {
    "int8 x int8": ("tiny-moe", {"dtype": "int8"}),
    "int4, groups of 32": ("tiny-moe--llmc-w4a16-g32", {"dtype": "bfloat16"}),
    "fp8, token by token": ("tiny-moe--llmc-fp8-dynamic", {"dtype": "bfloat16"}),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_experts_are_those_of_one_rank(name: str, ranks: Ranks, fixtures: Path, tmp_path: Path) -> None:
    """The same packed codes and scales, each on one rank; logits within rounding; residuals equal among ranks."""
    fixture, settings = QUANTIZED[name]
    directory = whole(fixtures / fixture, tmp_path)
    alone = codes(ALONE, directory, settings)
    logits, _ = prefilled(ALONE, directory, settings, [40, 24])
    for size in (2, 3):
        seen: set[tuple[int, str]] = set()
        for of_rank in ranks.run(codes, size, directory, settings):
            assert not seen & of_rank.keys()
            seen |= of_rank.keys()
            for key, tensors in of_rank.items():
                assert all(torch.equal(mine, theirs) for mine, theirs in zip(tensors, alone[key], strict=True))
        assert seen == alone.keys()
        driver, *others = ranks.run(prefilled, size, directory, settings | DEALT, [40, 24])
        assert divergence(driver[0], logits) <= 1e-3
        for other in others:
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(driver[1], other[1], strict=True))


def test_fp8_blocks_too_narrow_to_cut(ranks: Ranks, tmp_path: Path) -> None:
    """Experts of 16 columns: three ranks can't have 8 of each, and can have two experts each.

    Nothing else is quantized, so that inputs are rounded as on one rank: in float32 few, near a tie, differ.
    """
    architecture, keys = CASES["qwen3_moe"]
    sizes = {"moe_intermediate_size": 16, "mlp_only_layers": []}
    source = save(make_hf(architecture, keys | sizes), tmp_path / "source")
    directory = tmp_path / "quantized"
    recipe = Recipe("FP8_BLOCK", search="absmax", ignore=("re:.*self_attn.*",))
    quantize_model(prepare(source, directory, recipe, layouts=LAYOUTS))
    config = EngineConfig(model=str(directory), dtype="float32")
    with pytest.raises(LayoutError, match=r"experts of 16 columns.*; 1 to 2 work, and 3 with --enable-expert-parallel"):
        load_model(config, group=Pretended(3))
    token_ids = prompts()
    alone = scattered(ALONE, directory, token_ids)
    driver = ranks.run(scattered, 3, directory, token_ids)[0]
    assert divergence(torch.cat(driver), torch.cat(alone)) <= 1e-5


def test_random_experts_are_those_of_one_rank(ranks: Ranks, fixtures: Path) -> None:
    """--load-format dummy draws the others' numbers too, or whatever is drawn next would differ between ranks."""
    settings = {"dtype": "float32", "load_format": "dummy"}
    logits, _ = prefilled(ALONE, fixtures / "tiny-moe", settings, [40])
    driver, other = ranks.run(prefilled, 2, fixtures / "tiny-moe", settings | DEALT, [40])
    torch.testing.assert_close(driver[0], logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(driver[1][-1], other[1][-1])


def peak_growth(group: Group, directory: Path) -> int:
    """How many bytes a load takes at its peak, mapped pages of files included. The first load is for what stays."""
    for _ in range(2):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
        before = _status("VmRSS")
        model = load(group, directory, dtype="float32")
        grown = _status("VmHWM") - before
        del model
    return grown


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def test_a_rank_reads_its_own_experts_only(ranks: Ranks, tmp_path: Path) -> None:
    """Of 50 MB of experts, two ranks have half each, in memory and of the file's pages."""
    sizes = {"hidden_size": 256, "moe_intermediate_size": 512, "num_experts": 8, "mlp_only_layers": []}
    architecture, keys = CASES["qwen3_moe"]
    directory = save(make_hf(architecture, keys | sizes), tmp_path)
    (alone,) = ranks.run(peak_growth, 1, directory)
    assert alone > 90e6, "experts and the file's pages"
    for grown in ranks.run(peak_growth, 2, directory):
        assert grown < 0.6 * alone


@pytest.mark.parametrize(
    ("fixture", "settings", "size", "error", "said"),
    [
        ("tiny", {}, 1, LoadError, "--enable-expert-parallel: llama has no experts; without the flag it is served"),
        ("tiny", {}, 2, LoadError, "--enable-expert-parallel: llama has no experts"),
        ("tiny-moe", {"model_impl": "hf"}, 1, LoadError, "--enable-expert-parallel: transformers' own code"),
        ("tiny-moe", {"model_impl": "hf"}, 2, LoadError, "-tp 2: transformers' own code is not divided"),
        ("tiny-moe", {}, 5, LayoutError, "-tp 5: the model has 4 .*; 1 to 4 work"),
    ],
)
def test_what_has_no_experts_to_deal_out_is_refused_by_name(
    fixture: str, settings: dict[str, Any], size: int, error: type[Exception], said: str, fixtures: Path
) -> None:
    with pytest.raises(error, match=said):
        load(Pretended(size), fixtures / fixture, **settings)


def test_one_rank_says_that_it_has_all_experts(fixtures: Path) -> None:
    notes = load(ALONE, fixtures / "tiny-moe").notes
    assert [note for note in notes if note.startswith("--enable-expert-parallel changes nothing: one rank has")]


def test_the_table_says_which_experts_each_rank_has(ranks: Ranks, fixtures: Path) -> None:
    assert ranks.run(described, 3, fixtures / "tiny-moe")[0][1:] == (
        "rank 1 of 3: query heads 1-2, kv heads 0-1, experts 2-3, vocabulary 384-704; shared memory",
        "rank 2 of 3: query heads 2-4, kv heads 1-2, experts 3-4, vocabulary 704-1024; shared memory",
    )


def described(group: Group, directory: Path) -> tuple[str, ...]:
    return load(group, directory).ranks
