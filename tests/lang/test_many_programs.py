"""Ten thousand programs in one process: what they take in memory. `-s` prints it. Marked slow: half a minute."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from octavo_server import Server

import octavo

pytestmark = pytest.mark.slow

COUNT = 10_000
MOST = 1 << 30  # bytes, of which 10,000 programs must not need more
PROGRAM = """
import json, re, resource, sys, time
from pathlib import Path
import octavo.lang as sgl

@sgl.function
def straight(s, index):
    s += f"Number {index}" + sgl.gen("it", max_tokens=1)

@sgl.function
def waiting(s, index):
    s += f"Number {index}" + sgl.gen("it", max_tokens=1)
    s += s["it"] + "!"

def peak():  # of this program alone; getrusage counts what had forked it too
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

program = {"straight": straight, "waiting": waiting}[sys.argv[2]]
backend = sgl.RuntimeEndpoint(sys.argv[1])
before = peak()
begin = time.perf_counter()
states = program.run_batch([{"index": index} for index in range(int(sys.argv[3]))], backend=backend)
seconds = time.perf_counter() - begin
usage = resource.getrusage(resource.RUSAGE_SELF)
assert all(isinstance(state["it"], str) for state in states)
print(json.dumps({"programs": len(states), "peak_bytes": peak(), "before_bytes": before,
    "seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime}))
"""


@pytest.mark.parametrize("kind", ["straight", "waiting"])
def test_their_memory(server: Server, kind: str) -> None:
    variables = os.environ | {"PYTHONPATH": str(Path(octavo.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, server.url, kind, str(COUNT)],
        env=variables,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    print(kind, found)
    assert found["programs"] == COUNT
    assert found["before_bytes"] < found["peak_bytes"] < MOST
