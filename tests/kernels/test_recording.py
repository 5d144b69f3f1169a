"""A recording does what its thread did, with whatever its inputs hold then."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from octavo.kernels.native.recording import Memory, NotRecordableError, Recording
from octavo.kernels.norm.cpu import add_rms_norm, silu_and_mul

ROWS = 3
COLUMNS = 64
WEIGHT = torch.linspace(0.5, 2, COLUMNS)
BIAS = torch.linspace(-1, 1, COLUMNS).bfloat16()


def some_layers(x: Tensor) -> Tensor:
    """Kernels of ours, and operators of torch that make tensors, look at them and write into them."""
    residual = x * 2
    for _ in range(4):
        out, residual = add_rms_norm(x, residual, WEIGHT, 1e-5)
        out.add_(BIAS)
        gated = silu_and_mul(torch.cat([out, residual], dim=1).contiguous())
        x = gated.view(-1, 2, COLUMNS // 2).transpose(1, 2).reshape(-1, COLUMNS)
    return x


def random_input() -> Tensor:
    return torch.randn(ROWS, COLUMNS).bfloat16()


def recorded(function: Callable[[Tensor], Tensor], x: Tensor, memory: Memory) -> tuple[Recording, Tensor]:
    recording = Recording(memory)
    with recording:
        result = function(x)
    return recording, result


@pytest.fixture(autouse=True)
def inference() -> object:
    with torch.inference_mode():
        yield


def test_what_is_recorded_is_done_again_with_new_values() -> None:
    x = random_input()
    first = some_layers(x)
    recording, result = recorded(some_layers, x, Memory())
    assert torch.equal(result, first)
    for _ in range(3):
        x.copy_(random_input())
        recording.run()
        assert torch.equal(result, some_layers(x))
    assert not torch.equal(result, first)


def test_recordings_of_several_sizes_share_memory_and_keep_their_results() -> None:
    """As recordings of one size do."""
    memory = Memory()
    inputs = [torch.randn(rows, COLUMNS).bfloat16() for rows in (1, 3, 2, 8)]
    made = [recorded(some_layers, x, memory) for x in inputs]
    for x, (recording, result) in zip(inputs, made, strict=True):
        x.copy_(torch.randn_like(x, dtype=torch.float32))
        recording.run()
        assert torch.equal(result, some_layers(x))


@pytest.mark.parametrize("num_layers", [1, 20])
def test_memory_is_used_again_by_the_next_layer(num_layers: int) -> None:
    def layers(x: Tensor) -> Tensor:
        residual = x
        for _ in range(num_layers):
            x, residual = add_rms_norm(x, residual, WEIGHT, 1e-5)
        return x

    memory = Memory()
    for _ in range(2):
        x = random_input()
        recording, result = recorded(layers, x, memory)
        recording.run()
        assert torch.equal(result, layers(x))
    assert len(memory._pieces) <= 6  # two of a layer, two of the next, and two results


def test_another_thread_s_launches_are_its_own() -> None:
    x = random_input()
    elsewhere = random_input()
    recording = Recording(Memory())
    seen: list[Tensor] = []
    with recording:
        thread = threading.Thread(target=lambda: seen.append(silu_and_mul(elsewhere)))
        thread.start()
        thread.join()
        result = silu_and_mul(x)
    before = seen[0].clone()
    elsewhere.zero_()
    recording.run()
    assert torch.equal(seen[0], before)
    assert torch.equal(result, silu_and_mul(x))


def test_actions_are_called_in_their_places() -> None:
    x = torch.zeros(4)
    seen: list[float] = []
    recording = Recording(Memory())
    with recording:
        x.add_(1)
        recording.call(lambda: seen.append(float(x[0])))
        x.add_(1)
        recording.call(lambda: seen.append(float(x[0])))
    assert seen == []
    recording.run()
    assert seen == [3.0, 4.0]


def test_what_depends_on_a_value_is_refused() -> None:
    x = random_input()
    with pytest.raises(NotRecordableError, match="returns no tensor"), Recording(Memory()):
        x.add_(float(x[0, 0]))
    recording = Recording(Memory())
    with recording:
        x.add_(1)
    before = x.clone()
    recording.run()
    assert torch.equal(x, before + 1), "the one that was refused left nothing behind"


def test_the_first_recording_imports_no_more_of_torch() -> None:
    """It is made in a step, while readers wait for their tokens."""
    program = """
import sys
import torch
from octavo.kernels.native.recording import Memory, Recording
x = torch.ones(2)
before = set(sys.modules)
with torch.inference_mode(), Recording(Memory()) as recording:
    y = torch.empty_like(x).copy_(x) + x
print(sorted(name for name in set(sys.modules) - before if name.startswith("torch")))
"""
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
