"""Those who share a calibration's samples with this process on the nodes of a Ray cluster.

Ray places them, carries what they must know, and tells which is gone; sums go over gloo's sockets, which are neither
encrypted nor signed. The directories of the model and of the hidden states must be the same files on all nodes.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from octavo.calibration.layers import QuantizeError
from octavo.calibration.team import Team, TeamError
from octavo.jobs.calibration_member import Member, MemberStart, take_part, told_of_members
from octavo.runtime.parallel.group import Gloo
from octavo.runtime.parallel.lifeline import EndedError, one_line
from octavo.runtime.parallel.placement import check_ray_installed
from octavo.runtime.parallel.ray_cluster import find_cluster, join_cluster
from octavo.runtime.worker.device import set_threads

ROOM_SECONDS = 60.0
LOOK_SECONDS = 0.05
WATCH_SECONDS = 0.5
END_SECONDS = 10.0  # for members to end once all is done


def check_cluster() -> None:
    """Raise QuantizeError where there is no Ray, or no cluster."""
    try:
        check_ray_installed()
        find_cluster()
    except ValueError as e:
        raise QuantizeError(str(e)) from None


@contextmanager
def team_on_ray(starts: list[MemberStart], token_ids: Tensor, *, has_gpus: bool) -> Iterator[Team]:
    """This process as the first member, and others as `starts` say on the cluster's nodes, until the work is done.

    Each, this one too, has as many CPUs as the smallest node, or a GPU. Raises TeamError where there is no room, and in
    whatever waits for one that is gone.
    """
    import ray

    try:
        host = join_cluster()
    except ValueError as e:
        raise TeamError(str(e)) from None
    with ExitStack() as stack:
        stack.callback(ray.shutdown)
        num_cpus = min(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
        bundle = {"CPU": 1.0, "GPU": 1.0} if has_gpus else {"CPU": float(num_cpus)}
        room = _room(stack, [bundle | {f"node:{host}": 0.001}] + [bundle] * len(starts))
        threads = None if has_gpus else num_cpus
        values = ray.remote(num_cpus=0)(_Values).remote()
        tokens = ray.put(token_ids.numpy())
        runs = {}
        for start, place in zip(starts, room, strict=True):
            member = ray.remote(num_cpus=bundle["CPU"], num_gpus=bundle.get("GPU", 0), scheduling_strategy=place)
            told = msgspec.json.encode(msgspec.structs.replace(start, num_threads=threads))
            run = member(_run).remote(told, tokens, values)
            stack.callback(ray.cancel, run, force=True)
            runs[run] = f"calibration worker {start.rank} of {start.size}"
        end = _End(runs)
        with told_of_members():
            group = Gloo(_Client(values, end.why), host, 0, len(starts) + 1, end.why)
        end.tell(group)
        stack.callback(end.close)
        stack.callback(set_threads, torch.get_num_threads())
        set_threads(threads)
        yield Member(group)
        ray.wait(list(runs), num_returns=len(runs), timeout=END_SECONDS)


def _room(stack: ExitStack, bundles: list[dict[str, float]]) -> list[Any]:
    """Where the cluster has room for all but the first, which is this process's own."""
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = placement_group(bundles, strategy="SPREAD")
    stack.callback(remove_placement_group, group)
    if not group.wait(ROOM_SECONDS):
        wanted = " and ".join(f"{count:g} {name}" for name, count in bundles[1].items())
        raise TeamError(
            f"--calibration-workers {len(bundles)}: within {ROOM_SECONDS:g} s the Ray cluster has had no room for so "
            f"many, each with {wanted}, one of them on this node"
        )
    return [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i) for i in range(1, len(bundles))]


class _Values:
    """What members keep for each other until they are connected: an actor."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def put(self, key: str, value: bytes) -> None:
        self._values[key] = value

    def get(self, key: str) -> bytes | None:
        return self._values.get(key)


class _Client:
    """The same for gloo. why: of the end of all waiting; None before."""

    def __init__(self, values: Any, why: Callable[[], str | None]) -> None:
        self._values = values
        self._why = why

    def put(self, key: str, value: bytes) -> None:
        import ray

        ray.get(self._values.put.remote(key, value))

    def get(self, key: str) -> bytes:
        import ray

        while (value := ray.get(self._values.get.remote(key))) is None:
            if why := self._why():
                raise EndedError(why)
            time.sleep(LOOK_SECONDS)
        found: bytes = value
        return found


class _End:
    """Which of the others has ended before the work did, and why."""

    def __init__(self, runs: dict[Any, str]) -> None:
        self._runs = runs
        self._reason: str | None = None
        self._group: Gloo | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="octavo-ray-watch", daemon=True)
        self._thread.start()

    def why(self) -> str | None:
        return self._reason

    def tell(self, group: Gloo) -> None:
        """The group that is to end then, too."""
        self._group = group
        if self._reason is not None:
            group.stop(self._reason)

    def close(self) -> None:
        """What ends from now on is ended."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        import ray

        waiting = list(self._runs)
        while waiting and not self._closed.is_set():
            ended, waiting = ray.wait(waiting, timeout=WATCH_SECONDS)
            for run in ended:
                try:
                    ray.get(run)
                except ray.exceptions.RayError as error:
                    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else None
                    said = one_line(error if cause is None else cause).splitlines()[-1]
                    self._reason = self._reason or f"{self._runs[run]}: {said}"
                    if self._group is not None:
                        self._group.stop(self._reason)


def _run(told: bytes, token_ids: Any, values: Any) -> None:
    """A member's work, as a task of Ray."""
    import ray

    start = msgspec.json.decode(told, type=MemberStart)
    for needed in (start.model, start.directory, *([start.offload_dir] if start.offload_dir else [])):
        if not Path(needed).is_dir():
            raise QuantizeError(f"{needed} is not on {socket.gethostname()}: all nodes must have the same directories")
    group = Gloo(
        _Client(values, lambda: None), str(ray.util.get_node_ip_address()), start.rank, start.size, lambda: None
    )
    take_part(start, torch.tensor(token_ids), group)
