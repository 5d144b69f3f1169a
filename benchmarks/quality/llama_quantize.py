"""llama.cpp's quantizer: `python llama_quantize.py MODEL SAMPLES.pt OUT KIND BIN CONVERTER [imatrix]`.

In an environment that has what CONVERTER (llama.cpp's convert_hf_to_gguf.py) needs: torch, transformers, gguf and
sentencepiece. BIN is the directory of llama-quantize and llama-imatrix. imatrix: with the importance of each input,
measured on the samples as text.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer


def main() -> None:
    """Quantize."""
    model, samples, out, kind, programs, converter = (Path(word) for word in sys.argv[1:7])
    out.mkdir(parents=True, exist_ok=True)
    whole = out / "whole.bf16"
    _run(sys.executable, converter, model, "--outfile", whole, "--outtype", "bf16")
    options = []
    if "imatrix" in sys.argv[7:]:
        options = ["--imatrix", out / "imatrix.dat"]
        token_ids = torch.load(samples)
        text = out / "samples.txt"
        text.write_text("".join(AutoTokenizer.from_pretrained(model).batch_decode(token_ids)))
        _run(programs / "llama-imatrix", "-m", whole, "-f", text, "-o", options[1], "-c", token_ids.shape[1], "-t", 1)
    _run(programs / "llama-quantize", *options, whole, out / "model.gguf", kind, 1)
    whole.unlink()
    for file in model.glob("*.json"):
        shutil.copy(file, out)


def _run(*command: object) -> None:
    subprocess.run([str(word) for word in command], check=True)


if __name__ == "__main__":
    main()
