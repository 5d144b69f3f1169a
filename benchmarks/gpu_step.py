"""The engine on a GPU with random weights: milliseconds of a decode step, and tokens/s with many streams.

    PYTHONPATH=src python -m benchmarks.gpu_step [--model llama-3.1-8b] [--dtype fp8] [--kv-cache-dtype fp8_e4m3]
    PYTHONPATH=src python -m benchmarks.gpu_step --apart           beside it, in turns: no kernel starts early
    PYTHONPATH=src python -m benchmarks.gpu_step --rehearse        without a GPU: a model of two small layers

A step's time is that of `forward`, through its CUDA graph where there is one, and of a greedy choice behind it, on
sequences that are made up: caches hold whatever they hold, lengths are all the same. Beside it stand the limit, bytes
over 3.0 TB/s, and the goal, where there is one. What the cache has no room for is named. tokens/s are those of
`Engine.step` from the first prompt on, prefill and host time included: 256 requests of 1000 / 1000 and 128 / 128
tokens, all at once, no prefix shared. Needs what octavo's engine needs beside torch and Triton: msgspec, safetensors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from benchmarks import shapes
from benchmarks.gpu_clock import environment, one_line
from torch import Tensor

from octavo.kernels.attention.step import StepInputs
from octavo.kernels.launching import launch
from octavo.runtime.config import EngineConfig
from octavo.runtime.engine import Engine
from octavo.runtime.messages import AddRequest, SamplingParams
from octavo.runtime.startup import load_engine
from octavo.runtime.worker.graphs import StepGraphs

LIMIT = 3.0e12  # bytes/s
GOALS = {
    ("llama-3.1-8b", "fp8", 1, 1024): 3.6,
    ("llama-3.1-8b", "fp8", 32, 1024): 4.8,
    ("llama-3.1-8b", "int4", 1, 1024): 2.4,
}
"""Milliseconds of a decode step on an H100, by model, weights, sequences and context, the cache in fp8."""
WEIGHTS = {"auto": "bf16", "bfloat16": "bf16", "fp8": "fp8", "int8": "int8", "int4": "int4"}
KV = {"auto": "bf16", "bfloat16": "bf16", "fp8_e4m3": "fp8", "int8": "fp8"}


def main() -> int:
    args = parse_arguments()
    config = shapes.shrunk(shapes.CONFIGS[args.model]) if args.rehearse else shapes.CONFIGS[args.model]
    with tempfile.TemporaryDirectory() as folder:
        directory = shapes.write_config(config, Path(folder) / args.model)
        engine, ready = load_engine(engine_config(args, directory), time.time())
    lines = [
        f"# Decode steps of {args.model}, {args.dtype}, {args.kv_cache_dtype} cache, {date.today().isoformat()}",
        "",
    ]
    lines += [
        "| context | batch | forward, ms | apart, ms | difference | argmax, ms | limit, ms | of the limit | tok/s | "
        "goal, ms |",
        "|---" * 10 + "|",
    ]
    graphs = graphs_apart(engine, args) if args.apart else None
    records: list[dict[str, Any]] = []
    for context in args.contexts:
        for batch in args.batches:
            record = measure_step(engine, graphs, config, args, batch, context)
            records.append(record)
            lines.append(row_of(record))
            print(lines[-1], flush=True)
    lines += ["", "| streams | prompt / answer | tok/s out | tok/s in and out | seconds |", "|---" * 5 + "|"]
    for prompt, answer in args.loads:
        record = measure_load(engine, args, prompt, answer)
        records.append(record)
        lines.append(
            f"| {args.streams} | {prompt} / {answer} | {record['out']:.0f} | {record['all']:.0f} | "
            f"{record['seconds']:.1f} |"
        )
        print(lines[-1], flush=True)
    facts = {**environment(), "start, s": ready.report.seconds, "notes": ready.report.notes}
    lines += ["", *(f"- {key}: {value}" for key, value in facts.items())]
    print("\n".join(lines))
    if args.output and not args.rehearse:
        args.output.mkdir(parents=True, exist_ok=True)
        path = args.output / f"gpu_step-{args.model}-{args.dtype}-{args.kv_cache_dtype}-{date.today().isoformat()}.md"
        path.write_text("\n".join(lines) + "\n")
        about = {"model": args.model, "weights": WEIGHTS[args.dtype], "kv": KV[args.kv_cache_dtype]}
        path.with_suffix(".json").write_text(json.dumps({**about, "facts": facts, "records": records}, indent=1) + "\n")
    return 1 if any("failure" in record for record in records) else 0


def parse_arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(word) for word in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=shapes.CONFIGS, default="llama-3.1-8b")
    parser.add_argument("--dtype", choices=WEIGHTS, default="fp8")
    parser.add_argument("--kv-cache-dtype", choices=KV, default="fp8_e4m3")
    parser.add_argument("--batches", type=numbers, default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--contexts", type=numbers, default=[1024, 4096])
    parser.add_argument(
        "--loads", type=lambda t: [tuple(numbers(p)) for p in t.split(";")], default=[(1000, 1000), (128, 128)]
    )
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")
    parser.add_argument(
        "--apart",
        action="store_true",
        help="time each step also with kernels that start when the one before has ended",
    )
    parser.add_argument("--rehearse", action="store_true", help="a tiny model on whatever device there is")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the tables")
    args = parser.parse_args()
    if args.rehearse:
        args.batches, args.contexts, args.loads, args.streams, args.max_model_len = [1, 3], [40], [(20, 6)], 3, 64
    return args


def engine_config(args: argparse.Namespace, directory: Path) -> EngineConfig:
    more: dict[str, Any] = {"num_blocks": 64, "num_threads": 1} if args.rehearse else {}
    return EngineConfig(
        model=str(directory),
        load_format="dummy",
        dtype=args.dtype,
        kv_cache_dtype=args.kv_cache_dtype,
        max_model_len=args.max_model_len,
        max_num_seqs=args.streams,
        enforce_eager=args.enforce_eager,
        **more,
    )


class NoRoomError(Exception):
    """The cache doesn't hold what is to be measured."""


