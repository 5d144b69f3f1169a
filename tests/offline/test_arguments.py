"""Keyword arguments of LLM: those of `octavo serve` by vLLM's names; what changes nothing, and what is refused."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import octavo
from octavo.offline.arguments import EngineArgs, options_of
from octavo.server.options import StructuredOutputsConfig


def test_arguments_are_the_options_of_a_server() -> None:
    options, notes = options_of(
        "M",
        {
            "dtype": torch.float16,
            "quantization": "int8",
            "tensor_parallel_size": 2,
            "max_model_len": 2048,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 512,
            "gpu_memory_utilization": 0.5,
            "enable_prefix_caching": False,
            "enforce_eager": True,
            "seed": 3,
            "trust_remote_code": True,
            "kv_cache_dtype": "fp8",
            "generation_config": "vllm",
            "override_generation_config": {"top_k": 3},
            "structured_outputs_config": {"disable_any_whitespace": True},
            "max_logprobs": -1,
            "tokenizer": "T",
            "revision": None,
            "disable_log_stats": True,
        },
    )
    engine = options.engine
    assert notes == []
    assert (options.model.model_flag, options.model.tokenizer, options.model.quantization) == ("M", "T", "int8")
    assert (engine.dtype, engine.max_model_len, engine.max_num_seqs, engine.seed) == ("float16", 2048, 8, 3)
    assert (engine.max_num_batched_tokens, engine.gpu_memory_utilization) == (512, 0.5)
    assert (engine.enable_prefix_caching, engine.enforce_eager, engine.trust_remote_code) == (False, True, True)
    assert (engine.kv_cache_dtype, engine.parallel.tensor_parallel_size) == ("fp8_e4m3", 2)
    assert options.text.override_generation_config == {"top_k": 3}
    assert options.text.structured_outputs_config == StructuredOutputsConfig(disable_any_whitespace=True)
    assert options.text.max_logprobs == -1
    assert options.text.trust_request_chat_template


def test_what_changes_nothing_is_told() -> None:
    given: dict[str, Any] = {"swap_space": 4, "enable_chunked_prefill": True, "cpu_offload_gb": 0, "hf_overrides": {}}
    given |= {"compilation_config": {"level": 3}, "tokenizer_mode": "auto", "disable_custom_all_reduce": True}
    options, notes = options_of("M", given)
    assert options.engine == options_of("M", {})[0].engine
    assert [note.split()[0] for note in notes] == list(given)
    assert all("changes nothing" in note for note in notes)
    assert not any("--" in note for note in notes)


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        ({"lora_modules": ["a=b"]}, ValueError, "LLM: lora_modules: a LoRARequest names the adapter and its directory"),
        ({"max_loras": 0}, ValueError, "LLM: argument max_loras: '0' is not a whole number"),
        ({"speculative_config": {"method": "eagle"}}, ValueError, "method 'eagle': drafts are made by ngram, suffix"),
        ({"port": 80}, ValueError, "LLM: port: there is no server"),
        ({"api_key": "a"}, ValueError, "LLM: api_key: there is no server"),
        ({"headless": True}, ValueError, "LLM: headless: there is no server"),
        ({"max_modl_len": 5}, TypeError, "LLM has no argument 'max_modl_len'"),
        ({"max_model_len": 0}, ValueError, "argument max_model_len: '0' is not a whole number"),
        ({"dtype": "int3"}, ValueError, "LLM: argument dtype: invalid choice: 'int3'"),
        ({"gpu_memory_utilization": 1.5}, ValueError, "'1.5' is not a number above 0"),
    ],
)
def test_what_can_not_be_is_refused_by_name(given: dict[str, Any], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=re.escape(said)):
        options_of("M", given)


def test_a_command_line_gives_arguments() -> None:
    parser = argparse.ArgumentParser()
    group = parser.add_argument_group("engine")
    EngineArgs.add_cli_args(group)
    group.set_defaults(model="M")
    words = ["--max-model-len", "4k", "--enforce-eager", "-tp", "2", "--num-gpu-blocks-override", "9"]
    words += ["--structured-outputs-config", '{"disable_any_whitespace": true}', "--no-enable-prefix-caching"]
    args = EngineArgs.from_cli_args(parser.parse_args(words))
    options, notes = options_of(args.model, args.options)
    assert (args.model, notes) == ("M", [])
    assert (options.engine.max_model_len, options.engine.enforce_eager, options.engine.num_blocks) == (4000, True, 9)
    assert (options.engine.parallel.tensor_parallel_size, options.engine.enable_prefix_caching) == (2, False)
    assert options.text.structured_outputs_config.disable_any_whitespace
    assert parser.parse_args(["--model", "N"]).model == "N"
    assert options_of("M", {"kv_events_config": msgspec.structs.replace(options.engine.kv_events_config)})[1] == []


def test_importing_octavo_imports_nothing_of_it() -> None:
    """Each process of a server does that first; a program that names SamplingParams gets no more than that."""
    program = (
        "import sys, octavo\n"
        "own = {name for name in sys.modules if name.startswith('octavo')}\n"
        "assert own == {'octavo', 'octavo.version'}, own\n"
        "octavo.SamplingParams, octavo.RequestOutput, octavo.TextPrompt\n"
        "heavy = {'torch', 'fastapi', 'pydantic', 'numpy', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "octavo.LLM\n"
        "heavy = {'torch', 'transformers', 'numba'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "for name in octavo.__all__: getattr(octavo, name)\n"
    )
    source = Path(octavo.__file__).parent.parent
    subprocess.run([sys.executable, "-c", program], check=True, cwd=source)
