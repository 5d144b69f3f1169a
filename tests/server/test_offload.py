"""A server that is killed and started again knows what it has computed, and nobody else's."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
from octavo_server import Server, by_engine, said_at_once, samples, serving

WORDS = "the cat sat on the mat and the dog ran over the hill to the sea "
PROMPT = {"prompt": (WORDS * 40)[:900], "max_tokens": 8, "temperature": 0, "logprobs": 2}


def ask(client: httpx.Client, **fields: Any) -> tuple[dict[str, Any], int, int]:
    """(the answer, its prompt's tokens, those of them that were cached)."""
    response = client.post("/v1/completions", json=PROMPT | fields)
    assert response.status_code == 200, response.text
    usage = response.json()["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return response.json()["choices"][0], usage["prompt_tokens"], cached


def flags(directory: Path, *others: str) -> tuple[str, ...]:
    return ("--kv-offloading-size", "0.05", "--kv-offloading-path", str(directory), *others)


def kill(server: Server) -> None:
    server.send_signal(signal.SIGKILL)
    assert server.exit_code() == -signal.SIGKILL


def test_a_prompt_costs_no_prefill_after_a_restart(tmp_path: Path) -> None:
    directory = tmp_path / "kv"
    with serving(*flags(directory)) as server, server.client() as client:
        assert f"KV offload: {directory}/engine-0.kv has 0 blocks" in server.said
        cold, num_prompt, cached = ask(client)
        assert (cached, num_prompt > 200) == (0, True)
        warm, _, most_cached = ask(client)
        salted, _, cached = ask(client, cache_salt="mine")
        assert (cached, salted) == (0, cold)
        while samples(client)["vllm:kv_offload_store_bytes_total", ()] == 0:
            ask(client, max_tokens=1)
        kill(server)
    with serving(*flags(directory)) as server, server.client() as client:
        assert "has 0 blocks" not in server.said
        found, _, cached = ask(client)
        assert (found, cached) == (warm, most_cached)
        assert most_cached >= num_prompt - 16
        counted = samples(client)
        assert counted["vllm:prompt_tokens_by_source_total", (("source", "external_kv_transfer"),)] == cached
        assert counted["vllm:prompt_tokens_by_source_total", (("source", "local_compute"),)] == num_prompt - cached
        assert counted["vllm:request_prefill_kv_computed_tokens_sum", ()] == num_prompt - cached
        assert counted["vllm:external_prefix_cache_hits_total", ()] == cached
        assert counted["vllm:prefix_cache_hits_total", ()] == 0
        assert counted["vllm:kv_offload_load_bytes_total", ()] > 0
        assert counted["octavo:kv_offload_damaged_blocks_total", ()] == 0
        assert 0 < counted["octavo:kv_offload_usage_perc", ()] <= 1
        assert ask(client, cache_salt="another's")[2] == 0
        assert ask(client, cache_salt="mine")[2] == most_cached
        assert client.post("/reset_prefix_cache").status_code == 200
        assert ask(client)[2] == 0


def test_a_directory_of_another_size_of_blocks_is_told(tmp_path: Path) -> None:
    with serving(*flags(tmp_path)) as server, server.client() as client:
        ask(client)
    with serving(*flags(tmp_path, "--block-size", "32")) as server, server.client() as client:
        assert "engine-0.kv: its blocks are of another KV cache, so it is begun anew" in server.said
        assert ask(client)[2] == 0


def test_start_lines_of_vllm() -> None:
    tiny = str(Path(__file__).parents[1] / "fixtures" / "tiny")
    assert "--kv-offloading-path DIR blocks are kept in a file" in said_at_once(tiny, "--kv-offloading-size", "4")


@pytest.mark.slow
def test_each_of_several_engines_has_a_file(tmp_path: Path) -> None:
    """Prompts of equal length go to both, as each has computed as much as the other or less."""
    prompts = [[5 + i] * 200 for i in range(8)]
    several = flags(tmp_path, "-dp", "2", "--api-key", "key")
    key = {"Authorization": "Bearer key"}
    with serving(*several) as server, server.client(headers=key) as client:
        cold = [ask(client, prompt=prompt)[0] for prompt in prompts]
        assert all(ask(client, prompt=prompt)[2] for prompt in prompts)
        while not all(by_engine(client, "vllm:kv_offload_store_bytes_total").values()):
            ask(client, prompt=[4] * 100, max_tokens=1)
        kill(server)
    assert {path.name for path in tmp_path.glob("*.kv")} == {"engine-0.kv", "engine-1.kv"}
    with serving(*several) as server, server.client(headers=key) as client:
        found = [ask(client, prompt=prompt) for prompt in prompts]
        assert [answer["text"] for answer, *_ in found] == [answer["text"] for answer in cold]
        hits = by_engine(client, "vllm:external_prefix_cache_hits_total")
        assert sum(hits.values()) == sum(cached for *_, cached in found) > 0
        assert client.post("/engines/0/drain").status_code == 200, "the next process has the file"
        assert ask(client, prompt=prompts[0])[0]["text"] == cold[0]["text"]
