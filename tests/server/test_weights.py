"""New weights on servers of their own: answers are transformers' on the new weights, or on the old ones still."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from octavo_server import TINY, Server, events, said_at_once, serving, tokens_of, wait_until
from peft_oracle import PeftOracle
from safetensors.torch import load_file, save_file
from tiny_oracle import Oracle
from transformers import AutoModelForCausalLM

PROMPT = "The cat sat on"
NUM_TOKENS = 8
QUANTIZED = TINY.parent / "tiny--llmc-w4a16-g32"


def changed(directory: Path, change: Callable[[dict[str, torch.Tensor]], None], **config: object) -> Path:
    """A copy of the tiny checkpoint with other tensors, or other values in config.json."""
    shutil.copytree(TINY, directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return directory


def shuffle(tensors: dict[str, torch.Tensor]) -> None:
    """Other weights of the same shapes: each projection has its rows in another order."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            tensors[name] = tensor[torch.randperm(len(tensor), generator=generator)].contiguous()


def spoil(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    tensors[name] = torch.full_like(tensors[name], torch.nan)


def cut(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    tensors[name] = tensors[name][:-1].contiguous()


def lose(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(name for name in tensors if name.endswith("down_proj.weight"))]


class OtherOracle(Oracle):
    """transformers on other weights."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("weights")
    changed(root / "other", shuffle)
    return root


@pytest.fixture(scope="module")
def other(root: Path) -> OtherOracle:
    return OtherOracle(root / "other")


@pytest.fixture(scope="module")
def server(root: Path, oracle: Oracle) -> Iterator[Server]:
    PeftOracle(oracle._model, root / "adapter", seed=1, r=8, lora_alpha=32)
    flags = ("--enable-weight-updates", "--weights-root", str(root), "--lora-modules", f"one={root / 'adapter'}")
    with serving(*flags, "--served-model-name", "tiny") as running:
        shutil.copytree(TINY, root / "first")
        yield running


@pytest.fixture
def client(server: Server, root: Path) -> Iterator[httpx.Client]:
    """The server has its first weights again at the end of each test."""
    with server.client() as client:
        yield client
        assert update(client, root / "first", weight_version="default")["success"]
        wait_until(lambda: len(server.engine_pids) == 1)


def update(client: httpx.Client, path: Path, **fields: Any) -> dict[str, Any]:
    answer = client.post("/update_weights_from_disk", json={"model_path": str(path)} | fields)
    found: dict[str, Any] = answer.json()
    assert answer.status_code == (200 if found.get("success") else 400), answer.text
    return found


def cached(client: httpx.Client, prompt: list[int]) -> int:
    answer = client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1})
    found: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


def version(client: httpx.Client) -> str:
    said = client.post("/generate", json={"text": "a", "sampling_params": {"max_new_tokens": 1}}).json()
    found: str = said["meta_info"]["weight_version"]
    assert client.get("/model_info").json()["weight_version"] == found
    return found


def test_answers_are_of_the_new_weights(
    server: Server, client: httpx.Client, root: Path, oracle: Oracle, other: OtherOracle
) -> None:
    ids = oracle.ids(PROMPT * 8)
    assert oracle.greedy(ids, NUM_TOKENS) != other.greedy(ids, NUM_TOKENS)
    for _ in range(7):
        assert tokens_of(client, ids, NUM_TOKENS) == oracle.greedy(ids, NUM_TOKENS)
    adapted = client.post("/v1/completions", json={"model": "one", "prompt": ids, "max_tokens": 4, "temperature": 0})
    assert cached(client, ids) > 0
    assert version(client) == "default"
    told = update(client, root / "other", weight_version="step 7")
    assert told == {"success": True, "message": "the new weights are served", "num_paused_requests": 0}
    assert cached(client, ids) == 0
    for _ in range(7):
        assert tokens_of(client, ids, NUM_TOKENS) == other.greedy(ids, NUM_TOKENS)
    assert version(client) == "step 7"
    again = client.post("/v1/completions", json={"model": "one", "prompt": ids, "max_tokens": 4, "temperature": 0})
    assert again.status_code == 200
    assert again.json()["choices"][0]["text"] != adapted.json()["choices"][0]["text"]
    wait_until(lambda: len(server.engine_pids) == 1)


def test_an_open_stream_goes_on_with_the_new_weights(
    server: Server, client: httpx.Client, root: Path, oracle: Oracle, other: OtherOracle
) -> None:
    """Its tokens are the old weights' up to one place, and from there on the new ones' behind what had been said."""
    body = {"prompt": PROMPT, "max_tokens": 200, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    with server.client() as asking, asking.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        found = events(answer.iter_lines())
        ids = list(next(found)["choices"][0]["token_ids"])
        client.post("/pause?mode=keep")
        assert update(client, root / "other")["num_paused_requests"] == 1
        client.post("/resume")
        for event in found:
            ids += event["choices"][0]["token_ids"]
    assert len(ids) == 200
    prompt = oracle.ids(PROMPT)
    whole = [*prompt, *ids]
    old, new = (
        [int(token) for token in one.logprobs(whole[:-1])[len(prompt) - 1 :].argmax(-1)] for one in (oracle, other)
    )
    places = [k for k in range(1, 200) if ids == old[:k] + new[k:]]
    assert places
    assert ids != old


@pytest.mark.parametrize("change", [cut, *(pytest.param(one, marks=pytest.mark.slow) for one in (spoil, lose))])
def test_tensors_that_are_wrong(
    server: Server, client: httpx.Client, root: Path, oracle: Oracle, change: Callable[[Any], None]
) -> None:
    (before,) = server.engine_pids
    wrong = changed(root / f"wrong-{change.__name__}", change)
    told = update(client, wrong)
    assert not told["success"]
    if change is not spoil:
        assert "down_proj" in told["message"], told
    assert server.engine_pids == [before]
    assert tokens_of(client, PROMPT, NUM_TOKENS) == oracle.greedy(oracle.ids(PROMPT), NUM_TOKENS)
    assert version(client) == "default"


def test_files_that_are_wrong(server: Server, client: httpx.Client, tmp_path: Path, root: Path, oracle: Oracle) -> None:
    (before,) = server.engine_pids
    truncated = Path(shutil.copytree(TINY, root / "truncated"))
    whole = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    noise = Path(shutil.copytree(TINY, root / "noise"))
    (noise / "model.safetensors").write_bytes(b"\xff" * 5000)
    other_shape = changed(root / "deeper", lambda _: None, num_hidden_layers=3)
    no_json = Path(shutil.copytree(TINY, root / "no-json"))
    (no_json / "config.json").write_text("{")
    outside = Path(shutil.copytree(TINY, tmp_path / "outside"))
    (root / "link").symlink_to(outside)
    for path, words in (
        (truncated, "truncated"),
        (noise, "model.safetensors"),
        (other_shape, "config.json says num_hidden_layers 3, and that of the model that is served 2"),
        (no_json, "config.json"),
        (root, "it has no config.json"),
        (root / "nowhere", "it has no config.json"),
        (outside, "is not within --weights-root"),
        (root / "link", "is not within --weights-root"),
        (root / ".." / "x", "is not within --weights-root"),
    ):
        told = update(client, path)
        assert not told["success"]
        assert words in told["message"], (path, told)
    assert server.engine_pids == [before]
    assert tokens_of(client, PROMPT, NUM_TOKENS) == oracle.greedy(oracle.ids(PROMPT), NUM_TOKENS)


def test_a_quantized_checkpoint(client: httpx.Client, root: Path) -> None:
    with serving(model=QUANTIZED) as alone, alone.client() as asking:
        expected = tokens_of(asking, PROMPT, NUM_TOKENS)
    assert expected != tokens_of(client, PROMPT, NUM_TOKENS)
    shutil.copytree(QUANTIZED, root / "quantized")
    assert update(client, root / "quantized")["success"]
    assert tokens_of(client, PROMPT, NUM_TOKENS) == expected


def test_vllm_s_routes(client: httpx.Client, root: Path, other: OtherOracle) -> None:
    assert client.post("/init_weight_transfer_engine", json={"init_info": {}}).status_code == 200
    for info in ({"master_address": "10.0.0.1"}, {"backend": "nccl"}):
        assert client.post("/init_weight_transfer_engine", json={"init_info": info}).status_code == 400
    assert client.post("/start_weight_update").status_code == 200
    told = client.post("/update_weights", json={"update_info": {"model_path": str(root / "other")}}).json()
    assert told == {"message": "Weights updated", "weight_version": str(root / "other"), "num_kept_requests": 0}
    assert tokens_of(client, PROMPT, NUM_TOKENS) == other.greedy(other.ids(PROMPT), NUM_TOKENS)
    assert client.post("/finish_weight_update", json={"weight_version": "8"}).json()["weight_version"] == "8"
    assert version(client) == "8"
    assert client.post("/update_weight_version", json={"new_version": "9"}).json()["success"]
    assert version(client) == "9"
    refused = client.post("/update_weights", json={"update_info": {"model_path": str(root / "nowhere")}})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "update_info.model_path"
    for path in ("/update_weights_from_tensor", "/update_weights_from_distributed", "/get_weights_by_name"):
        refused = client.post(path, json={"name": "x"})
        assert refused.status_code == 400
        assert f"{path} is not supported: weights come from the disk" in refused.json()["error"]["message"]
    assert client.get("/get_world_size").json() == {"world_size": 1}
    for fields in ({"load_format": "dummy"}, {"flush_cache": False}, {"shards": 1}):
        assert client.post("/update_weights_from_disk", json={"model_path": "x"} | fields).status_code == 400
    refused = client.post("/update_weights", json={}, headers={"Origin": "http://page.example"})
    assert refused.status_code == 403


def test_a_deep_sleep_and_new_weights(root: Path, other: OtherOracle) -> None:
    flags = ("--enable-weight-updates", "--enable-sleep-mode")
    with serving(*flags) as server, server.client() as client:
        client.post("/sleep?level=2")
        assert update(client, root / "other", weight_version="b")["success"]
        assert client.post("/wake_up").json()["status"] == "awake"
        assert tokens_of(client, PROMPT, NUM_TOKENS) == other.greedy(other.ids(PROMPT), NUM_TOKENS)
        assert version(client) == "b"


@pytest.mark.parametrize("ranks", ["-dp", *(pytest.param(one, marks=pytest.mark.slow) for one in ("-tp", "-pp"))])
def test_several_ranks_and_engines(ranks: str, root: Path, oracle: Oracle, other: OtherOracle) -> None:
    with serving("--enable-weight-updates", ranks, "2") as server, server.client() as client:
        assert tokens_of(client, PROMPT, NUM_TOKENS) == oracle.greedy(oracle.ids(PROMPT), NUM_TOKENS)
        broken = root / "broken"
        if not broken.exists():
            changed(broken, cut)
        assert not update(client, broken)["success"]
        assert tokens_of(client, PROMPT, NUM_TOKENS) == oracle.greedy(oracle.ids(PROMPT), NUM_TOKENS)
        assert update(client, root / "other")["success"]
        for _ in range(4):  # with two engines, both have some
            assert tokens_of(client, PROMPT, NUM_TOKENS) == other.greedy(other.ids(PROMPT), NUM_TOKENS)
        assert client.get("/get_world_size").json() == {"world_size": 2}


def test_where_it_is_not_open() -> None:
    with serving() as server, server.client() as client:
        for path, body in (
            ("/update_weights_from_disk", {"model_path": str(TINY)}),
            ("/update_weights", {"update_info": {"model_path": str(TINY)}}),
            ("/update_weight_version", {"new_version": "x"}),
            ("/init_weight_transfer_engine", {"init_info": {}}),
        ):
            refused = client.post(path, json=body)
            assert refused.status_code == 403, refused.text
            assert "--enable-weight-updates" in refused.json()["error"]["message"]
    line = said_at_once(str(TINY), "--enable-weight-updates", "--api-server-count", "2")
    assert "--enable-weight-updates with --api-server-count 2 is not supported" in line
    assert "--enable-weight-updates is missing" in said_at_once(str(TINY), "--weights-root", "/")
