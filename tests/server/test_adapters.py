"""LoRA adapters over HTTP: picked by a request's model, loaded and unloaded while the server runs, on all engines."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from forked_commands import forked_commands
from octavo_server import PATIENCE, SMALL, TINY, Server, serving, wait_until
from peft_oracle import PeftOracle
from tiny_oracle import Oracle

PROMPT = "The cat sat on"
NUM_TOKENS = 6


class Adapters:
    """Two adapters of the tiny model, and what PEFT says with them."""

    def __init__(self, oracle: Oracle, directory: Path) -> None:
        self.ids = oracle.ids(PROMPT)
        self.one, self.other = (
            PeftOracle(oracle._model, directory / name, seed=seed, r=8, lora_alpha=32)
            for seed, name in ((1, "one"), (2, "other"))
        )
        self.directory = directory
        self.says: dict[str, list[int]] = {"tiny": oracle.greedy(self.ids, NUM_TOKENS)}
        for name in ("one", "other"):
            self.says[name] = self._greedy(getattr(self, name))
        assert len({tuple(ids) for ids in self.says.values()}) == 3

    def _greedy(self, oracle: PeftOracle) -> list[int]:
        ids = list(self.ids)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for _ in range(NUM_TOKENS):
            ids.append(int(oracle.logits(ids)[-1].argmax()))
        torch.set_num_threads(threads)
        return ids[len(self.ids) :]

    def path(self, name: str) -> str:
        return str(self.directory / name)


@pytest.fixture(scope="module")
def adapters(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return Adapters(oracle, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def adapted(adapters: Adapters) -> Iterator[Server]:
    """A server with one adapter from its start, and requests that may load more."""
    modules = (f"one={adapters.path('one')}",)
    with serving(
        "--served-model-name", "tiny", "--enable-lora", "--lora-modules", *modules, "--max-loras", "2",
        "--enable-runtime-lora", "--lora-root", str(adapters.directory),
    ) as server:  # fmt: skip
        yield server


def complete(client: httpx.Client, model: str) -> list[int]:
    asked = {"model": model, "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    answer = client.post("/v1/completions", json=asked | {"return_token_ids": True})
    assert answer.status_code == 200, answer.text
    content = answer.json()
    assert content["model"] == model
    found: list[int] = content["choices"][0]["token_ids"]
    return found


def post(client: httpx.Client, route: str, **body: Any) -> httpx.Response:
    return client.post(route, json=body)


def test_a_request_picks_an_adapter_by_its_model(adapted: Server, adapters: Adapters) -> None:
    with adapted.client() as client:
        for name in ("tiny", "one", "tiny"):
            assert complete(client, name) == adapters.says[name]
        missing = post(client, "/v1/completions", model="another", prompt="x")
        assert missing.status_code == 404
        assert "tiny, one is" in missing.json()["error"]["message"]


def test_adapters_are_listed_with_their_parent(adapted: Server, adapters: Adapters) -> None:
    with adapted.client() as client:
        listed = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
        assert (listed["one"]["parent"], listed["one"]["root"]) == ("tiny", adapters.path("one"))
        assert listed["tiny"]["parent"] is None
        assert client.get("/v1/models/one").json() == listed["one"]
        metrics = client.get("/metrics").text
    assert 'vllm:lora_requests_info{max_lora="2",running_lora_adapters="",waiting_lora_adapters=""}' in metrics


def test_every_dialect_takes_an_adapter(adapted: Server, adapters: Adapters, oracle: Oracle) -> None:
    text = oracle.text(adapters.says["one"])
    options = {"temperature": 0, "num_predict": NUM_TOKENS}
    sampling = {"temperature": 0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
    with adapted.client() as client:
        native = post(client, "/generate", text=PROMPT, sampling_params=sampling, lora_path="one").json()
        assert native["output_ids"] == adapters.says["one"]
        several = [PROMPT] * 2
        native = post(client, "/generate", text=several, sampling_params=sampling, lora_path=["one", None]).json()
        assert [one["output_ids"] for one in native] == [adapters.says["one"], adapters.says["tiny"]]
        unknown = post(client, "/generate", text=PROMPT, lora_path="another")
        assert unknown.status_code == 400
        assert "lora_path: the adapter 'another' is not loaded" in unknown.text
        ollama = post(
            client, "/api/generate", model="one:latest", prompt=PROMPT, raw=True, stream=False, options=options
        )
        assert ollama.json()["response"]
        assert text.startswith(ollama.json()["response"])
        messages = [{"role": "user", "content": "Hi"}]
        said = {
            name: [
                post(client, "/v1/chat/completions", model=name, messages=messages, temperature=0, max_tokens=9)
                .json()["choices"][0]["message"]["content"],
                post(client, "/v1/responses", model=name, input=messages, temperature=0, max_output_tokens=9)
                .json()["output"][0]["content"][0]["text"],
                post(client, "/v1/messages", model=name, messages=messages, temperature=0, max_tokens=9)
                .json()["content"][0]["text"],
                post(client, "/api/chat", model=name, messages=messages, stream=False,
                     options={"temperature": 0, "num_predict": 9}).json()["message"]["content"],
            ]
            for name in ("tiny", "one")
        }  # fmt: skip
        assert len(set(said["one"])) == len(set(said["tiny"])) == 1
        assert said["one"] != said["tiny"]


def test_an_adapter_decides(adapted: Server, adapters: Adapters) -> None:
    """Probabilities are those of PEFT's logits at the end of the same prompt."""
    options = [{"name": "billing"}, {"name": "bug"}]
    question = {"id": "team", "type": "choice", "question": "Who answers?", "options": options}
    own = {"team": {"type": "choice", "instructions": "Who answers?", "criteria": {"billing": None, "bug": None}}}
    said = {}
    with adapted.client() as client:
        for name in ("tiny", "one"):
            body = {"model": name, "input": "I was charged twice.", "questions": [question]}
            found = post(client, "/v1/decisions", **body, return_prompt_token_ids=True).json()
            assert found["model"] == name
            said[name] = found["answers"]["team"]
        state = post(client, "/v1/systemone", model="one", state="I was charged twice.", questions=own).json()
    answer = said["one"]
    logits = adapters.one.logits(answer["prompt_token_ids"])[-1].log_softmax(-1)[answer["label_token_ids"]]
    assert list(answer["probabilities"].values()) == pytest.approx(logits.softmax(-1).tolist(), rel=1e-3)
    assert answer["label_mass"] == pytest.approx(float(logits.exp().sum()), rel=1e-3)
    assert said["tiny"]["probabilities"] != pytest.approx(answer["probabilities"], rel=1e-2)
    assert state["model"] == "one"
    assert state["answers"]["team"]["probabilities"] == pytest.approx(answer["probabilities"], rel=1e-3)


