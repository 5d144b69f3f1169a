"""Several models behind one server, by a --config file: loaded as they are asked for, unloaded when they are not."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from forked_commands import forked_commands
from octavo_server import TINY, Server, ended, events, wait_until
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from tiny_oracle import Oracle

from octavo.cli import Parser
from octavo.commands import serve
from octavo.server.start import flags as serve_flags

QWEN = TINY.parent / "tiny-qwen2"
PROMPT = "The cat sat on"
NUM_TOKENS = 6
SMALL = {"dtype": "float32", "num-threads": 1, "num-gpu-blocks-override": 512, "block-size": 16}


@contextmanager
def serving_models(directory: Path, models: dict[str, Any], *flags: str, **common: Any) -> Iterator[Server]:
    """A server that listens, of this --config file."""
    file = directory / "models.yaml"
    file.write_text(yaml.safe_dump({**SMALL, **common, "models": models}, sort_keys=False))
    with ended(forked_commands().start(["serve", "--config", str(file), "--port", "0", *flags], None)) as server:
        server.wait_until_ready()
        yield server


def ask(client: httpx.Client, model: str, prompt: str = PROMPT, **fields: Any) -> httpx.Response:
    body = {"model": model, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "return_token_ids": True}
    return client.post("/v1/completions", json=body | {"ignore_eos": True} | fields)


def tokens(client: httpx.Client, model: str, prompt: str = PROMPT) -> list[int]:
    answer = ask(client, model, prompt)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model
    found: list[int] = answer.json()["choices"][0]["token_ids"]
    return found


def states(client: httpx.Client) -> dict[str, str]:
    return {card["id"]: card["x_octavo"]["state"] for card in client.get("/v1/models").json()["data"]}


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = Path(shutil.copytree(TINY, tmp_path_factory.mktemp("models") / "broken"))
    (directory / "model.safetensors").write_bytes(b"\0" * 100)
    return directory


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, broken: Path) -> Iterator[Server]:
    models = {
        "small": {"model": str(TINY), "model-aliases": {"gpt-4o": "small"}},
        "other": str(QWEN),
        "broken": {"model": str(broken)},
        "nowhere": {"model": "/nowhere/at-all"},
    }
    with serving_models(tmp_path_factory.mktemp("several"), models, "--max-loaded-models", "2") as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def test_nothing_is_loaded_before_it_is_asked_for(tmp_path: Path) -> None:
    with serving_models(tmp_path, {"a": str(TINY), "b": str(QWEN)}) as server, server.client() as client:
        assert states(client) == {"a": "unloaded", "b": "unloaded"}
        assert server.engine_pids == []
        assert client.get("/health").status_code == 200
        assert client.get("/v1/models/a").json()["root"] == str(TINY)
        server.send_signal(signal.SIGTERM)
        assert server.exit_code() == 0


def test_the_model_of_a_request_answers(server: Server, client: httpx.Client, oracle: Oracle) -> None:
    expected = oracle.greedy(oracle.ids(PROMPT), NUM_TOKENS)
    assert tokens(client, "small") == expected
    assert ask(client, "gpt-4o").json()["choices"][0]["token_ids"] == expected
    other = tokens(client, "other")
    assert other != expected
    assert states(client) | {"broken": "", "nowhere": ""} == {
        "small": "loaded", "other": "loaded", "broken": "", "nowhere": ""
    }  # fmt: skip
    assert len(server.engine_pids) == 2
    with OpenAI(base_url=f"{server.url}/v1", api_key="none") as sdk:
        with sdk.chat.completions.create(
            model="small", messages=[{"role": "user", "content": "Hi"}], max_tokens=4, stream=True
        ) as said:
            assert next(iter(said)).model == "small"
        assert {model.id for model in sdk.models.list()} == {"small", "other", "broken", "nowhere"}
    streamed = client.post(
        "/v1/completions", json={"model": "small", "prompt": PROMPT, "max_tokens": 3, "stream": True, "temperature": 0}
    )
    assert len(list(events(streamed.text.splitlines()))) >= 3
    assert tokens(client, "other") == other


def test_a_model_that_can_t_be_loaded_says_so_and_others_go_on(client: httpx.Client, oracle: Oracle) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask, client, name) for name in ("small", "broken", "nowhere", "broken", "small")]
        found = [answer.result() for answer in answers]
    assert [answer.status_code for answer in found] == [200, 503, 503, 503, 200]
    assert "the model 'broken' can't be loaded" in found[1].json()["error"]["message"]
    assert "model.safetensors" in found[1].json()["error"]["message"]
    assert "/nowhere/at-all" in found[2].json()["error"]["message"]
    assert int(found[1].headers["retry-after"]) >= 1
    assert states(client)["broken"] == "failed"
    assert "model.safetensors" in client.get("/v1/models/broken").json()["x_octavo"]["failure"]
    assert tokens(client, "small") == oracle.greedy(oracle.ids(PROMPT), NUM_TOKENS)
    assert client.get("/health").status_code == 200


def test_who_asks_for_no_model_or_another(client: httpx.Client) -> None:
    for body in ({"prompt": "a"}, {"prompt": "a", "model": None}):
        refused = client.post("/v1/completions", json=body)
        assert refused.status_code == 400
        assert "one of small, other, broken, nowhere" in refused.json()["error"]["message"]
        assert "/models/small/v1/completions" in refused.json()["error"]["message"]
    missing = ask(client, "big")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"
    anthropic = client.post("/v1/messages", json={"model": "big", "messages": [], "max_tokens": 1})
    assert anthropic.json()["error"]["type"] == "not_found_error"
    assert client.post("/v1/completions", content=b"{", headers={"content-type": "application/json"}).status_code == 400
    assert client.get("/tokenizer_info").status_code == 400
    assert client.get("/models/big/version").status_code == 404
    assert client.get("/v1/models/big").status_code == 404
    assert client.options("/models/other/version").status_code == 405


def test_a_path_names_a_model_too(client: httpx.Client, oracle: Oracle) -> None:
    body = {"text": PROMPT, "sampling_params": {"max_new_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}}
    said = client.post("/models/small/generate", json=body).json()
    assert said["output_ids"] == oracle.greedy(oracle.ids(PROMPT), NUM_TOKENS)
    assert client.get("/models/small/v1/models").json()["data"][0]["id"] == "small"
    assert client.get("/models/small/tokenizer_info").status_code == 200
    assert client.get("/models/small/health").status_code == 200
    assert "/models/small/" in client.get("/models/small/", headers={"accept": "text/html"}).text


def test_metrics_are_each_model_s_own(client: httpx.Client) -> None:
    tokens(client, "small")
    tokens(client, "other")
    families = list(text_string_to_metric_families(client.get("/metrics").text))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    samples = [sample for family in families for sample in family.samples]
    keys = [(sample.name, tuple(sorted(sample.labels.items()))) for sample in samples]
    assert len(keys) == len(set(keys))
    generated = {s.labels["model_name"]: s.value for s in samples if s.name == "vllm:generation_tokens_total"}
    assert generated.keys() == {"small", "other"}
    assert min(generated.values()) >= NUM_TOKENS
    assert {s.labels.get("model_name") for s in samples if s.name == "http_requests_total"} == {"small", "other"}
    loaded = {s.labels["model_name"]: s.value for s in samples if s.name == "octavo:model_loaded"}
    assert loaded == {"small": 1.0, "other": 1.0, "broken": 0.0, "nowhere": 0.0}


def test_the_least_recently_used_model_makes_room(tmp_path: Path, oracle: Oracle) -> None:
    """While both are asked for by many: each gets its turn, and no answer is another's or cut."""
    expected = oracle.greedy(oracle.ids(PROMPT), NUM_TOKENS)
    models = {"a": str(TINY), "b": str(QWEN)}
    with serving_models(tmp_path, models, "--max-loaded-models", "1") as server, server.client() as client:
        assert tokens(client, "a") == expected
        (first,) = server.engine_pids
        of_b = tokens(client, "b")
        assert states(client) == {"a": "unloaded", "b": "loaded"}
        wait_until(lambda: first not in server.engine_pids)
        assert len(server.engine_pids) == 1
        before = generated(client)
        assert before == {"a": float(NUM_TOKENS), "b": float(NUM_TOKENS)}, "what is counted stays"
        with ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(tokens, client, name) for name in "abbaab"]
            assert [one.result() for one in asked] == [{"a": expected, "b": of_b}[name] for name in "abbaab"]
        assert len(server.engine_pids) == 1
        assert generated(client) == {"a": 4.0 * NUM_TOKENS, "b": 4.0 * NUM_TOKENS}


