"""Runtime: a server as a child process, which ends with the program that has started it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from octavo_server import SMALL, TINY, wait_until
from tiny_oracle import Oracle

import octavo
import octavo.lang as sgl
from octavo.own_server import ServerEndedError

FLAGS = {name.removeprefix("--").replace("-", "_"): value for name, value in zip(SMALL[::2], SMALL[1::2], strict=True)}


def is_there(pid: int) -> bool:
    """Whether it runs; nobody may have asked yet how one has ended that has lost its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def pieces_of(runtime: sgl.Runtime, prompt: str, asked: dict[str, Any]) -> str:
    return "".join([piece async for piece in runtime.async_generate(prompt, asked)])


def test_a_server_of_ones_own(oracle: Oracle) -> None:
    @sgl.function
    def program(s: sgl.ProgramState) -> None:
        s += "The list" + sgl.gen("it", max_tokens=4, temperature=0, ignore_eos=True)

    with sgl.Runtime(str(TINY), **FLAGS) as runtime:
        assert is_there(runtime.pid)
        state = program.run(backend=runtime)
        assert state["it"] == oracle.text(oracle.greedy(oracle.ids("The list"), 4))
        sgl.set_default_backend(runtime)
        assert program.run()["it"] == state["it"]
        sgl.set_default_backend(None)
        asked = {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}
        answer = json.loads(runtime.generate("The list", asked, return_logprob=True))
        assert answer["text"] == state["it"]
        assert len(answer["meta_info"]["output_token_logprobs"]) == 4
        of_ids = json.loads(runtime.generate([oracle.ids("The list")] * 2, asked))  # type: ignore[arg-type]
        assert [each["text"] for each in of_ids] == [state["it"]] * 2
        assert asyncio.run(pieces_of(runtime, "The list", asked)) == state["it"]
        with pytest.raises(sgl.BackendError, match="max_new_tokens"):
            asyncio.run(pieces_of(runtime, "a", {"max_new_tokens": -1}))
        several: list[tuple[Any, dict[str, Any]]] = [(["a", "b"], asked), ([[1], [2]], asked), ("a", asked | {"n": 2})]
        for prompt, how in several:
            with pytest.raises(ValueError, match="async_generate: one prompt and one answer at a time"):
                asyncio.run(pieces_of(runtime, prompt, how))
        assert runtime.get_tokenizer().encode("The list") == oracle.ids("The list")
        with pytest.raises(NotImplementedError, match="embed"):
            runtime.encode("a")
        with pytest.raises(sgl.BackendError, match="401"):
            sgl.RuntimeEndpoint(runtime.url, api_key="another").cache_prefix("a")
    assert not is_there(runtime.pid)


def test_it_ends_with_its_process() -> None:
    program = f"import octavo.lang as sgl; print(sgl.Runtime({str(TINY)!r}, **{FLAGS!r}).pid)"
    variables = os.environ | {"PYTHONPATH": str(Path(octavo.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", program], env=variables, stdout=subprocess.PIPE, text=True, check=True)
    pid = int(done.stdout)
    wait_until(lambda: not is_there(pid))


def test_it_ends_with_a_process_that_is_killed() -> None:
    program = f"import time, octavo.lang as sgl; r = sgl.Runtime({str(TINY)!r}, **{FLAGS!r}); print(r.pid, flush=True)"
    variables = os.environ | {"PYTHONPATH": str(Path(octavo.__file__).parent.parent)}
    command = [sys.executable, "-c", f"{program}; time.sleep(600)"]
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        assert is_there(pid)
        assert children  # the engine, and who renders templates
        process.kill()
    wait_until(lambda: not any(is_there(each) for each in (pid, *map(int, children))))


def test_a_server_that_can_not_start() -> None:
    with pytest.raises(ServerEndedError, match="no-such-flag"):
        sgl.Runtime(str(TINY), no_such_flag=True)