def test_adapters_are_loaded_and_unloaded(adapted: Server, adapters: Adapters) -> None:
    with adapted.client() as client:
        done = post(client, "/v1/load_lora_adapter", lora_name="new", lora_path=adapters.path("other"))
        assert (done.status_code, done.text) == (200, "Success: LoRA adapter 'new' added successfully.")
        assert complete(client, "new") == adapters.says["other"]
        twice = post(client, "/v1/load_lora_adapter", lora_name="new", lora_path=adapters.path("one"))
        assert twice.status_code == 400
        assert "load_inplace: true" in twice.json()["error"]["message"]
        changed = post(
            client, "/v1/load_lora_adapter", lora_name="new", lora_path=adapters.path("one"), load_inplace=True
        )
        assert changed.status_code == 200
        assert complete(client, "new") == adapters.says["one"]
        gone = post(client, "/v1/unload_lora_adapter", lora_name="new")
        assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'new' removed successfully.")
        assert post(client, "/v1/completions", model="new", prompt="x").status_code == 404
        assert post(client, "/v1/unload_lora_adapter", lora_name="new").status_code == 404
        assert complete(client, "one") == adapters.says["one"]


def test_sglang_s_routes_say_what_is_loaded(adapted: Server, adapters: Adapters) -> None:
    with adapted.client() as client:
        done = post(client, "/load_lora_adapter", lora_name="new", lora_path=adapters.path("other"))
        both = {"one": adapters.path("one"), "new": adapters.path("other")}
        assert done.json() == {"success": True, "error_message": "", "loaded_adapters": both}
        assert complete(client, "new") == adapters.says["other"]
        again = post(client, "/load_lora_adapter", lora_name="new", lora_path=adapters.path("other"))
        assert again.status_code == 400
        assert (again.json()["success"], again.json()["loaded_adapters"]) == (False, both)
        gone = post(client, "/unload_lora_adapter", lora_name="new").json()
        assert (gone["success"], list(gone["loaded_adapters"])) == (True, ["one"])


def test_an_adapter_that_is_unloaded_goes_on_for_who_has_begun(adapted: Server, adapters: Adapters) -> None:
    with adapted.client() as client:
        assert post(client, "/load_lora_adapter", lora_name="new", lora_path=adapters.path("other")).json()["success"]
        asked = {"model": "new", "prompt": PROMPT, "max_tokens": 200, "temperature": 0, "ignore_eos": True}
        with client.stream(
            "POST", "/v1/completions", json=asked | {"stream": True, "return_token_ids": True}
        ) as stream:
            lines = (line for line in stream.iter_lines() if line.startswith("data: {"))
            next(lines)
            assert post(client, "/unload_lora_adapter", lora_name="new").json()["success"]
            assert '"finish_reason":"length"' in [*lines][-1]


