"""Starts those who share a calibration's samples with this process: on this machine, or on a Ray cluster's nodes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING

import msgspec
import torch

from octavo.calibration.layers import QuantizeError
from octavo.calibration.team import ALONE, Team
from octavo.jobs.calibration_member import Member, MemberStart
from octavo.jobs.calibration_worker import WorkerStart
from octavo.jobs.quantize_job import Backend, Device
from octavo.runtime.launch import child_environment
from octavo.runtime.parallel.follower_process import ChildProcess, share_of_cores
from octavo.runtime.parallel.group import Shared
from octavo.runtime.parallel.placement import VISIBLE, find_devices
from octavo.runtime.worker.device import set_threads

if TYPE_CHECKING:
    from torch import Tensor

    from octavo.calibration.prepare import Calibration, Prepared
    from octavo.calibration.workspace import Workspace


def check_workers(calibration: Calibration, backend: Backend) -> None:
    """Raise QuantizeError for more workers than can share the samples, or than there are places for."""
    size = calibration.num_workers
    shape = calibration.shape(calibration.token_ids)
    batches = -(-shape.num_samples // shape.batch)
    if size > batches:
        raise QuantizeError(
            f"--calibration-workers {size}: {shape.num_samples} samples of {shape.seq_len} tokens are {batches} "
            "batches, which no more workers can share"
        )
    if backend == "ray":
        from octavo.jobs.calibration_on_ray import check_cluster

        check_cluster()
    elif calibration.runner.device.type == "cuda" and size > (count := len(find_devices("cuda").gpus)):
        raise QuantizeError(f"--calibration-workers {size}: this machine has {count} GPUs, and each worker takes one")


def gather_team(
    prepared: Prepared, backend: Backend, device: Device, max_length: int, work: Workspace
) -> AbstractContextManager[Team]:
    """This process as the first member, and the others beside it until the work is done; they end with this process.

    max_length: tokens that the model is run on at the most. Raises TeamError in whatever waits for one that has ended.
    """
    calibration = prepared.calibration
    if calibration is None or calibration.num_workers == 1:
        return nullcontext(ALONE)
    size = calibration.num_workers
    offload_dir = calibration.offload_dir
    starts = [
        MemberStart(
            rank,
            size,
            str(prepared.checkpoint.directory.resolve()),
            str(work.directory),
            msgspec.to_builtins(prepared.recipe),
            list(work.units),
            device,
            max_length,
            None if offload_dir is None else str(offload_dir.resolve()),
        )
        for rank in range(1, size)
    ]
    gather = _team_here
    if backend == "ray":
        from octavo.jobs.calibration_on_ray import team_on_ray

        gather = team_on_ray
    return gather(starts, calibration.token_ids, has_gpus=calibration.runner.device.type == "cuda")


@contextmanager
def _team_here(starts: list[MemberStart], token_ids: Tensor, *, has_gpus: bool) -> Iterator[Team]:
    """The others as processes on this machine, each with its share of the cores, or a GPU."""
    size = len(starts) + 1
    gpus = find_devices("cuda").gpus if has_gpus else ()
    all_threads = torch.get_num_threads()
    threads = max(1, all_threads // size)
    cores = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        sums = _memory(stack, "octavo-sums")
        tokens = _memory(stack, "octavo-tokens")
        os.write(tokens, token_ids.numpy().tobytes())
        group = Shared(sums, 0, size)
        workers = _Workers(group)
        stack.callback(workers.close)
        for start in starts:
            member = msgspec.structs.replace(start, num_threads=threads)
            share = share_of_cores(cores, start.rank, size)
            shape = (token_ids.shape[0], token_ids.shape[1])
            workers.start(WorkerStart(member, share, sums, tokens, shape), gpus[start.rank] if gpus else None)
        stack.callback(set_threads, all_threads)
        set_threads(threads)
        yield Member(group)


def _memory(stack: ExitStack, name: str) -> int:
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    stack.callback(os.close, descriptor)
    return descriptor


class _Workers:
    """The processes of the others, of which one that ends before the work does ends all waiting."""

    def __init__(self, group: Shared) -> None:
        self._group = group
        self._processes: list[ChildProcess] = []
        self._closing = threading.Event()

    def start(self, start: WorkerStart, gpu: str | None) -> None:
        name = f"calibration worker {start.member.rank} of {start.member.size}"
        environment = child_environment(start.member.num_threads) | ({} if gpu is None else {VISIBLE: gpu})
        process = ChildProcess(name, "octavo.jobs.calibration_worker", start, environment, (start.sums, start.tokens))
        self._processes.append(process)
        threading.Thread(target=self._watch, args=(process,), name="octavo-worker-watch", daemon=True).start()

    def _watch(self, process: ChildProcess) -> None:
        code, message = process.wait()
        if code != 0 and not self._closing.is_set():
            self._group.stop(message)

    def close(self) -> None:
        """End those that still run."""
        self._closing.set()
        for process in self._processes:
            process.end()
        for process in self._processes:
            process.wait_for_end()
