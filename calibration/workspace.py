"""The directory, beside OUT, in which a quantized checkpoint is written: all or nothing, and resumed after a kill.

The work is cut into units: first everything outside of the blocks, then each block. Shards are laid out with their
headers first, then each unit's tensors are written in their places. Once a unit and the hidden states that the next one
needs are on the disk, the manifest says so, with hashes; a resumed run checks them and goes on with the first unit that
the manifest doesn't have. The directory has no config.json, and its shards no names that a loader would take, until
everything is there; then it is renamed into place.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from octavo.calibration.auxiliary_files import write_json
from octavo.calibration.hidden_states_file import Hidden
from octavo.calibration.layers import QuantizeError
from octavo.quant.safetensors_file import PlacedWriter, SafetensorsWriter, TensorSpec

MANIFEST = "quantization_manifest.json"
# Keys of a job as a person calls them.
SPOKEN = {"data": "calibration text", "shards": "shard layout", "workers": "number of workers"}
# What ends a run without a fault of its own, so that its finished units are worth keeping: Ctrl-C, SIGTERM, a disk that
# is full or fails, no more memory.
INTERRUPTIONS = (KeyboardInterrupt, SystemExit, OSError, MemoryError, torch.OutOfMemoryError)
NO_MEMORY = "DefaultCPUAllocator"  # in the RuntimeError that torch raises for want of a CPU's memory


def is_interruption(error: BaseException) -> bool:
    """True if a run that ended with this error can be resumed with the same options."""
    return isinstance(error, INTERRUPTIONS) or (isinstance(error, RuntimeError) and NO_MEMORY in str(error))


class MakeWriter(Protocol):
    """A shard's writer; again: the file is there already and holds some of its tensors."""

    def __call__(self, path: Path, specs: Mapping[str, TensorSpec], *, again: bool) -> PlacedWriter: ...


class ResumeError(QuantizeError):
    """Work that can't be gone on with as asked; it stays where it is, for another try or to be given up."""


class Workspace:
    """The directory while it is worked in.

    job       what decides the result; a resumed run must have the same
    units     what is done: by the unit's name its hash, and what its writer wanted to remember
    """

    def __init__(
        self,
        directory: Path,
        shards: Mapping[str, Mapping[str, TensorSpec]],
        job: Mapping[str, Any],
        make_writer: MakeWriter = SafetensorsWriter,
    ) -> None:
        self.directory = directory
        self.job = dict(job)
        self.units: dict[str, dict[str, Any]] = {}
        self._shards = shards
        self._make_writer = make_writer
        self._writers: dict[str, PlacedWriter] = {}
        self._of = {name: shard for shard, specs in shards.items() for name in specs}
        self._names: list[str] = []

    def open(self, stack: ExitStack, *, again: bool) -> None:
        """Open every shard until `stack` closes. again: check what the manifest has, and take it over."""
        for shard, specs in self._shards.items():
            path = self.directory / f"{shard}.part"
            if again and not path.exists() and (self.directory / shard).exists():
                (self.directory / shard).rename(path)  # killed between the last renames
            writer = self._make_writer(path, specs, again=again and path.exists())
            self._writers[shard] = stack.enter_context(writer)
        if again:
            self._take_over()
        else:
            self._write_manifest()

    def write(self, name: str, tensor: Tensor) -> None:
        """Store a tensor of the unit in work."""
        self._writers[self._of[name]].write(name, tensor)
        self._names.append(name)

    def copy(self, name: str, chunks: Iterator[Tensor]) -> None:
        """Store a tensor of the unit in work from pieces of its bytes."""
        self._writers[self._of[name]].copy(name, chunks)
        self._names.append(name)

    def finish(self, unit: str, states: Mapping[str, Hidden], remember: Mapping[str, Any]) -> None:
        """The unit's tensors are all written: have them, and the next unit's inputs, on the disk, and say so."""
        shards = {self._of[name] for name in self._names}
        for shard in shards:
            self._writers[shard].sync()
        entry: dict[str, Any] = {"tensors": self._names, "sha256": self._digest(self._names), **remember}
        for name, hidden in states.items():
            entry[name] = {"file": hidden.path.name, "sha256": hidden.sync()}
        self.units[unit] = entry
        self._names = []
        self._write_manifest()

    def _digest(self, names: list[str]) -> str:
        digest = hashlib.sha256()
        for name in names:
            for chunk in self._writers[self._of[name]].stored(name):
                digest.update(chunk)
        return digest.hexdigest()

    def _take_over(self) -> None:
        self.units = read_manifest(self.directory)["units"]
        for unit, entry in self.units.items():
            known = all(name in self._of for name in entry["tensors"])
            if not known or self._digest(entry["tensors"]) != entry["sha256"]:
                raise ResumeError(
                    f"can't resume: what {self.directory.name} holds of {unit} isn't what was written; --overwrite "
                    "starts anew"
                )
            for name in entry["tensors"]:
                self._writers[self._of[name]].is_there(name)

    def _write_manifest(self) -> None:
        fresh = self.directory / f"{MANIFEST}.new"
        write_json(fresh, {"version": 1, "job": self.job, "units": self.units})
        fresh.rename(self.directory / MANIFEST)
        sync_directory(self.directory)


