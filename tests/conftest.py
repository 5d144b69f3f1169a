"""Fixtures that every room's tests share: tiny checkpoints that other tools wrote, with the logits they compute."""

from __future__ import annotations

import gc
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from octavo.collector import uncollected
from octavo.kernels.native.environment import ENVIRONMENT

if TYPE_CHECKING:
    import torch
    from ranks import Ranks

# Before any test imports torch: as octavo's own processes have it, or a second busy process makes the suite crawl.
os.environ.update({**ENVIRONMENT, **os.environ})
# Before any test imports `datasets`: what it converts does not stay in the cache of whoever runs the tests.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="octavo-datasets-")
HAS_GPU = Path("/dev/nvidiactl").exists()
if not HAS_GPU:  # before any test imports a Triton kernel
    os.environ["TRITON_INTERPRET"] = "1"

# The same random cases in each run; --hypothesis-profile=slow draws ten times as many, and others each time.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.register_profile("slow", deadline=None, max_examples=1000)
settings.load_profile("suite")

FIXTURES = Path(__file__).parent / "fixtures"


def pytest_configure(config: pytest.Config) -> None:
    """A shell starts what it puts in the background with SIGINT ignored, and every child would inherit that."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # our own order, see _begin_with_long_files
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Test files are imported, a million objects, which no garbage collection walks through, now or later."""
    with uncollected():
        return (yield)


@pytest.fixture(scope="module", autouse=True)
def _frozen_heap() -> Iterator[None]:
    """Nor through what the tests of other files have left: what a file leaves open is found at its own end.

    All of that took an eighth of the suite's time, and began each of octavo bench's loads with seconds of it.
    """
    yield
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Or Triton's bindings, which look as the process ends whether all of theirs is gone, print what isn't."""
    gc.unfreeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where there is a GPU, what runs Triton kernels runs on it, with `-m cuda`; elsewhere it is interpreted.

    What is slow runs where that word is said: real models have to be fetched. What is marked `cuda` needs a GPU.
    """
    for item in items:
        if HAS_GPU and ("gpu" in item.path.stem or "device" in getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.cuda)
    unasked = [] if "slow" in config.option.markexpr else ["slow"]
    unasked += [] if HAS_GPU else ["cuda"]
    left_out = [item for item in items if any(item.get_closest_marker(mark) for mark in unasked)]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)
    _begin_with_long_files(items)


class _Rotated(pytest.Dir):
    """A directory whose files each of several workers begins at another place.

    The first who imports a test file compiles it for all: half of what importing all of them takes. Workers that went
    in the same order would all compile the same file at the same time.
    """

    def collect(self) -> list[pytest.Item | pytest.Collector]:
        found = list(super().collect())
        worker = self.config.workerinput  # type: ignore[attr-defined]
        begin = len(found) * int(worker["workerid"].removeprefix("gw")) // worker["workercount"]
        return found[begin:] + found[:begin]


@pytest.hookimpl(tryfirst=True)
def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """All workers sort what they found alike, see _begin_with_long_files."""
    return _Rotated.from_parent(parent, path=path) if hasattr(parent.config, "workerinput") else None


def _begin_with_long_files(items: list[pytest.Item]) -> None:
    """`--dist loadfile` hands files out in this order. A long one that came last would run while others wait for it."""
    long = {item.path for item in items if item.get_closest_marker("long")}
    sizes = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in long, -sizes[item.path], item.path))


@pytest.fixture(scope="session", autouse=True)
def _spare_interpreter() -> None:
    """Half of what Triton's interpreter does changes nothing. Whoever runs a kernel has imported Triton by now."""
    if not HAS_GPU and "triton" in sys.modules:
        from interpreter import spare

        spare()


@pytest.fixture(autouse=True)
def _one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """What is interpreted is compared with torch's operators on small tensors, whose threads would wait for each other;
    and the models of calibration, formats and the runtime are as small.

    Beside another busy process the former takes half as long again, the latter a quarter to a third. Tests of octavo's
    own kernels on the CPU keep all threads.
    """
    small = {"calibration", "quant", "runtime"}
    is_small = "gpu" in request.path.stem or not small.isdisjoint(request.path.parts)
    if HAS_GPU or not is_small or "torch" not in sys.modules:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The directory of tiny checkpoints; its README says who wrote which, and how."""
    return FIXTURES


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes that are ranks of a group, for all tests that ask."""
    from ranks import Ranks

    started = Ranks()
    yield started
    started.close()


@pytest.fixture
def device() -> torch.device:
    """Tensors of kernels that are written in Triton lie here: on the GPU when there is one, else in the interpreter."""
    import torch

    return torch.device("cpu" if "TRITON_INTERPRET" in os.environ else "cuda")
