"""Compiled kernels are found again by what all of their sources say, and by nothing older."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from octavo.kernels.native.compile_cache import sources_hash

ROOM = Path(__file__).parents[2] / "kernels"
PROGRAM = "from octavo.kernels.norm.cpu import _rms_norm; _rms_norm.compile()"


def test_the_hash_is_of_every_source(tmp_path: Path) -> None:
    (tmp_path / "int8").mkdir()
    first, second = tmp_path / "tile.py", tmp_path / "int8" / "cpu.py"
    first.write_text("a = 1\n")
    second.write_text("b = 2\n")
    seen = {sources_hash(tmp_path)}
    second.write_text("b = 3\n")
    seen.add(sources_hash(tmp_path))
    second.rename(tmp_path / "cpu.py")
    seen.add(sources_hash(tmp_path))
    assert len(seen) == 3


def test_kernels_are_cached_under_that_hash(tmp_path: Path) -> None:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOM.parent / "src")}
    subprocess.run([sys.executable, "-c", PROGRAM], env=environment, check=True)
    (room,) = (tmp_path / "octavo").iterdir()
    assert room.name == f"kernels-{sources_hash(ROOM)}"
    assert list(room.rglob("*.nbc"))


RACE = """
import ctypes, sys
from pathlib import Path
import numba
import numpy as np
from numba.core.caching import IndexDataCacheFile
from octavo.kernels.native.compile_cache import c_function

def writes(value):
    def body(address):
        numba.carray(address, 1, np.int64)[0] = value
    return body

def written(compiled):
    out = ctypes.c_int64()
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address)(ctypes.addressof(out))
    return out.value

save = IndexDataCacheFile._save_data

def interrupted(file, name, data):
    IndexDataCacheFile._save_data = save
    (index,) = Path(sys.argv[1]).rglob("*.nbi")
    index.unlink()  # the other process has looked before it was there
    c_function(writes(2))
    save(file, name, data)

if len(sys.argv) > 2:
    IndexDataCacheFile._save_data = interrupted
    assert written(c_function(writes(1))) == 1
print(written(c_function(writes(1))), written(c_function(writes(2))))
"""


def test_processes_that_compile_at_once_don_t_take_each_other_s_code(tmp_path: Path) -> None:
    """Two functions of one name, of which another process compiles the second while the first is being written."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOM.parent / "src")}
    file = tmp_path / "race.py"
    file.write_text(RACE)
    for more in (["first"], []):
        command = [sys.executable, str(file), str(tmp_path), *more]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        assert done.stdout.split() == ["1", "2"]


SYMBOLS = """
import ctypes, sys
import numba
import numpy as np
from octavo.kernels.native.compile_cache import c_function

def make(value):
    steps = "\\n".join(f"    x ^= (x << 5) + (x >> {2 + i % 7}) + {i}" for i in range(400))  # too many to be inlined
    scope = {}
    exec(f"def steps(x):\\n{steps}\\n    return x + {value}", scope)
    return numba.njit(scope["steps"])

of_one, of_two = make(1), make(1000)

def one(address):
    number = numba.carray(address, 1, np.int64)
    number[0] = of_one(number[0]) + of_one(number[0] + 1)

def two(address):
    number = numba.carray(address, 1, np.int64)
    number[0] = of_two(number[0]) + of_two(number[0] + 1)

def written(compiled):
    out = ctypes.c_int64(8)
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address)(ctypes.addressof(out))
    return out.value

for name in sys.argv[1:]:
    print(written(c_function(globals()[name])))
"""


def test_functions_compiled_by_several_processes_call_their_own(tmp_path: Path) -> None:
    """Each calls what the same factory has made for it, under a symbol that must not be the other one's."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOM.parent / "src")}
    file = tmp_path / "symbols.py"
    file.write_text(SYMBOLS)

    def written(*names: str) -> list[str]:
        command = [sys.executable, str(file), *names]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()

    (one,), (two,) = written("one"), written("two")
    assert int(two) - int(one) == 2 * 999
    assert written("one", "two") == [one, two]
    assert written("two", "one") == [two, one]
