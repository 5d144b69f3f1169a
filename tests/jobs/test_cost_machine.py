"""What is read of the machine: memory of a process and its children, and the energy counters of processors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from octavo.jobs.cost.machine import EnergyMeter, busy_cores, memory_of

TAKES_MEMORY = "import time; block = bytearray(64_000_000); print('.', flush=True); time.sleep(60)"
TAKES_CHILDREN = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {TAKES_MEMORY!r}])"


def test_memory_counts_children() -> None:
    command = [sys.executable, "-c", TAKES_CHILDREN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            process.stdout.read(1)
            found = memory_of(process.pid)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert found is not None
    assert 64e6 < found < 200e6
    assert memory_of(None) is None
    assert memory_of(process.pid) is None


def test_busy_cores_see_other_programs() -> None:
    loop = "import time; end = time.time() + 5\nwhile time.time() < end: pass"
    with subprocess.Popen([sys.executable, "-c", loop]) as process:
        time.sleep(0.1)
        found = busy_cores(0.3)
        process.kill()
    assert found is not None
    assert found > 0.5


def counter(powercap: Path, name: str, microjoules: int, end: int = 1_000_000) -> None:
    (powercap / name).mkdir(exist_ok=True)
    (powercap / name / "energy_uj").write_text(str(microjoules))
    (powercap / name / "max_energy_range_uj").write_text(str(end))


def test_energy_is_that_of_all_packages_over_the_ends_of_their_counters(tmp_path: Path) -> None:
    counter(tmp_path, "intel-rapl:0", 900_000)
    counter(tmp_path, "intel-rapl:1", 100_000)
    counter(tmp_path, "intel-rapl:0:0", 5)  # a part of a package
    meter = EnergyMeter.find(tmp_path)
    assert meter is not None
    assert meter.source == "processors (RAPL)"
    assert meter.joules() == 0
    counter(tmp_path, "intel-rapl:1", 300_000)
    counter(tmp_path, "intel-rapl:0", 200_000)  # over its end
    assert meter.joules() == pytest.approx(0.5)
    counter(tmp_path, "intel-rapl:0", 250_000)
    assert meter.joules() == pytest.approx(0.55)


def test_energy_of_gpus_is_nvml_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Millijoules of every GPU; a GPU that has no counter leaves it to the processors."""
    counted = {"a": 1500, "b": 500}

    class NVMLError(Exception):
        pass

    def energy(handle: str) -> int:
        if handle not in counted:
            raise NVMLError
        return counted[handle]

    nvml = types.ModuleType("pynvml")
    told = {
        "NVMLError": NVMLError,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda i: "ab"[i],
        "nvmlDeviceGetTotalEnergyConsumption": energy,
    }
    vars(nvml).update(told)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    meter = EnergyMeter.find(tmp_path)
    assert meter is not None
    assert (meter.source, meter.joules()) == ("GPUs (NVML)", 2.0)
    del counted["b"]
    assert EnergyMeter.find(tmp_path) is None


def test_a_machine_without_counters_has_no_meter(tmp_path: Path) -> None:
    assert EnergyMeter.find(tmp_path) is None
