"""The command line of `octavo serve`: names, aliases, what the engine is told; then a server with most of it set."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import httpx
import pytest
from octavo_server import PATIENCE, Server, serving, wait_until

from octavo.cli import main
from octavo.commands import serve
from octavo.runtime.config import EngineConfig
from octavo.runtime.speculation.config import SpeculativeConfig
from octavo.server.start import flags as serve_flags
from octavo.server.start.flags import OptionsError, ServeOptions


def parse(*arguments: str) -> ServeOptions:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    serve_flags.configure(parser)
    return serve_flags.read_options(parser.parse_args(arguments))


ALIASES = [
    ("--model-path", "--model", "m"),
    ("--tokenizer-path", "--tokenizer", "t"),
    ("--context-length", "--max-model-len", "77"),
    ("--mem-fraction-static", "--gpu-memory-utilization", "0.5"),
    ("--page-size", "--block-size", "32"),
    ("--max-running-requests", "--max-num-seqs", "9"),
    ("--chunked-prefill-size", "--max-num-batched-tokens", "99"),
    ("--random-seed", "--seed", "5"),
    ("--log-level", "--uvicorn-log-level", "error"),
    ("--tp", "--tensor-parallel-size", "1"),
    ("--tp-size", "-tp", "1"),
    ("--pp", "--pipeline-parallel-size", "2"),
    ("--pp-size", "-pp", "2"),
    ("-q", "--quantization", "int8"),
]


@pytest.mark.parametrize(("alias", "name", "value"), ALIASES)
def test_another_name_for_the_same(alias: str, name: str, value: str) -> None:
    assert parse(alias, value) == parse(name, value)


def test_other_values_for_the_same() -> None:
    assert parse("--disable-radix-cache") == parse("--no-enable-prefix-caching")
    assert parse("--kv-cache-dtype", "fp8") == parse("--kv-cache-dtype", "fp8_e4m3")
    assert parse("--model-impl", "transformers") == parse("--model-impl", "hf")
    assert parse("--api-key", "a", "b", "--api-key", "c").server.api_key == ("a", "b", "c")


def test_both_peers_names_for_the_deterministic_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = parse("m", "--deterministic")
    assert asked.engine.deterministic
    assert parse("m", "--enable-deterministic-inference") == asked
    for value, found in (("1", asked), ("0", parse("m")), ("", parse("m"))):
        monkeypatch.setenv("VLLM_BATCH_INVARIANT", value)
        assert parse("m") == found
        assert parse("m", "--deterministic") == asked
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "yes")
    with pytest.raises(OptionsError, match="VLLM_BATCH_INVARIANT=yes: 1 asks for --deterministic, and 0 does not"):
        parse("m")


def test_experts_are_dealt_out_over_all_ranks_or_none(capsys: pytest.CaptureFixture[str]) -> None:
    """SGLang's --ep-size, which may be less than its --tp-size, is vLLM's switch here."""
    spread = parse("-tp", "4", "--enable-expert-parallel")
    assert spread.engine.parallel.enable_expert_parallel
    assert parse("--tp", "4", "--ep-size", "4") == parse("-tp", "4", "-ep") == spread
    assert parse("--tp", "4", "--ep", "1") == parse("-tp", "4", "--no-enable-expert-parallel") == parse("-tp", "4")
    assert parse("--expert-parallel-size", "1") == parse()
    with pytest.raises(OptionsError, match=r"--ep-size 2 with -tp 4: .*--ep-size 4 works, and so does -tp 2"):
        parse("--tp", "4", "--ep-size", "2")
    assert main(["serve", "m", "--tp", "4", "--ep-size", "2"]) == 2
    assert capsys.readouterr().err.startswith("octavo serve: --ep-size 2 with -tp 4: ")


def test_the_engine_s_defaults_are_the_command_s() -> None:
    assert serve_flags.engine_config(parse("m"), Path("m")) == EngineConfig(model="m")


def test_every_field_of_the_engine_s_configuration_has_a_flag() -> None:
    told = {
        "dtype": ("--dtype", "int4"),
        "lm_head_dtype": ("--lm-head-dtype", "int8"),
        "kv_cache_dtype": ("--kv-cache-dtype", "int8"),
        "device": ("--device", "cpu"),
        "model_impl": ("--model-impl", "hf"),
        "load_format": ("--load-format", "dummy"),
        "runner": ("--runner", "pooling"),
        "convert": ("--convert", "embed"),
        "pooler_config": ("--pooler-config", '{"pooling_type": "MEAN"}'),
        "trust_remote_code": ("--trust-remote-code",),
        "enforce_eager": ("--enforce-eager",),
        "deterministic": ("--deterministic",),
        "max_model_len": ("--max-model-len", "7"),
        "block_size": ("--block-size", "7"),
        "num_blocks": ("--num-gpu-blocks-override", "7"),
        "kv_cache_memory_bytes": ("--kv-cache-memory-bytes", "7MiB"),
        "gpu_memory_utilization": ("--gpu-memory-utilization", "0.7"),
        "max_num_seqs": ("--max-num-seqs", "7"),
        "max_num_batched_tokens": ("--max-num-batched-tokens", "7"),
        "max_source_len": ("--max-source-len", "7"),
        "limit_mm_per_prompt": ("--limit-mm-per-prompt", '{"image": 7}'),
        "kv_offloading_size": ("--kv-offloading-size", "7"),
        "kv_offloading_path": ("--kv-offloading-path", "kept"),
        "kv_events_config": ("--kv-events-config", '{"enable_kv_cache_events": true, "buffer_steps": 7}'),
        "speculative_config": ("--speculative-config", '{"method": "ngram"}'),
        "enable_prefix_caching": ("--no-enable-prefix-caching",),
        "scheduling_policy": ("--scheduling-policy", "lpm"),
        "priority_aging": ("--priority-aging", "7"),
        "num_threads": ("--num-threads", "7"),
        "seed": ("--seed", "7"),
        "lora": ("--enable-lora",),
        "parallel": ("--tensor-parallel-size", "2"),
    }
    assert set(told) == set(get_type_hints(EngineConfig)) - {"model", "share_suffixes"}
    default = EngineConfig(model="m")
    for field, flags in told.items():
        config = serve_flags.engine_config(parse("m", *flags), Path("m"))
        assert {name for name in told if getattr(config, name) != getattr(default, name)} == {field}
    assert serve_flags.engine_config(parse("m", "-q", "fp8"), Path("m")).dtype == "fp8"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--max-model-len", "x"),
        ("--max-model-len", "0"),
        ("--port", "70000"),
        ("--gpu-memory-utilization", "1.5"),
        ("--shutdown-timeout", "-1"),
        ("--shutdown-timeout", "inf"),
        ("--max-logprobs", "-2"),
        ("--allowed-origins", "*"),
        ("--default-chat-template-kwargs", '{"tools": []}'),
        ("--default-chat-template-kwargs", "[]"),
        ("--override-generation-config", "{'a': 1}"),
        ("--override-generation-config", '{"top_q": 1}'),
        ("--dtype", "int5"),
        ("--tp", "0"),
        ("--ep-size", "0"),
        ("--kv-events-config", "tcp://*:5557"),
        ("--kv-events-config", '{"end_point": "tcp://*:5557"}'),
        ("--max-model", "5"),
        ("--speculative-config", '{"method": "eagle3"}'),
        ("--speculative-config", '{"method": "ngram", "k": 3}'),
        ("--speculative-algorithm", "EAGLE"),
        ("--speculative-num-draft-tokens", "0"),
    ],
)
def test_what_makes_no_sense_is_told_by_its_flag(
    arguments: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse("m", *arguments)
    said = capsys.readouterr().err.splitlines()[-1]
    assert arguments[0] in said
    assert "invalid _" not in said


STANDALONE = ("--speculative-algorithm", "STANDALONE")


def test_speculation_is_asked_for_by_either_name() -> None:
    ours = parse("m", "--speculative-config", '{"method": "ngram", "num_speculative_tokens": 5}').engine
    assert ours.speculative_config == SpeculativeConfig("ngram", num_speculative_tokens=5)
    assert parse("m", "-sc", '{"method": "ngram", "num_speculative_tokens": 5}').engine == ours
    assert parse("m", "--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", "5").engine == ours
    drafted = parse("m", "-sc", '{"model": "small", "num_speculative_tokens": 3, "revision": "r"}').engine
    assert drafted.speculative_config == SpeculativeConfig("draft_model", 3, model="small", revision="r")
    standalone = (*STANDALONE, "--speculative-draft-model-path", "small")
    for count in (("--speculative-num-steps", "3"), ("--speculative-num-draft-tokens", "4")):
        more = ("--speculative-draft-model-revision", "r", "--speculative-eagle-topk", "1")
        assert parse("m", *standalone, *count, *more).engine == drafted
    eagle = parse("m", "-sc", '{"method": "eagle3", "model": "head", "num_speculative_tokens": 3}').engine
    assert eagle.speculative_config == SpeculativeConfig("eagle3", 3, model="head")
    of_sglang = ("--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", "head")
    assert parse("m", *of_sglang, "--speculative-num-steps", "3", "--speculative-eagle-topk", "1").engine == eagle
    mtp = parse("m", "-sc", '{"method": "mtp", "num_speculative_tokens": 1}').engine
    assert mtp.speculative_config == SpeculativeConfig("mtp", 1)
    assert parse("m", "-sc", '{"method": "mimo_mtp", "num_speculative_tokens": 1}').engine == mtp
    assert parse("m", "--speculative-algorithm", "NEXTN", "--speculative-num-steps", "1").engine == mtp
    shared = parse("m", "--speculative-config", '{"method": "suffix"}', "--share-suffixes", "--fair-by", "none").engine
    assert shared.speculative_config == SpeculativeConfig("suffix")
    assert shared.share_suffixes


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--speculative-num-draft-tokens", "5"), "--speculative-algorithm is missing, such as NGRAM"),
        (("--speculative-algorithm", "EAGLE3"), "method 'eagle3' without a model"),
        (("--per-request-spec-decode-metrics", "summary"), "summary without --speculative-config: there are no drafts"),
        (
            ("--speculative-algorithm", "NGRAM", "--speculative-num-steps", "5"),
            "--speculative-num-steps 5: it is of STANDALONE, EAGLE3 and NEXTN",
        ),
        (STANDALONE, "method 'draft_model' without a model"),
        (
            (*STANDALONE, "--speculative-num-steps", "3", "--speculative-eagle-topk", "4"),
            "--speculative-eagle-topk 4: drafts are a chain here",
        ),
        (
            (*STANDALONE, "--speculative-num-steps", "3", "--speculative-num-draft-tokens", "8"),
            "--speculative-num-draft-tokens 8 with --speculative-num-steps 3: drafts are a chain here; 4 works",
        ),
        (("--speculative-algorithm", "NGRAM", "-sc", '{"method": "ngram"}'), "leave one of them out"),
        (("--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", "500"), "Expected `int` <= 64"),
        (("--share-suffixes",), '"suffix"}\' is missing'),
        (("-sc", '{"method": "ngram"}', "--share-suffixes"), '"suffix"}\' is missing'),
        (("-sc", '{"method": "suffix"}', "--fair-by", "none"), "--fair-by key works"),
    ],
)
def test_what_speculation_can_t_be_is_one_line(
    flags: tuple[str, ...], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "m", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(("octavo serve: --s", "octavo serve: --per-request-spec-decode-metrics"))
    assert why in line


def test_help_tells_every_flag_once_in_groups() -> None:
    command = [sys.executable, "-m", "octavo", "serve", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE).stdout
    for group in ("model:", "KV cache and batching:", "text and sampling:", "HTTP:", "logs:"):
        assert f"\n{group}\n" in text
    parser = argparse.ArgumentParser()
    serve_flags.configure(parser)
    for action in parser._actions:
        if action.help is argparse.SUPPRESS:
            assert not any(f"{option} " in text for option in action.option_strings), action.option_strings
        else:
            assert action.help, action.dest
            assert all(option in text for option in action.option_strings)
    hidden = [alias for alias, name, _ in ALIASES if alias.startswith("--")]
    assert not [alias for alias in hidden if f" {alias} " in text]


def test_keys_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_API_KEY", "secret")
    assert serve.access_of(parse("m")).keys == ("secret",)
    assert serve.access_of(parse("m", "--api-key", "a")).keys == ("a",)
    monkeypatch.delenv("OCTAVO_API_KEY")
    assert serve.access_of(parse("m")).keys == ()


def test_hosts_are_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse("m", "--allowed-hosts", "a.example", "*.b.example", "*").server.allowed_hosts == (
        "a.example",
        "*.b.example",
        "*",
    )
    assert serve.access_of(parse("m", "--allowed-hosts", "a")).hosts == ("a",)
    assert serve.access_of(parse("m", "--uds", "x")).hosts == ("*",)
    for value in ("http://a.example", "a.*.example", "*a.example", "", "a,b"):
        with pytest.raises(SystemExit):
            parse("m", "--allowed-hosts", value)
        assert "host name" in capsys.readouterr().err


FLAGS = (
    "--served-model-name", "one", "two", "--api-key", "first", "--api-key", "second", "--context-length", "100",
    "--max-running-requests", "4", "--chunked-prefill-size", "16", "--disable-radix-cache", "--max-body-bytes", "4KiB",
    "--max-logprobs", "2", "--override-generation-config", '{"temperature": 0, "repetition_penalty": 1.5}',
    "--root-path", "/api", "--disable-fastapi-docs", "--enable-log-requests", "--trust-request-chat-template",
    "--allowed-origins", '["http://page"]', "--log-level", "info", "--max-tokens-policy", "clamp",
    "--no-ui",
)  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    path = tmp_path_factory.mktemp("s") / "socket"
    left_over = "import socket, sys; socket.socket(socket.AF_UNIX).bind(sys.argv[1])"  # as a killed server leaves it
    subprocess.run([sys.executable, "-c", left_over, str(path)], check=True)
    with serving(*FLAGS, "--uds", str(path)) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    transport = httpx.HTTPTransport(uds=server.url.removeprefix("unix:"))
    headers = {"Authorization": "Bearer second"}
    with httpx.Client(transport=transport, base_url="http://octavo", headers=headers, timeout=PATIENCE) as client:
        yield client


def complete(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/completions", json={"prompt": "The", "max_tokens": 12, "ignore_eos": True} | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_key_is_asked_for(client: httpx.Client) -> None:
    for key in ("", "Bearer", "Bearer third", "Bearer first second", "Basic first", "first", "Bearer \xff"):
        headers = [(b"authorization", key.encode("latin-1"))]
        for path in ("/v1/models", "/v1/completions", "/tokenize", "/nothing", "/v1/models/one"):
            answer = client.get(path, headers=headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert answer.json()["error"]["type"] == "authentication_error"
    for key in ("Bearer first", "bearer second", "Bearer  second"):
        assert client.get("/v1/models", headers={"Authorization": key}).status_code == 200
    for path in ("/health", "/metrics", "/version", "/ping"):
        assert client.get(path, headers={"Authorization": ""}).status_code == 200


def test_names(client: httpx.Client) -> None:
    assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["one", "two"]
    assert complete(client)["model"] == "one"
    assert complete(client, model="two")["model"] == "two"
    assert 'model_name="one"' in client.get("/metrics").text


def test_default_sampling_values_stand_in_for_absent_ones(client: httpx.Client) -> None:
    given = complete(client, temperature=0, repetition_penalty=1.5)["choices"]
    assert complete(client)["choices"] == given
    assert complete(client, repetition_penalty=1.0)["choices"] != given


def test_limits(client: httpx.Client, server: Server) -> None:
    assert client.get("/v1/models").json()["data"][0]["max_model_len"] == 100
    assert client.post("/v1/completions", json={"prompt": [5] * 100}).status_code == 400
    assert client.post("/tokenize", json={"prompt": "x" * 5000}).status_code == 413
    refused = client.post("/v1/completions", json={"prompt": "x", "logprobs": 3})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "logprobs")
    assert complete(client, prompt=[5] * 80, n=6)["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert "max_model_len 100" in server.said


@pytest.mark.parametrize(
    ("fields", "num_prompt", "num_answered"),
    [
        ({"prompt": [5] * 90, "max_tokens": 50}, 90, 10),
        ({"prompt": [[5] * 90, [5] * 80], "max_tokens": 15}, 170, 25),
        ({"prompt": [5] * 90, "max_tokens": 0, "echo": True}, 90, 0),
        ({"prompt": [5] * 200, "max_tokens": 30, "truncate_prompt_tokens": -1}, 70, 30),
        ({"prompt": [5] * 200, "max_tokens": 500, "truncate_prompt_tokens": -1}, 99, 1),
        ({"prompt": [5] * 200, "max_tokens": 500, "truncate_prompt_tokens": 60}, 60, 40),
    ],
)
def test_more_tokens_than_the_context_leaves(
    client: httpx.Client, fields: dict[str, Any], num_prompt: int, num_answered: int
) -> None:
    usage = complete(client, **fields)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (num_prompt, num_answered)


def test_a_conversation_that_wants_more_than_the_context_leaves(client: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "ignore_eos": True}
    for name in ("max_tokens", "max_completion_tokens"):
        answer = client.post("/v1/chat/completions", json=body | {name: 5000})
        assert answer.json()["usage"]["total_tokens"] == 100
        assert answer.json()["choices"][0]["finish_reason"] == "length"
    refused = client.post("/v1/chat/completions", json=body | {"max_tokens": 5000, "min_tokens": 99})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "min_tokens")


def test_paths(client: httpx.Client) -> None:
    assert client.get("/api/health").status_code == 200
    assert client.get("/docs").status_code == client.get("/openapi.json").status_code == 404


def test_without_the_page(client: httpx.Client) -> None:
    html = {"Accept": "text/html"}
    assert client.get("/", headers=html).text == "Ollama is running"
    assert client.get("/", headers=html | {"Authorization": ""}).status_code == 401
    for path in ("/ui/app.js", "/quantization_report"):
        assert client.get(path).status_code == 404
        assert client.get(path, headers={"Authorization": ""}).status_code == 401


def test_a_template_of_the_request_s_own(client: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "abc"}], "chat_template": "{{ messages[0].content }}{{ extra }}"}
    body |= {"chat_template_kwargs": {"extra": "def"}}
    answer = client.post("/tokenize", json=body)
    plain = client.post("/tokenize", json={"prompt": "abcdef"})
    assert answer.json()["tokens"] == plain.json()["tokens"]
    for template in (
        "{{",
        "{% for i in range(99999999) %}{% endfor %}",
        "{{ ''.__class__.__mro__ }}",
        '{{ "\\ud800" }}',
    ):
        refused = client.post("/tokenize", json=body | {"chat_template": template})
        assert refused.status_code == 400, template


def test_pages_of_other_origins(client: httpx.Client) -> None:
    answer = client.get("/v1/models", headers={"Origin": "http://page"})
    assert answer.headers["access-control-allow-origin"] == "http://page"
    assert "access-control-allow-origin" not in client.get("/v1/models", headers={"Origin": "http://other"}).headers


def test_what_is_logged_is_one_line_each_and_no_text(client: httpx.Client, server: Server) -> None:
    number = len(server.lines)
    text = "secret\nwords"
    assert complete(client, prompt=text, stop=["secret\n"], user="secret\n", request_id="secret\n")
    client.get("/nothing%0aFAKE?x=%0aFAKE", headers={"X-Forwarded-For": "FAKE"})
    wait_until(lambda: any("GET /nothing" in line for line in server.lines[number:]))
    lines = server.lines[number:]
    assert any(" /v1/completions: 1 choices, " in line for line in lines)
    assert not [line for line in lines if "secret" in line or "words" in line or line.startswith("FAKE")]