@pytest.mark.parametrize(
    ("name", "path", "said"),
    [
        ("tiny", "one", "'tiny' is the model's own name"),
        ("x", "nowhere", "has no adapter_config.json"),
        ("x", "../outside", "is not within --lora-root"),
        ("x", "/etc", "is not within --lora-root"),
        ("x", "link", "is not within --lora-root"),
        ("x", "one\0", "is no path"),
        ("x", "broken", "r is 0"),
    ],
)
def test_what_can_t_be_loaded_is_refused_by_name(
    name: str, path: str, said: str, adapted: Server, adapters: Adapters, tmp_path: Path
) -> None:
    link = adapters.directory / "link"
    if not link.is_symlink():
        outside = tmp_path / "outside"
        shutil.copytree(adapters.path("one"), outside)
        link.symlink_to(outside)
        broken = adapters.directory / "broken"
        shutil.copytree(adapters.path("one"), broken)
        config = (broken / "adapter_config.json").read_text()
        (broken / "adapter_config.json").write_text(config.replace('"r": 8', '"r": 0'))
    with adapted.client() as client:
        refused = post(client, "/v1/load_lora_adapter", lora_name=name, lora_path=str(adapters.directory / path))
        assert refused.status_code == 400
        assert said in refused.json()["error"]["message"]
        assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["tiny", "one"]


def test_loading_is_closed_unless_it_was_opened(server: Server, adapters: Adapters) -> None:
    with server.client() as client:
        for route in ("/v1/load_lora_adapter", "/load_lora_adapter"):
            refused = post(client, route, lora_name="x", lora_path=adapters.path("one"))
            assert refused.status_code == 403
            assert "--enable-runtime-lora" in refused.json()["error"]["message"]
        for route in ("/v1/unload_lora_adapter", "/unload_lora_adapter"):
            assert post(client, route, lora_name="x").status_code == 403


def test_no_web_page_of_another_origin_may_load(adapted: Server, adapters: Adapters) -> None:
    with adapted.client(headers={"Origin": "http://elsewhere.example"}) as client:
        refused = post(client, "/v1/load_lora_adapter", lora_name="x", lora_path=adapters.path("one"))
        assert refused.status_code == 403


def test_an_engine_that_is_started_again_has_the_adapters(adapters: Adapters) -> None:
    with serving(
        "--served-model-name", "tiny", "--lora-modules", f"one={adapters.path('one')}", "--enable-runtime-lora",
        "--engine-restart-delay", "0.1",
    ) as server, server.client() as client:  # fmt: skip
        assert post(client, "/load_lora_adapter", lora_name="new", lora_path=adapters.path("other")).json()["success"]
        os.kill(server.engine_pid, signal.SIGKILL)
        for name, same in (("new", "other"), ("one", "one"), ("tiny", "tiny")):
            assert complete(client, name) == adapters.says[same]


def test_all_engines_and_all_processes_have_them(adapters: Adapters) -> None:
    """Two server processes before two engines: whoever answers, it is the same."""
    with serving(
        "--served-model-name", "tiny", "--lora-modules", f"one={adapters.path('one')}", "--enable-runtime-lora",
        "-dp", "2", "--api-server-count", "2", "--routing", "round-robin",
    ) as server:  # fmt: skip
        with server.client() as client:
            done = post(client, "/v1/load_lora_adapter", lora_name="new", lora_path=adapters.path("other"))
            assert done.status_code == 200
        for _ in range(6):  # each a connection of its own, which either process may get
            with server.client() as client:
                for name, same in (("new", "other"), ("one", "one"), ("tiny", "tiny")):
                    assert complete(client, name) == adapters.says[same]
        with server.client() as client:
            assert post(client, "/v1/unload_lora_adapter", lora_name="new").status_code == 200
        for _ in range(6):
            with server.client() as client:
                assert post(client, "/v1/completions", model="new", prompt="x").status_code == 404


def test_a_server_process_that_is_started_again_has_them(adapters: Adapters) -> None:
    with serving(
        "--served-model-name", "tiny", "--enable-lora", "--enable-runtime-lora", "--api-server-count", "2",
    ) as server:  # fmt: skip
        with server.client() as client:
            done = post(client, "/v1/load_lora_adapter", lora_name="new", lora_path=adapters.path("other"))
            assert done.status_code == 200
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
        servers = [int(pid) for pid in children if int(pid) not in server.engine_pids]
        assert len(servers) == 2
        os.kill(servers[0], signal.SIGKILL)
        wait_until(lambda: "is up again" in server.said)
        for _ in range(8):
            with server.client() as client:
                assert complete(client, "new") == adapters.says["other"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--lora-modules", "x={tmp}"), "--lora-modules: {tmp} has no adapter_config.json"),
        (("--lora-modules", "a={one}", "a={one}"), "two adapters have the name 'a'"),
        (("--enable-runtime-lora",), "--enable-runtime-lora without --enable-lora"),
        (("--lora-modules", '{{"name": 1}}'), "is no adapter"),
        (("--enable-lora", "-tp", "2", "--nnodes", "2", "--master-addr", "127.0.0.1"), "read adapters on one machine"),
    ],
)
def test_a_start_that_is_wrong_says_so(flags: tuple[str, ...], said: str, adapters: Adapters, tmp_path: Path) -> None:
    places = {"tmp": tmp_path, "one": adapters.path("one")}
    words = [flag.format(**places) for flag in flags]
    result = forked_commands().run("serve", TINY, *SMALL[:2], "--port", "0", *words, seconds=PATIENCE)
    assert result.code in (1, 2)
    assert said.format(**places) in result.stderr
