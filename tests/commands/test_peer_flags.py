"""Start lines of vLLM's and SGLang's documentation: they start, or die with one line that names the flag."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from forked_commands import forked_commands
from octavo_server import PATIENCE, SMALL, TINY, forked, started

from octavo.cli import Parser
from octavo.commands import serve
from octavo.runtime.lora_config import LoraOptions
from octavo.server.lora_options import LoraModule
from octavo.server.start import flags as serve_flags
from octavo.server.start.arguments import own_arguments
from octavo.server.start.flags import ServeOptions

NAMES = [
    line.split()
    for line in (Path(__file__).parent / "peer_flags.txt").read_text().splitlines()
    if not line.startswith("#")
]
PLAUSIBLE = dict.fromkeys(("--tensor-parallel-size", "-tp", "--tp-size"), "1")
PLAUSIBLE |= dict.fromkeys(("--ep-size", "--ep", "--expert-parallel-size"), "1")  # of one rank


def parser_of_serve() -> Parser:
    parser = Parser(prog="octavo serve", allow_abbrev=False)
    serve_flags.configure(parser)
    return parser


def own_words(*arguments: str) -> tuple[list[str], list[str]]:
    return own_arguments(arguments, parser_of_serve())


def parse(*arguments: str) -> ServeOptions:
    parser = parser_of_serve()
    return serve_flags.read_options(parser.parse_intermixed_args(serve.own_words(arguments, parser)))


def refusal(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str | None:
    """The one line that it dies with, or None where it starts."""
    capsys.readouterr()
    try:
        assert parse(*arguments).model.model in ("m", None)
    except SystemExit as end:
        code = end.code
    except serve_flags.OptionsError as error:  # which the command says in the same way
        return f"octavo serve: {error}\n"
    else:
        return None
    said = capsys.readouterr().err
    assert code == 2
    assert said.endswith("\n")
    assert said.startswith("octavo serve: ")
    assert said.count("\n") == 1, said
    return said


def test_each_flag_of_both_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(NAMES) > 800
    for server, kind, *names in NAMES:
        for name in names:
            value = [] if kind == "switch" else [PLAUSIBLE.get(name, "4"), "--seed", "0"]
            line = refusal([name, *value, "m"], capsys)
            if line is not None:
                assert name in line, (server, line)
                assert "unrecognized" not in line, (server, line)
                assert len(line) > len(name) + 30, (server, line)


def test_a_switch_that_is_off_asks_for_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """vLLM's switches have a --no- form; where octavo has no such thing it is taken."""
    for name in ("--enable-tower-connector-lora", "--enable-eplb", "--language-model-only"):
        assert refusal(["m", name], capsys)
        assert refusal(["m", name.replace("--", "--no-", 1)], capsys) is None
    assert "prefilled in chunks" in (refusal(["m", "--no-enable-chunked-prefill"], capsys) or "")
    assert parse("m", "--no-enable-prefix-caching").engine.enable_prefix_caching is False
    assert parse("m", "--no-enable-sleep-mode") == parse("m")


def test_adapters_are_named_as_in_vllm_and_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["a=x/y", '{"name": "b", "path": "z", "base_model_name": "c"}']
    options = parse("m", "--enable-lora", "--max-loras", "2", "--max-cpu-loras", "5", "--lora-modules", *given)
    assert options.engine.lora == LoraOptions(enable_lora=True, max_loras=2, max_cpu_loras=5)
    assert options.lora.lora_modules == (LoraModule("a", "x/y"), LoraModule("b", "z", "c"))
    given = ["a=x/y", "z", '{"lora_name": "b", "lora_path": "z", "pinned": false}']
    options = parse("m", "--max-loras-per-batch", "2", "--max-loaded-loras", "5", "--lora-paths", *given)
    assert options.engine.lora == LoraOptions(enable_lora=True, max_loras=2, max_cpu_loras=5)
    assert options.lora.lora_modules == (LoraModule("a", "x/y"), LoraModule("z", "z"), LoraModule("b", "z"))
    assert not options.lora.enable_runtime_lora
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "True")
    assert parse("m", "--enable-lora").lora.enable_runtime_lora
    assert not parse("m").lora.enable_runtime_lora


