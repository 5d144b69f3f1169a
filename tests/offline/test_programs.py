"""Programs in vLLM's style, each a process of its own, as its user starts it: what they print, and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from octavo_server import PATIENCE, TINY
from tiny_oracle import Oracle

import octavo

pytestmark = pytest.mark.long

MADE = 'LLM(model=MODEL, dtype="float32", num_threads=1, num_gpu_blocks_override=512, max_model_len=256)'

BASIC = f"""
from octavo import LLM, SamplingParams

prompts = ["Hello, my name is", "The capital of France is", "The future of AI is"]
sampling_params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def main():
    llm = {MADE}
    outputs = llm.generate(prompts, sampling_params)
    for output in outputs:
        print(json.dumps([output.prompt, output.outputs[0].text]))
    pid = llm._model._engines[0].process.pid
    print(json.dumps(pid))


if __name__ == "__main__":
    main()
"""

COMMAND_LINE = """
from argparse import ArgumentParser

from octavo import LLM, EngineArgs

parser = EngineArgs.add_cli_args(ArgumentParser())
parser.set_defaults(model=MODEL)
parser.add_argument("--max-tokens", type=int)
args = vars(parser.parse_args())
max_tokens = args.pop("max_tokens")
llm = LLM(**args)
params = llm.get_default_sampling_params()
params.max_tokens = max_tokens
conversation = [{"role": "user", "content": "Hello"}]
for output in llm.chat([conversation] * 3, params, use_tqdm=True):
    print(json.dumps([output.prompt, len(output.outputs[0].token_ids)]))
raise SystemExit(3)
"""

STREAMING = """
import asyncio

from octavo import AsyncEngineArgs, AsyncLLM, RequestOutputKind, SamplingParams


async def main():
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(model=MODEL, dtype="float32", num_threads=1, num_gpu_blocks_override=512)
    )
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    try:
        async for output in engine.generate(request_id="a", prompt="Hello, my name is", sampling_params=params):
            print(json.dumps([output.outputs[0].text, output.finished]), flush=True)
            if output.finished:
                break
    finally:
        engine.shutdown()


asyncio.run(main())
"""

INTERRUPTED = f"""
from octavo import LLM, SamplingParams

llm = {MADE}
long = SamplingParams(max_tokens=None, ignore_eos=True)
print(json.dumps(os.getpid()), flush=True)
try:
    llm.generate(["Hello"] * 2000, long)
except KeyboardInterrupt:
    print(json.dumps(llm._model.fleet.num_open))
print(json.dumps(len(llm.generate("Hello", SamplingParams(max_tokens=2, ignore_eos=True))[0].outputs[0].token_ids)))
print(json.dumps("again"), flush=True)
llm.generate(["Hello"] * 1999, long)
"""


@contextmanager
def program(text: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """It runs in a session of its own, as in a terminal of its own; nothing of it is left behind."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"import json, os\nMODEL = {str(TINY)!r}\n{text}", *arguments],
        env=os.environ | {"PYTHONPATH": str(Path(octavo.__file__).parent.parent)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert members_of(process.pid) == []


def members_of(session: int) -> list[str]:
    """The command lines of all processes of a session that run."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, its = (path / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(its) == session and state != "Z":
                found.append((path / "cmdline").read_text())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def ended(process: subprocess.Popen[str]) -> tuple[list[object], str]:
    """(what it has printed, what it has said on stderr), when it has ended."""
    out, said = process.communicate(timeout=PATIENCE)
    return [json.loads(line) for line in out.splitlines()], said


def test_a_batch_of_prompts(oracle: Oracle) -> None:
    with program(BASIC) as process:
        printed, said = ended(process)
    assert process.returncode == 0, said
    *answers, pid = printed
    prompts = ["Hello, my name is", "The capital of France is", "The future of AI is"]
    assert answers == [[prompt, oracle.text(oracle.greedy(oracle.ids(prompt), 8))] for prompt in prompts]
    assert "Processed prompts: 100%" in said
    assert "Traceback" not in said
    assert not Path(f"/proc/{pid}").exists()


def test_arguments_of_a_command_line_and_conversations(oracle: Oracle) -> None:
    flags = ("--dtype", "float32", "--num-threads", "1", "--num-gpu-blocks-override", "512", "--max-tokens", "5")
    with program(COMMAND_LINE, *flags) as process:
        printed, said = ended(process)
    assert process.returncode == 3, said
    message = [{"role": "user", "content": "Hello"}]
    prompt = oracle.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert [text for text, _ in printed] == [prompt] * 3  # type: ignore[misc]
    assert "Traceback" not in said


def test_a_stream(oracle: Oracle) -> None:
    with program(STREAMING) as process:
        printed, said = ended(process)
    assert process.returncode == 0, said
    prompt = "Hello, my name is"
    assert "".join(text for text, _ in printed) == oracle.text(oracle.greedy(oracle.ids(prompt), 6))  # type: ignore[misc]
    assert printed[-1][1] is True  # type: ignore[index]
    assert said == ""


def test_ctrl_c_ends_what_runs_and_then_the_program() -> None:
    with program(INTERRUPTED) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == process.pid
        wait_for_bar(process, "2000")
        os.killpg(process.pid, signal.SIGINT)
        assert json.loads(process.stdout.readline()) == 0
        assert json.loads(process.stdout.readline()) == 2
        assert json.loads(process.stdout.readline()) == "again"
        wait_for_bar(process, "1999")
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGINT
    assert said.rstrip().endswith("KeyboardInterrupt")
    assert "octavo.runtime" not in said, said


def wait_for_bar(process: subprocess.Popen[str], total: str) -> None:
    """Until it waits for answers: the bar of so many prompts is there."""
    assert process.stderr is not None
    shown = ""
    while f"/{total} [" not in shown:
        character = process.stderr.read(1)
        assert character, shown
        shown += character


def test_a_program_that_is_killed_leaves_nothing() -> None:
    with program(INTERRUPTED) as process:
        assert process.stdout is not None
        process.stdout.readline()
        wait_for_bar(process, "2000")
        process.kill()
        process.wait(PATIENCE)
        from octavo_server import wait_until

        wait_until(lambda: not members_of(process.pid))