def generated(client: httpx.Client) -> dict[str, float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    return {s.labels["model_name"]: s.value for s in samples if s.name == "vllm:generation_tokens_total"}


def test_a_model_that_nobody_asks_for_is_unloaded(tmp_path: Path, oracle: Oracle) -> None:
    with serving_models(tmp_path, {"a": str(TINY)}, "--idle-unload", "0.2") as server, server.client() as client:
        for _ in range(2):
            assert tokens(client, "a") == oracle.greedy(oracle.ids(PROMPT), NUM_TOKENS)
            wait_until(lambda: states(client) == {"a": "unloaded"})
            wait_until(lambda: server.engine_pids == [])


@pytest.mark.slow
def test_engines_that_all_die_are_loaded_again(tmp_path: Path) -> None:
    models = {"a": {"model": str(TINY), "max-engine-restarts": 0}}
    with serving_models(tmp_path, models) as server, server.client() as client:
        expected = tokens(client, "a")
        os.kill(server.engine_pids[0], signal.SIGKILL)
        answers: list[httpx.Response] = []

        def is_back() -> bool:
            answers.append(ask(client, "a"))
            return answers[-1].is_success

        wait_until(is_back)
        assert answers[-1].json()["choices"][0]["token_ids"] == expected
        assert {answer.status_code for answer in answers[:-1]} <= {503}
        assert server.process.poll() is None


def test_keys_hold_for_all(tmp_path: Path) -> None:
    flags = ("--api-key", "k")
    with serving_models(tmp_path, {"a": str(TINY)}, *flags) as server, server.client() as client:
        for refused in (ask(client, "a"), client.get("/v1/models"), client.get("/models/a/version")):
            assert refused.status_code == 401
        with server.client(headers={"authorization": "Bearer k"}) as keyed:
            assert states(keyed) == {"a": "unloaded"}
            assert len(tokens(keyed, "a")) == NUM_TOKENS
        assert client.get("/health").status_code == 200


def parser_of_serve() -> Parser:
    parser = Parser(prog="octavo serve", allow_abbrev=False)
    serve_flags.configure(parser)
    return parser


def parsed(text: str, directory: Path, *flags: str) -> dict[str, serve_flags.ServeOptions]:
    file = directory / "models.yaml"
    file.write_text(text)
    parser = parser_of_serve()
    args = parser.parse_intermixed_args(serve.own_words(["--config", str(file), *flags], parser))
    return {name: serve_flags.read_options(each) for name, each in args.models.items()}


def test_what_the_file_says_of_each(tmp_path: Path) -> None:
    text = "port: 1\nmax-num-seqs: 8\nseed: 1\nmodels:\n  a: {model: x, seed: 2, dtype: float32}\n  b/c: y\n"
    found = parsed(text, tmp_path, "--dtype", "bfloat16")
    assert list(found) == ["a", "b/c"]
    assert [one.model.served_model_name for one in found.values()] == [("a",), ("b/c",)]
    assert [serve_flags.model_of(one.model) for one in found.values()] == ["x", "y"]
    assert [one.engine.max_num_seqs for one in found.values()] == [8, 8]
    assert [one.engine.seed for one in found.values()] == [2, 1]
    assert [one.engine.dtype for one in found.values()] == ["bfloat16", "bfloat16"], "the command line wins"
    assert [one.listen.port for one in found.values()] == [1, 1]


@pytest.mark.parametrize(
    ("text", "flags", "words"),
    [
        ("models: {}", (), "names with their options are wanted"),
        ("models: [a]", (), "names with their options are wanted"),
        ("models: {a: {seed: 1}}", (), "models: a: its model is missing"),
        ("models: {a: [x]}", (), "models: a: a directory is wanted"),
        ("models: {a: {model: x, port: 1}}", (), "'port' is of the whole server"),
        ("models: {a: {model: x, served-model-name: y}}", (), "model-aliases gives it more names"),
        ("models: {a: {model: x, sede: 1}}", (), "'sede' is no option of octavo serve; did you mean 'seed'?"),
        ("models: {a: x, a: y}", (), "'a' stands there twice"),
        ("model: x\nmodels: {a: x}", (), "model stands beside models"),
        ("models: {a: x}", ("y",), "leave the one on the command line out"),
    ],
)
def test_a_file_that_is_wrong(
    text: str, flags: Sequence[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parsed(text, tmp_path, *flags)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--api-server-count", "2"), "--api-server-count 2 with several models is not supported"),
        (("--enable-sleep-mode",), "--enable-sleep-mode with several models is not supported"),
        (("--batch-dir", "x"), "--batch-dir x with several models is not supported"),
        (("--nnodes", "2", "--master-addr", "10.0.0.1"), "an engine on other machines with several models"),
        (("--weights-root", "x"), "--weights-root x with several models is not supported"),
    ],
)
def test_what_several_models_can_t_have(flags: Sequence[str], words: str, tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(f"models: {{a: {TINY}}}")
    done = forked_commands().run("serve", "--config", file, "--port", "0", *flags, seconds=300)
    assert done.code == 1, done.stderr
    assert words in done.stderr


@pytest.mark.parametrize(
    ("models", "words"),
    [
        (
            {"a": {"model": str(TINY), "model-aliases": {"b": "a"}}, "b": str(TINY)},
            "a: the name 'b' is a model's already",
        ),
        (
            {name: {"model": str(TINY), "model-aliases": {"gpt-4o": name}} for name in "ab"},
            "b: the name 'gpt-4o' is that of a already",
        ),
    ],
)
def test_a_name_means_one_model(models: dict[str, Any], words: str, tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(yaml.safe_dump({"models": models}))
    done = forked_commands().run("serve", "--config", file, "--port", "0", seconds=300)
    assert done.code == 1, done.stderr
    assert f"models: {words}; a name means one model" in done.stderr


def test_limits_of_models_want_models() -> None:
    done = forked_commands().run("serve", TINY, "--idle-unload", "5", seconds=300)
    assert done.code == 1
    assert "--max-loaded-models and --idle-unload are about the models of a --config file" in done.stderr