START_LINES = [
    # vLLM's documentation: quickstart, tool calling, reasoning, structured outputs, optimization, Docker
    "m",
    "m --dtype auto --api-key token-abc123",
    "m --enable-auto-tool-choice --tool-call-parser llama3_json --chat-template t.jinja",
    "m --reasoning-parser deepseek_r1 --enable-auto-tool-choice --tool-call-parser hermes",
    "--model mistralai/Mistral-7B-v0.1 --max_model_len 16k --enable_chunked_prefill",
    "m --max-model-len auto --max-num-seqs 8 --enforce-eager",
    "m -O3 --gpu-memory-utilization 0.95 --max-num-batched-tokens 8192",
    "m -O.mode=3 --compilation-config.cudagraph_mode PIECEWISE -cc.pass_config.fuse_norm_quant=true",
    "m --compilation-config '{\"mode\":3}' --async-scheduling --no-enable-prefix-caching",
    "m --structured-outputs-config.backend guidance --seed 0 --disable-log-requests",
    "m --quantization awq --dtype half --load-format safetensors --swap-space 4",
    "m -tp 1 -pp 1 -dp 1 --distributed-executor-backend mp --trust-remote-code",
    "m -tp 2 --distributed-executor-backend uni -dpb mp",
    "m -tp 8 -dp 2 --distributed-executor-backend ray --data-parallel-backend ray",
    "m -tp 8 --enable-expert-parallel --all2all-backend pplx --expert-placement-strategy linear",
    "m -tp 8 -ep --no-enable-expert-parallel --enable-ep-weight-filter",
    "m --max-num-queued-reqs 64 --enable-prompt-tokens-details --enable-request-id-headers",
    'm --speculative-config \'{"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4}\'',
    "m --kv-offloading-size 4 --kv_offloading_backend native --kv-offloading-path d",
    "m --kv-offloading-size 0",
    "m -sc.method suffix -sc.num_speculative_tokens 32",
    "m -sc.method eagle3 -sc.model yuhuili/EAGLE3-LLaMA3.1-Instruct-8B -sc.num_speculative_tokens 2",
    # SGLang's documentation
    "--model-path m --speculative-algorithm EAGLE3 --speculative-draft-model-path h --speculative-num-steps 5",
    "--model-path m --speculative-algorithm NGRAM --speculative-num-draft-tokens 16 --cuda-graph-max-bs 8",
    "--model-path meta-llama/Meta-Llama-3-8B-Instruct --host 0.0.0.0 --port 30000",
    "--model-path m --tp 1 --dp 1 --mem-fraction-static 0.7 --chunked-prefill-size 4096",
    "--model-path m --tp 8 --ep-size 8 --moe-a2a-backend none",
    "--model-path m --tp 8 --ep 1",
    "--model-path m --attention-backend flashinfer --sampling-backend pytorch --grammar-backend xgrammar",
    "--model-path m --enable-metrics --enable-cache-report --log-requests --log-level warning",
    "--model-path m --disable-cuda-graph --skip-server-warmup --disable-radix-cache --cuda-graph-max-bs 16",
    "--model-path m --tool-call-parser qwen25 --reasoning-parser qwen3 --sampling-defaults openai",
    "--model-path m --attention-backend triton --enable-deterministic-inference",
    "--model-path m --schedule-policy lpm --max-running-requests 32 --schedule-conservativeness 1.0",
]


