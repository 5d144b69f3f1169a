"""Peak memory of quantizing a generated checkpoint of 2 GB: a small multiple of its largest tensor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from octavo.quant.checkpoint import INDEX, Checkpoint

HIDDEN, INTERMEDIATE, LAYERS, VOCAB = 2048, 5632, 18, 32_000
SHAPES = {
    **{f"self_attn.{x}_proj": (HIDDEN, HIDDEN) for x in "qkvo"},
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
LARGEST = 2 * VOCAB * HIDDEN  # the embedding: 131 MB

# Prints the peak of resident memory before and after, in bytes, as the kernel counted it (VmHWM).
QUANTIZE = """
import sys
from pathlib import Path
import torch
from octavo.calibration.quantize_model import quantize_model
from octavo.calibration.recipe import Recipe

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

torch.set_num_threads(1)
before = peak()
quantize_model(Path(sys.argv[1]), Path(sys.argv[2]), Recipe("W4A16"), max_shard_bytes=400_000_000)
print(before, peak())
"""


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
    """A Llama of 2 GB in shards of six layers; returns its bytes."""
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


def test_peak_memory_does_not_know_the_size_of_the_model(tmp_path: Path) -> None:
    total = generate(tmp_path / "model")
    assert total > 2_000_000_000
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", QUANTIZE, str(tmp_path / "model"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert after - before < 2 * LARGEST
    written = Checkpoint.open(tmp_path / "out")
    assert len(written.files) > 1
    assert sum(written.spec(name).nbytes for name in written.names) < 0.4 * total