class Onlooker:
    """The directory for a process that only takes a share of the work: what it writes, another one writes."""

    def __init__(self, directory: Path, units: dict[str, dict[str, Any]]) -> None:
        self.directory = directory
        self.units = units

    def write(self, name: str, tensor: Tensor) -> None:
        """Nothing."""

    def copy(self, name: str, chunks: Iterator[Tensor]) -> None:
        """Nothing."""

    def finish(self, unit: str, states: Mapping[str, Hidden], remember: Mapping[str, Any]) -> None:
        """Nothing."""


def read_manifest(directory: Path) -> dict[str, Any]:
    """A directory's manifest; one without jobs and units where there is none, or what is there is none."""
    nothing: dict[str, Any] = {"job": None, "units": {}}
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
    except (FileNotFoundError, ValueError):
        return nothing
    return manifest if _is_manifest(manifest) else nothing


def _is_manifest(found: Any) -> bool:
    """True if a JSON value has the form of a manifest."""
    if not isinstance(found, dict) or not isinstance(found.get("job"), dict):
        return False
    units = found.get("units")
    return isinstance(units, dict) and all(
        isinstance(entry, dict) and isinstance(entry.get("tensors"), list) and isinstance(entry.get("sha256"), str)
        for entry in units.values()
    )


def finished(out: Path, job: Mapping[str, Any]) -> dict[str, dict[str, Any]] | None:
    """The units of a finished checkpoint, when it is what this job makes. Raises QuantizeError when it isn't."""
    if not (out / "config.json").is_file():
        return None
    manifest = read_manifest(out)
    if other := _differences(manifest["job"] or {}, job):
        raise QuantizeError(
            f"{out} is finished, with another {other}; --overwrite replaces it, and with --resume "
            "goes on where that was killed"
        )
    units: dict[str, dict[str, Any]] = manifest["units"]
    return units


def _differences(there: Mapping[str, Any], job: Mapping[str, Any]) -> str:
    """Name the job's keys whose value differs there, with a recipe's former values."""
    found = []
    for key, value in json.loads(json.dumps(job)).items():
        before = there.get(key)
        if before == value:
            continue
        was = ""
        if key == "recipe" and isinstance(before, dict):
            was = f" ({', '.join(f'{k} {v!r}' for k, v in before.items() if v != value.get(k))})"
        found.append(SPOKEN.get(key, key) + was)
    return " and another ".join(found)


def partial_of(out: Path) -> Path:
    """The directory in which `out` is made."""
    return out.with_name(f".{out.name}.partial")