@pytest.mark.parametrize("line", START_LINES)
def test_a_start_line_that_is_copied_starts(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(shlex.split(line), capsys) is None


REFUSED = [
    ("m --kv-offloading-size 4 --kv-offloading-backend lmcache", "--kv-offloading-backend", "--kv-offloading-path DIR"),
    ("m --kv-transfer-config {}", "--kv-transfer-config", "--kv-offloading-path DIR"),
    ("--model-path m --enable-hierarchical-cache", "--enable-hierarchical-cache", "--kv-offloading-size GIB"),
    ("m --tensor-parallel-size many", "--tensor-parallel-size", "a whole number"),
    (
        "m --enable-lora --lora-use-virtual-experts",
        "--lora-use-virtual-experts",
        "linear layers here, and nothing else",
    ),
    ("m --pipeline-parallel-size many", "--pipeline-parallel-size", "a whole number"),
    ("m --pipeline-parallel-size 17", "--pipeline-parallel-size", "16"),
    ("m --decode-context-parallel-size 2", "--decode-context-parallel-size 2", "nothing else is divided yet"),
    ("--model-path m --attn-cp-size=2", "--attn-cp-size 2", "leave it out"),
    ("m --speculative-config.method eagle", "--speculative-config", "leave it out"),
    ("m --hf-token secret", "--hf-token", "HF_TOKEN"),
    ("m --tokenizer-mode mistral", "--tokenizer-mode mistral", "leave it out"),
    ("--model-path m --speculative-algorithm EAGLE", "--speculative-algorithm", "leave it out"),
    ("--model-path m --enable-priority-scheduling", "--enable-priority-scheduling", "--scheduling-policy priority"),
    ("--model-path m --max-total-tokens 40000", "--max-total-tokens", "--kv-cache-memory-bytes"),
    ("m --enable-prompt-embeds", "--enable-prompt-embeds", "text or token ids"),
    ("m --expert-placement-strategy round_robin", "round_robin", "in their order"),
    ("m --no-such-flag", "--no-such-flag", "--help"),
]


@pytest.mark.parametrize(("line", "flag", "advice"), REFUSED)
def test_a_start_line_that_is_copied_dies_in_one_line(
    line: str, flag: str, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(line.split(), capsys) or ""
    assert flag in said
    assert advice in said
    assert "secret" not in said


def test_what_changes_nothing_is_told() -> None:
    words, said = own_words("--enable-chunked-prefill", "m", "-O3", "--dcp-size=1", "--port", "1")
    assert words == ["m", "--port", "1"]
    assert [line.split()[0] for line in said] == ["--enable-chunked-prefill", "-O", "--dcp-size"]
    assert all(" changes nothing: " in line for line in said)


def test_parts_of_a_flag_s_object() -> None:
    options = parse("m", "--structured_outputs_config.disable_any_whitespace=true", "--max_num_seqs", "3")
    assert options.text.structured_outputs_config.disable_any_whitespace is True
    assert options.engine.max_num_seqs == 3
    options = parse("m", "--override-generation-config.temperature", "0.5", "--override-generation-config.top_k", "3")
    assert options.text.override_generation_config == {"temperature": 0.5, "top_k": 3}


def test_lengths_as_people_write_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse("m", "--max-model-len", "32k").engine.max_model_len == 32000
    assert parse("m", "--max-model-len", "32K").engine.max_model_len == 32768
    assert parse("m", "--max-model-len", "25.6k").engine.max_model_len == 25600
    assert parse("m", "--max-model-len", "auto") == parse("m")
    for wrong in ("0", "1.5", "k", "3X", "0.0001k"):
        assert "--max-model-len" in (refusal(["m", "--max-model-len", wrong], capsys) or "")


CONFIG = """
# as in vLLM's documentation
model: some/model
port: 6398
uvicorn-log-level: "info"
served_model_name: [one, two]
enforce-eager: true
enable-prefix-caching: false
enable-log-requests: false
disable-fastapi-docs: null
override-generation-config:
  temperature: 0.25
tensor-parallel-size: 1
pipeline-parallel-size: 1
enable-chunked-prefill: true
enable-eplb: false
"""


def test_a_file_of_flags(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG)
    expected = parse(
        "--model", "some/model", "--port", "6398", "--log-level", "info", "--served-model-name", "one", "two",
        "--enforce-eager", "--no-enable-prefix-caching", "--override-generation-config", '{"temperature": 0.25}',
    )  # fmt: skip
    assert parse("--config", str(file)) == expected
    _, said = own_words("--config", str(file))
    assert [line.split(" changes nothing")[0] for line in said] == [
        "--enable-chunked-prefill",
        "--no-enable-eplb",
    ]
    options = parse(
        "mine", f"--config={file}", "--port", "1", "--served-model-name", "three", "--enable-prefix-caching"
    )
    assert (options.model.model, options.model.model_flag) == ("mine", None)  # the command line wins
    assert options.listen.port == 1
    assert options.model.served_model_name == ("three",)
    assert options.engine.enable_prefix_caching is True
    assert options.engine.enforce_eager is True


def test_lists_and_objects_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "model: m\nmodel-aliases: {a: b, c: b}\n"
        "lora-modules:\n- one=/adapters/one\n- {name: two, path: /adapters/two}\n"
    )
    options = parse("--config", str(file))
    assert options.model.model_aliases == {"a": "b", "c": "b"}
    assert options.lora.lora_modules == (LoraModule("one", "/adapters/one"), LoraModule("two", "/adapters/two"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot: 1", "'prot' is no option of octavo serve; did you mean 'port'?"),
        ("max_model_length: 64", "'max-model-length' is no option of octavo serve; did you mean 'max-model-len'?"),
        ("banana: 1", "'banana' is no option of octavo serve; octavo serve --help lists them"),
        ("port: 1\nseed: 0\nport: 2", "'port' stands there twice"),
        ("max-model-len: 64\nmax_model_len: 65", "'max-model-len' stands there twice"),
        ("port: x", "--port"),
        ("- port", "YAML of options"),
        ("port: [", "is not YAML"),
        ("enable-eplb: true", "--enable-eplb"),
        ("config: other.yaml", "'config'"),
        ("help: true", "'help'"),
    ],
)
def test_a_file_that_is_wrong(text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert words in (refusal(["m", "--config", str(file)], capsys) or "")


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "No such file" in (refusal(["m", "--config", "nowhere.yaml"], capsys) or "")
    assert "missing" in (refusal(["m", "--config"], capsys) or "")
    assert "twice" in (refusal(["m", "--config", "a", "--config", "b"], capsys) or "")


def test_a_download_dir_holds_snapshots(tmp_path: Path) -> None:
    commit = "0" * 40
    repository = tmp_path / "models--owner--name"
    shutil.copytree(TINY, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    flags = (*SMALL, "--download-dir", str(tmp_path), "--served-model-name", "x")
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "other")}
    with started(*flags, model=Path("owner/name"), environment=environment) as server:
        server.wait_until_ready()
        with server.client() as client:
            assert client.get("/v1/models").json()["data"][0]["id"] == "x"


def test_a_whole_start(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({"served-model-name": "named", "compilation-config": {"mode": 3}}))
    with forked(*SMALL, "--config", str(file), "--enable-auto-tool-choice", "--max_num_seqs", "8") as server:
        server.wait_until_ready()
        assert "octavo serve: --enable-auto-tool-choice changes nothing" in server.said
        assert "octavo serve: --compilation-config" in server.said
        with server.client() as client:
            assert client.get("/v1/models").json()["data"][0]["id"] == "named"
    result = forked_commands().run("serve", TINY, "--enable-eplb", seconds=PATIENCE)
    assert result.code == 2
    assert result.stderr.startswith("octavo serve: --enable-eplb: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_the_table_lists_no_flag_of_octavo_s_own_as_refused() -> None:
    from octavo.server.start.peer_flags import TABLE

    parser = argparse.ArgumentParser()
    serve_flags.configure(parser)
    own = {name for action in parser._actions for name in action.option_strings}
    refused = {name for row in TABLE if not row.accepted for name in row.names.split()}
    assert not own & refused
