"""Runtime: a server as a child process, which ends with the program that has started it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from octavo_server import SMALL, TINY, wait_until
from tiny_oracle import Oracle

import octavo
import octavo.lang as sgl
from octavo.own_server import ServerEndedError

FLAGS = {name.removeprefix("--").replace("-", "_"): value for name, value in zip(SMALL[::2], SMALL[1::2], strict=True)}


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_server_of_ones_own(oracle: Oracle) -> None:
    @sgl.function
    def program(s: sgl.ProgramState) -> None:
        s += "The list" + sgl.gen("it", max_tokens=4, temperature=0, ignore_eos=True)

    with sgl.Runtime(str(TINY), **FLAGS) as runtime:
        assert is_there(runtime.pid)
        state = program.run(backend=runtime)
        assert state["it"] == oracle.text(oracle.greedy(oracle.ids("The list"), 4))
        assert runtime.endpoint is runtime
        with pytest.raises(sgl.BackendError, match="401"):
            sgl.RuntimeEndpoint(runtime.url, api_key="another").cache_prefix("a")
    assert not is_there(runtime.pid)


def test_it_ends_with_its_process() -> None:
    program = f"import octavo.lang as sgl; print(sgl.Runtime({str(TINY)!r}, **{FLAGS!r}).pid)"
    variables = os.environ | {"PYTHONPATH": str(Path(octavo.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", program], env=variables, stdout=subprocess.PIPE, text=True, check=True)
    pid = int(done.stdout)
    wait_until(lambda: not is_there(pid))


def test_a_server_that_can_not_start() -> None:
    with pytest.raises(ServerEndedError, match="no-such-flag"):
        sgl.Runtime(str(TINY), no_such_flag=True)
