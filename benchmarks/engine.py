"""Tokens per second of the engine alone, without HTTP: through its socket, and by part of a step.

    python benchmarks/engine.py MODEL [--streams 1,8,32] [--tokens 128] [--prompt 32] [--temperature 0.8 --top-p 0.9]

For each number of streams one line: tokens/s of the engine process over its socket; then, of the same steps run in
this process, the median milliseconds of each part of a decode step. 'model' is the forward pass; all others are the
engine's own overhead, whose sum is the last column.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator

import msgspec
import torch
import zmq

from octavo.runtime.config import EngineConfig
from octavo.runtime.engine import Engine
from octavo.runtime.launch import start_engine
from octavo.runtime.messages import AddRequest, Failed, FromEngine, Ready, SamplingParams, StepOutputs
from octavo.runtime.parallel.order import make_order
from octavo.runtime.startup import load_engine
from octavo.runtime.worker.step_inputs import with_tokens

PARTS = ("plan", "order", "model", "sample", "commit", "encode")


def main() -> None:
    arguments = parse_arguments()
    streams = [int(count) for count in arguments.streams.split(",")]
    config = EngineConfig(model=arguments.model, dtype=arguments.dtype, num_threads=arguments.threads)
    params = SamplingParams(
        max_tokens=arguments.tokens, temperature=arguments.temperature, top_p=arguments.top_p, top_k=arguments.top_k
    )
    rates = dict(over_socket(config, params, streams, arguments.prompt))
    engine, _ = load_engine(config, time.time())
    print(f"{'streams':>7} {'tok/s':>7}   ms per decode step: " + " ".join(f"{part:>7}" for part in PARTS), "overhead")
    for count in streams:
        parts = by_part(engine, requests(count, params, arguments.prompt))
        own = sum(parts[part] for part in PARTS if part != "model")
        columns = " ".join(f"{parts[part]:7.3f}" for part in PARTS)
        print(f"{count:7d} {rates[count]:7.0f}   {'':20}{columns}  {own:7.3f}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer (default 128)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt (default 32)")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--threads", type=int)
    return parser.parse_args()


def requests(count: int, params: SamplingParams, prompt: int) -> list[AddRequest]:
    """Prompts that share nothing, so that every one is computed."""
    return [
        AddRequest(f"{time.monotonic_ns()}-{i}", [100 + (i * 37 + j * 11) % 900 for j in range(prompt)], params, 0.0)
        for i in range(count)
    ]


def over_socket(
    config: EngineConfig, params: SamplingParams, streams: list[int], prompt: int
) -> Iterator[tuple[int, float]]:
    """(streams, generated tokens per second), after one unmeasured request."""
    engine = start_engine(config)
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.bind(engine.address)
    decoder = msgspec.msgpack.Decoder(FromEngine)
    try:
        ready = decoder.decode(socket.recv())
        if isinstance(ready, Failed):
            raise SystemExit(ready.message)
        assert isinstance(ready, Ready)
        print("start:", ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in ready.report.seconds.items()))
        for count in [1, *streams]:
            begin, num_tokens, left = time.perf_counter(), 0, count
            for request in requests(count, params, prompt):
                socket.send(msgspec.msgpack.encode(request))
            while left:
                message = decoder.decode(socket.recv())
                assert isinstance(message, StepOutputs)
                num_tokens += sum(len(output.token_ids) for output in message.outputs)
                left -= sum(output.finish_reason is not None for output in message.outputs)
            yield count, num_tokens / (time.perf_counter() - begin)
    finally:
        engine.close()
        socket.close(linger=0)
        context.term()


@torch.inference_mode()
def by_part(engine: Engine, work: list[AddRequest]) -> dict[str, float]:
    """Engine.step, taken apart: median milliseconds of each part over the steps in which all streams decode.

    Here each part waits for the one before it; in the engine 'plan', 'order', 'commit' and 'encode' belong to the
    thread that plans while a step is computed.
    """
    encoder = msgspec.msgpack.Encoder()
    scheduler = engine.scheduler
    sampler = engine.executor.sampler
    scheduler.reset_prefix_cache()
    for request in work:
        engine.add(request)
    seconds: dict[str, list[float]] = {part: [] for part in PARTS}
    while scheduler.has_work:
        marks = [time.perf_counter()]
        plan = scheduler.plan()
        marks.append(time.perf_counter())
        order = make_order(plan, 0)
        inputs = engine.worker.prepare(order)
        marks.append(time.perf_counter())
        order.fill_tokens(sampler.last_tokens)
        logits = engine.worker.forward(with_tokens(inputs, order))
        marks.append(time.perf_counter())
        result = sampler.sample(logits, plan)
        marks.append(time.perf_counter())
        outputs = scheduler.commit(plan, result)
        marks.append(time.perf_counter())
        encoder.encode(StepOutputs(outputs, scheduler.stats()))
        marks.append(time.perf_counter())
        if plan.num_tokens == len(plan.scheduled) == len(work):
            for i, part in enumerate(PARTS):
                seconds[part].append(marks[i + 1] - marks[i])
    return {part: statistics.median(values) * 1000 for part, values in seconds.items()}


if __name__ == "__main__":
    main()