def decode_inputs(engine: Engine, batch: int, context: int) -> StepInputs:
    """A decode step of sequences of `context` tokens, this step's own among them, on the CPU. Raises NoRoomError."""
    cache = engine.worker.caches[0]
    size, blocks = cache.block_size, -(-context // cache.block_size)
    if batch * blocks > cache.key.shape[0]:
        raise NoRoomError(f"no room: {batch * blocks} blocks, and the cache has {cache.key.shape[0]}")
    table = torch.randperm(cache.key.shape[0])[: batch * blocks].reshape(batch, blocks)
    token_ids = torch.randint(engine.worker.model.vocab_size, (batch,))
    return StepInputs.decode([context] * batch, size, token_ids=token_ids, tables=table)


def milliseconds(runs: list[Callable[[], object]], device: torch.device, rounds: int = 20) -> list[float]:
    """The medians, in turns, on an empty device each time: what a step costs that waits for its tokens."""
    times: list[list[float]] = [[] for _ in runs]
    for number in range(rounds + 3):
        for run, own in zip(runs, times, strict=True):
            begin = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 3:
                own.append(time.perf_counter() - begin)
    return [1e3 * statistics.median(own) for own in times]


@contextmanager
def apart(engine: Engine, graphs: StepGraphs | None) -> Iterator[None]:
    """Meanwhile no kernel overlaps the one before it: steps through graphs that hold none, and launches."""
    kept = engine.worker.graphs
    engine.worker.graphs = graphs
    try:
        with patch.object(launch, "OVERLAPS_FROM", sys.maxsize):
            yield
    finally:
        engine.worker.graphs = kept


def graphs_apart(engine: Engine, args: argparse.Namespace) -> StepGraphs | None:
    """The engine's graphs once more, if it has any, of kernels that don't overlap."""
    if engine.worker.graphs is None:
        return None
    with apart(engine, None):
        return StepGraphs(engine.worker.model, engine.worker.caches, args.streams, args.max_model_len)


@torch.inference_mode()
def measure_step(
    engine: Engine,
    graphs: StepGraphs | None,
    config: shapes.Config,
    args: argparse.Namespace,
    batch: int,
    context: int,
) -> dict[str, Any]:
    """With --apart through graphs of kernels that don't overlap too, and by how much its logits differ at the most."""
    record: dict[str, Any] = {"batch": batch, "context": context}
    try:
        inputs, device = decode_inputs(engine, batch, context), engine.worker.model.device
        logits = engine.worker.forward(inputs).clone()
        if not bool(logits.isfinite().all()):
            raise ValueError("logits that aren't finite")

        def step_apart() -> Tensor:
            with apart(engine, graphs):
                return engine.worker.forward(inputs)

        runs: list[Callable[[], object]] = [lambda: engine.worker.forward(inputs)]
        if args.apart:
            record["difference"] = (step_apart() - logits).abs().max().item()
            runs.append(step_apart)
        record |= zip(("forward", "apart"), milliseconds(runs, device), strict=False)
        (record["sampling"],) = milliseconds([lambda: logits.argmax(1).tolist()], device)
        record["limit"] = (
            1e3 * shapes.step_bytes(config, WEIGHTS[args.dtype], KV[args.kv_cache_dtype], batch, context) / LIMIT
        )
        if KV[args.kv_cache_dtype] == "fp8" and not args.rehearse:
            record["goal"] = GOALS.get((args.model, WEIGHTS[args.dtype], batch, context))
    except NoRoomError as error:
        record["left out"] = str(error)
    except Exception as error:
        record["failure"] = one_line(error)
    return record


def row_of(record: dict[str, Any]) -> str:
    head = f"| {record['context']} | {record['batch']} |"
    if "failure" in record or "left out" in record:
        said = record.get("left out") or f"**{record['failure']}**"
        return f"{head} {said} | | | | | | | |"
    compared = f"{record['apart']:.2f} | {record['difference']:.1e}" if "apart" in record else " | "
    whole, goal = record["forward"] + record["sampling"], record.get("goal")
    reached = f"{goal} {'reached' if whole <= goal else 'missed'}" if goal else ""
    return (
        f"{head} {record['forward']:.2f} | {compared} | {record['sampling']:.2f} | {record['limit']:.2f} | "
        f"{record['limit'] / record['forward']:.0%} | {1e3 * record['batch'] / whole:.0f} | {reached} |"
    )


def measure_load(engine: Engine, args: argparse.Namespace, prompt: int, answer: int) -> dict[str, Any]:
    """All streams at once through `Engine.step`, greedy, to the last token of the last answer."""
    engine.scheduler.reset_prefix_cache()
    params, vocab = SamplingParams(max_tokens=answer, temperature=0.0), engine.worker.model.vocab_size
    for i in range(args.streams):
        ids = [(1 + i * 7919 + j * 104729) % vocab for j in range(prompt)]
        refused = engine.add(AddRequest(f"{prompt}-{i}", ids, params, 0.0))
        if refused:
            return {"failure": refused[0].error, "out": 0.0, "all": 0.0, "seconds": 0.0}
    begin, tokens = time.perf_counter(), 0
    while engine.has_work:
        tokens += sum(len(output.token_ids) for output in engine.step())
    seconds = time.perf_counter() - begin
    record = {"prompt": prompt, "answer": answer, "streams": args.streams, "tokens": tokens, "seconds": seconds}
    return record | {"out": tokens / seconds, "all": (tokens + args.streams * prompt) / seconds}


if __name__ == "__main__":
    sys.exit(main())
