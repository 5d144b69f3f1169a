"""Peak memory of quantizing generated checkpoints: rounding knows the largest tensor alone, GPTQ one block."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from octavo.quant.checkpoint import INDEX, Checkpoint

pytestmark = pytest.mark.long

HIDDEN, INTERMEDIATE, LAYERS, VOCAB = 768, 2048, 18, 24_000
SHAPES = {
    **{f"self_attn.{x}_proj": (HIDDEN, HIDDEN) for x in "qkvo"},
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
LARGEST = 2 * VOCAB * HIDDEN  # the embedding: 37 MB

# Prints the peak of resident memory before and after, in bytes, as the kernel counted it (VmHWM).
PEAK = """
import sys
from pathlib import Path
import torch
from octavo.calibration.prepare import Calibration, prepare
from octavo.calibration.quantize_model import quantize_model
from octavo.calibration.recipe import Recipe
from octavo.calibration.text.data import from_token_ids
from octavo.quant.checkpoint import Checkpoint
from octavo.runtime.model.blocks import BlockRunner

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

torch.set_num_threads(1)
before = peak()
"""
QUANTIZE = (
    PEAK
    + """
model, out, scheme = sys.argv[1:]
quantize_model(prepare(Path(model), Path(out), Recipe(scheme), max_shard_bytes=100_000_000))
print(before, peak())
"""
)
INPUTS = 4096
STATISTICS = (
    PEAK
    + """
from octavo.calibration.algorithms.input_statistics import StatsCollector
collector = StatsCollector(int(sys.argv[1]), torch.device("cpu"))
x = torch.ones(64, int(sys.argv[1]))
with torch.inference_mode():
    collector.add(x)
print(before, peak(), float(collector.result().moments.sum()), peak())
"""
)
GPTQ = (
    PEAK
    + """
token_ids = torch.arange(8 * 64).view(8, 64) % 256
data = from_token_ids(list(token_ids), vocab_size=256, source="a test")
calibration = Calibration(data, BlockRunner(Checkpoint.open(Path(sys.argv[1])).config, "model.", 64))
recipe = Recipe("W4A16@64", algorithm="gptq")
model, out = map(Path, sys.argv[1:])
quantize_model(prepare(model, out, recipe, calibration=calibration, max_shard_bytes=20_000_000))
print(before, peak())
"""
)


def sparse_shard(path: Path, shapes: dict[str, tuple[int, int]]) -> int:
    """A bf16 safetensors file of zeros that takes no room on the disk; returns its tensors' bytes."""
    header, offset = {}, 0
    for name, (n, k) in shapes.items():
        header[name] = {"dtype": "BF16", "shape": [n, k], "data_offsets": [offset, offset + 2 * n * k]}
        offset += 2 * n * k
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + offset)
    return offset


def generate(model: Path) -> int:
    """A Llama of 0.3 GB in shards of six layers; returns its bytes."""
    model.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": LAYERS}
    (model / "config.json").write_text(json.dumps(config))
    total, weight_map = 0, {}
    for first in range(0, LAYERS, 6):
        shapes = {
            f"model.layers.{i}.{kind}.weight": shape for i in range(first, first + 6) for kind, shape in SHAPES.items()
        }
        if first == 0:
            shapes |= {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
        file = f"model-{first:05d}.safetensors"
        total += sparse_shard(model / file, shapes)
        weight_map.update(dict.fromkeys(shapes, file))
    (model / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return total


def printed(program: str, *arguments: object, **environment: str) -> list[str]:
    """What a program prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"} | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def peaks(program: str, *arguments: object, **environment: str) -> tuple[int, int]:
    """The peak when a program begins, and when it is done."""
    before, after = map(int, printed(program, *arguments, **environment))
    return before, after


def test_gptq_holds_one_block(tmp_path: Path) -> None:
    """Four times the layers: 23 MB more in the checkpoint, and less than one layer more in memory.

    What is freed goes back to the system at once: else what glibc keeps for later adds up to 20 MB, by chance.
    """
    peak, size = dict[int, int](), dict[int, int]()
    for layers in (2, 8):
        config = LlamaConfig(
            hidden_size=384, intermediate_size=1152, num_hidden_layers=layers, num_attention_heads=8, vocab_size=256
        )
        model = tmp_path / f"{layers}-layers"
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(model)
        size[layers] = (model / "model.safetensors").stat().st_size
        out = tmp_path / f"{layers}-quantized"
        before, after = peaks(GPTQ, model, out, MALLOC_MMAP_THRESHOLD_="1048576")
        peak[layers] = after - before
    assert size[8] - size[2] > 23_000_000
    assert peak[8] - peak[2] < (size[8] - size[2]) / 6, peak


@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4A16"])  # the latter looks at layers together first
def test_peak_memory_does_not_know_the_size_of_the_model(tmp_path: Path, scheme: str) -> None:
    total = generate(tmp_path / "model")
    assert total > 4 * 2 * LARGEST
    before, after = peaks(QUANTIZE, tmp_path / "model", tmp_path / "out", scheme)
    assert after - before < 2 * LARGEST
    written = Checkpoint.open(tmp_path / "out")
    assert len(written.files) > 1
    assert sum(written.spec(name).nbytes for name in written.names) < 0.5 * total  # embeddings are a fifth


def test_statistics_of_a_wide_layer_are_there_once() -> None:
    """The moments of 4,096 inputs are 67 MB; making both halves of what was added up takes no second 67."""
    _, added, total, done = map(float, printed(STATISTICS, INPUTS))
    assert total == INPUTS**2
    assert done - added < 4 * INPUTS**2 / 4, (done, added)
