"""What only a GPU shows: real CUDA graphs, memory that is counted, and a whole engine beside transformers.

`pytest -m cuda` on such a machine runs this and, on the GPU, every test that a machine without one interprets.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hf_oracle import CASES, Sequences, make_hf, save
from layers import apply
from safetensors.torch import load_file
from toy_model import make_request, run_to_end, tokens_of
from transformers import AutoModelForCausalLM, AutoTokenizer
from trimmed import whole

from octavo.demo_models import DEMO_MODELS, fetch_model
from octavo.quant.linear import make_linear
from octavo.quant.target import Target
from octavo.runtime.config import EngineConfig
from octavo.runtime.engine import Engine
from octavo.runtime.model.weights import load_model
from octavo.runtime.startup import load_engine
from octavo.runtime.worker import kv_cache

pytestmark = pytest.mark.cuda
PROMPTS = [[5, 17, 40, 3, 22], [9], list(range(3, 40))]


def engine_of(directory: Path, **settings: object) -> Engine:
    config = EngineConfig(model=str(directory), device="cuda", num_blocks=256, **settings)  # type: ignore[arg-type]
    return load_engine(config, 0.0)[0]


def greedy(engine: Engine, prompts: list[list[int]], count: int) -> list[list[int]]:
    requests = [make_request(str(i), prompt, max_tokens=count) for i, prompt in enumerate(prompts)]
    outputs = run_to_end(engine, requests)
    assert all(output.error is None for answer in outputs.values() for output in answer)
    return [tokens_of(outputs[request.request_id]) for request in requests]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "granite", "mixtral"])
def test_greedy_text_in_float32_is_transformers_s(name: str, tmp_path: Path) -> None:
    model = make_hf(*CASES[name]).requires_grad_(False)
    ours = greedy(engine_of(save(model, tmp_path / name), dtype="float32"), PROMPTS, 12)
    for prompt, tokens in zip(PROMPTS, ours, strict=True):
        ids = torch.tensor([prompt])
        for token in tokens:
            logits = model(ids).logits[0, -1]
            assert float(logits.max() - logits[token]) < 1e-3, "another token, and no tie"
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


@pytest.mark.parametrize("kv_cache_dtype", ["bfloat16", "fp8_e4m3", "int8"])
def test_graphs_change_nothing(kv_cache_dtype: str, fixtures: Path) -> None:
    """Same kernels, same sizes but for the padding of a batch: the same tokens to the last."""
    settings = {"dtype": "bfloat16", "kv_cache_dtype": kv_cache_dtype, "max_num_seqs": 8}
    graphed = engine_of(fixtures / "tiny", **settings)
    eager = engine_of(fixtures / "tiny", enforce_eager=True, **settings)
    assert graphed.graphs is not None
    assert eager.graphs is None
    assert greedy(graphed, PROMPTS * 2, 40) == greedy(eager, PROMPTS * 2, 40)


def test_chunks_without_logits_follow_each_other_through_graphs(fixtures: Path) -> None:
    """Nothing waits for such a step: the next one's inputs must not overwrite its own, which may not be copied yet."""
    prompt = torch.randint(3, 90, (240,), generator=torch.Generator().manual_seed(0)).tolist()
    settings = {"dtype": "bfloat16", "max_model_len": 256}
    graphed = engine_of(fixtures / "tiny", max_num_batched_tokens=8, **settings)
    eager = engine_of(fixtures / "tiny", max_num_batched_tokens=8, enforce_eager=True, **settings)
    assert graphed.graphs is not None
    for start in range(8):
        assert greedy(graphed, [prompt[start:]], 4) == greedy(eager, [prompt[start:]], 4)


def test_logits_of_a_bf16_head_are_float32_sums() -> None:
    """k exact products in float32, in any order: bf16 would keep 8 bits of them."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 256, generator=generator).bfloat16() for rows in (5, 1000))
    device = torch.device("cuda")
    head = make_linear([weight], [None], Target.of(device, torch.bfloat16, 90), out_dtype=torch.float32)
    size = x.double().abs() @ weight.double().abs().T
    error = (apply(head, x.to(device)).cpu().double() - x.double() @ weight.double().T).abs()
    assert bool((error <= 256 * 2**-24 * size).all())


def test_the_cache_fits_beside_the_largest_step(fixtures: Path) -> None:
    config = EngineConfig(model=str(fixtures / "tiny"), device="cuda", dtype="bfloat16")
    model = load_model(config)
    assert 0 < kv_cache.step_bytes(model, config) < 2 << 30


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", DEMO_MODELS)
def test_text_of_real_models_is_transformers_s(name: str, dtype: str) -> None:
    """Each token is what float32 in transformers likes best, or as near to it as logits of that type can tell.

    bfloat16: logits are 16 to 32, where the type has steps of 2^-3; some twenty layers' roundings are four of them.
    """
    directory = fetch_model(name, Path("models"))
    prompt = AutoTokenizer.from_pretrained(directory)("A short history of the printing press:").input_ids
    tokens = greedy(engine_of(directory, dtype=dtype), [prompt], 64)[0]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).requires_grad_(False)
    logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    behind = logits.max(1).values - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert float(behind.max()) < (1e-3 if dtype == "float32" else 0.5)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "most"), [("fp8", 0.07), ("int8", 0.07), ("int4", 0.01)])
@pytest.mark.parametrize("name", DEMO_MODELS)
def test_real_models_are_quantized_to_what_they_are_on_a_cpu(name: str, dtype: str, most: float) -> None:
    """KL between both: roundings to bf16, sums in another order, and codes of activations on a tie's other side.

    Two ways of computing the same on a CPU, in bf16, are 0.025, 0.034 and 0.002 apart (SmolLM2, this text); some twice
    that is allowed.
    """
    directory = fetch_model(name, Path("models"))
    text = Path(__file__).read_text()
    ids = AutoTokenizer.from_pretrained(directory)(text).input_ids[:240]
    found = []
    for device in ("cpu", "cuda"):
        model = load_model(EngineConfig(model=str(directory), device=device, dtype=dtype))  # type: ignore[arg-type]
        rows = Sequences(model, [ids], seed=0).step({0: len(ids)})
        found.append(torch.stack([logits for _, _, logits in rows]).float().cpu().log_softmax(-1))
    assert float((found[0].exp() * (found[0] - found[1])).sum(-1).mean()) < most


@pytest.mark.parametrize("name", ["tiny--gptqmodel-w4g32", "tiny--llmc-w8a8", "tiny--llmc-fp8-dynamic"])
def test_quantized_checkpoints_say_what_their_writers_said(name: str, fixtures: Path, tmp_path: Path) -> None:
    """KL to the logits that the tool computed, in float32, on a CPU: bf16 and the kernels' order of sums are in it."""
    expected = load_file(fixtures / name / "expected.safetensors")
    model = load_model(EngineConfig(model=str(whole(fixtures / name, tmp_path)), device="cuda", dtype="bfloat16"))

    ids = expected["input_ids"]
    rows = Sequences(model, ids.tolist(), seed=0).step(dict.fromkeys(range(len(ids)), ids.shape[1]))
    ours = torch.stack([logits for _, _, logits in rows]).unflatten(0, ids.shape).float().log_softmax(-1)
    theirs = expected["logits"].float().log_softmax(-1)
    assert float((theirs.exp() * (theirs - ours)).sum(-1).mean()) < 0.01