@contextmanager
def workspace(
    out: Path,
    shards: Mapping[str, Mapping[str, TensorSpec]],
    job: Mapping[str, Any],
    *,
    resume: bool,
    overwrite: bool,
    keep: bool,
    make_writer: MakeWriter = SafetensorsWriter,
) -> Iterator[Workspace]:
    """A Workspace that becomes `out` if all goes well, and is gone if anything goes wrong.

    keep: work that is interrupted, or runs out of disk or memory, stays to be resumed, once a unit is finished.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(out)
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise QuantizeError(f"{partial} is where {out.name} would be made, and isn't a directory; remove it")
    with _only_one(partial):
        again = _prepare(partial, job, resume=resume, overwrite=overwrite)
        work = Workspace(partial, shards, job, make_writer)
        try:
            if not again:
                _empty(partial)
            with ExitStack() as stack:
                work.open(stack, again=again)
                yield work
            _check_untouched(out, resume=resume, overwrite=overwrite, keep=keep)
            for shard in shards:
                (partial / f"{shard}.part").rename(partial / shard)
            _appear(partial, out)
        except BaseException as e:
            kept = isinstance(e, ResumeError) or (keep and work.units and is_interruption(e))
            if not kept:
                shutil.rmtree(partial, ignore_errors=True)
            raise


def _prepare(partial: Path, job: Mapping[str, Any], *, resume: bool, overwrite: bool) -> bool:
    """True if there is work to resume. Raises QuantizeError for work that would be lost, or of other options."""
    manifest = read_manifest(partial)
    if not manifest["units"]:
        return False
    if resume:
        if other := _differences(manifest["job"] or {}, job):
            raise ResumeError(
                f"can't resume: the unfinished work in {partial.name} has another {other}; give the "
                "options that it was started with, or --overwrite instead of --resume to start anew"
            )
        return True
    if not overwrite and manifest["job"].get("data") is not None:
        raise QuantizeError(
            f"{partial} holds an unfinished run, {len(manifest['units'])} units done: --resume goes on with it, "
            "--overwrite starts anew"
        )
    return False


@contextmanager
def _only_one(partial: Path) -> Iterator[None]:
    """Hold the lock on the directory, which is made when it isn't there."""
    partial.mkdir(exist_ok=True)
    lock = _lock(partial)
    if lock is None:
        raise QuantizeError(f"another octavo quantize is writing to {partial}")
    try:
        yield
    finally:
        os.close(lock)
        with suppress(OSError):
            partial.rmdir()  # if it is there and empty: a refused start


def _empty(directory: Path) -> None:
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _check_untouched(out: Path, *, resume: bool, overwrite: bool, keep: bool) -> None:
    """Refuse to replace what something else wrote to `out` while the run lasted."""
    if overwrite or not out.is_dir() or not any(out.iterdir()) or (resume and (out / MANIFEST).is_file()):
        return
    problem = f"{out} was made meanwhile, by something else: move it away, then"
    raise ResumeError(f"{problem} --resume ends the run") if keep else QuantizeError(f"{problem} start again")


def _appear(partial: Path, out: Path) -> None:
    """Put the finished directory in the place of what was there."""
    replaced = out.with_name(f".{out.name}.replaced")
    partial.chmod(0o755)
    sync_directory(partial)
    try:
        if out.exists():
            out.rename(replaced)
        partial.rename(out)
        sync_directory(out.parent)
    except BaseException:
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def recover(out: Path) -> None:
    """Put back a checkpoint that a killed run had moved away and not yet replaced; remove one that it had."""
    out = out.resolve()
    replaced = out.with_name(f".{out.name}.replaced")
    if not replaced.is_dir() or replaced.is_symlink():
        return
    if out.exists():
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        replaced.rename(out)


def _lock(directory: Path) -> int | None:
    """A descriptor that holds the lock on a directory until it is closed; None where another process has it."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


def sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def check_output(source: Path, out: Path, overwrite: bool, resume: bool) -> None:
    """Refuse an output that is the source, or holds something else than a checkpoint that may be replaced."""
    here = source.resolve()
    there = out.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise QuantizeError(f"the output {out} and the model {source} must not contain each other")
    above = next(parent for parent in there.parents if parent.exists())
    if not above.is_dir():
        raise QuantizeError(f"{above} is a file: {out} can't be made in it")
    if not os.access(above, os.W_OK | os.X_OK):
        raise QuantizeError(f"{above} can't be written to: another place for {out} works")
    if not out.exists():
        return
    if not out.is_dir():
        raise QuantizeError(f"{out} exists and is not a directory")
    if any(out.iterdir()):
        if resume and (out / MANIFEST).is_file():
            return  # what a resumed run may find finished
        if not overwrite:
            raise QuantizeError(f"{out} exists; --overwrite replaces it")
        if not (out / "config.json").is_file():
            raise QuantizeError(f"{out} has no config.json: --overwrite replaces a checkpoint, and this is none")


def check_space(needs: Mapping[Path, int]) -> None:
    """Refuse when a directory's disk has fewer bytes free than will be written there."""
    for directory, nbytes in needs.items():
        free = shutil.disk_usage(directory).free
        if free < nbytes:
            raise QuantizeError(f"{directory} has {free / 1e6:,.0f} MB free; {nbytes / 1e6:,.0f} MB will be written")
