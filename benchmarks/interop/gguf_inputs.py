"""What llama.cpp's rounding of inputs moves: a GGUF file's numbers by transformers in float32, inputs rounded and not.

    python -m benchmarks.interop.gguf_inputs FILE.gguf ... --llama-server PATH

llama.cpp multiplies integers: on a CPU it rounds the input of each matrix in blocks of 32 columns (Q8_0 and Q8_1, for
Q4_0 to Q8_0 and IQ4_NL) or 256 (Q8_K, for K blocks and other i-quants) to 8 bits, by the largest magnitude over 127,
which Q8_0 and Q8_1 keep in float16. Here transformers multiplies the very numbers of the file, once by inputs as they
are, which is what octavo computes, and once by inputs rounded so; nothing else differs. Linear layers that are in no
blocks keep their inputs. The columns: by how much leads move then, 99 times in a hundred, over the texts of peers.py;
and the tokens that llama.cpp and transformers with rounded inputs have in common for each prompt, beside those with
inputs as they are.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from benchmarks.cpu_vs_peers import cpu_name
from benchmarks.interop.agreement import distance, equal_tokens
from benchmarks.interop.compare import GOAL, markdown
from benchmarks.interop.formats import ask_llama
from benchmarks.interop.peers import TOP, Answer, Questions, questions
from safetensors.torch import save_file
from torch import Tensor

from octavo.quant.checkpoint import Checkpoint
from octavo.quant.hub import resolve_model

HEAD = ("file", "lead, 99 %", "equal to llama.cpp, inputs rounded", "inputs as they are")
COLUMNS = {"Q4_0": 32, "Q4_1": 32, "Q5_0": 32, "Q5_1": 32, "Q8_0": 32, "IQ4_NL": 32}
BLOCK = 256  # of inputs for every other kind of blocks
PLAIN = ("F16", "BF16", "F32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="GGUF files of llama models")
    parser.add_argument("--llama-server", required=True, help="llama.cpp's server")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the table")
    args = parser.parse_args()
    rows = []
    for file in args.files:
        rows.append(compare(file, args.llama_server))
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
        write(args.output, rows)


def compare(file: Path, llama_server: str) -> tuple[str, ...]:
    directory = resolve_model(str(file))
    asked = questions(directory)
    with tempfile.TemporaryDirectory() as folder:
        model = model_of(directory, Path(folder))
        plain = answer(model, asked)
        with rounded_inputs(model, directory):
            rounded = answer(model, asked)
        theirs = ask_llama(llama_server, file, asked, Path(folder) / "log")
    if theirs.error:
        return file.parent.name, "", theirs.error, ""
    equal = [
        " ".join(str(equal_tokens(a, b[:GOAL])) for a, b in zip(side.tokens, theirs.tokens, strict=True))
        for side in (rounded, plain)
    ]
    return f"{file.parent.name}/{file.name}", f"{distance(plain, rounded).lead_p99:.3f}", *equal


def model_of(directory: Path, folder: Path) -> Any:
    """transformers' model of the numbers that the file's blocks stand for, float32."""
    checkpoint = Checkpoint.open(directory)
    plain = {name: checkpoint.tensor(name).float() for name in checkpoint.names if not name.endswith(".blocks")}
    for module in checkpoint.quantized:
        weight = checkpoint.linear(module)
        plain[f"{module}.weight"] = weight.float() if isinstance(weight, Tensor) else weight.dequantize(torch.float32)
    save_file({name: tensor.contiguous() for name, tensor in plain.items()}, folder / "model.safetensors")
    config = (directory / "config.json").read_text("utf-8")
    (folder / "config.json").write_text(config)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@contextmanager
def rounded_inputs(model: Any, directory: Path) -> Iterator[None]:
    """The model with inputs of its linear layers rounded as llama.cpp rounds them for their weights' blocks."""
    checkpoint = Checkpoint.open(directory)
    kinds = {module: kind for file in checkpoint.files.values() for module, kind in getattr(file, "kinds", {}).items()}
    hooks = []
    for module, kind in kinds.items():
        columns = COLUMNS.get(kind, BLOCK)

        def hook(_: Any, inputs: tuple[Tensor, ...], columns: int = columns) -> tuple[Tensor, ...]:
            return (round_input(inputs[0], columns),)

        hooks.append(model.get_submodule(module).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def round_input(x: Tensor, columns: int) -> Tensor:
    """To integers of -127 to 127 times the largest magnitude of `columns` columns over 127."""
    blocks = x.unflatten(-1, (-1, columns))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale > 0, blocks / scale, 0.0).round()
    kept = scale.half().float() if columns == 32 else scale
    return (codes * kept).flatten(-2)


@torch.inference_mode()
def answer(model: Any, asked: Questions) -> Answer:
    tokens = [greedy(model, ids) for ids in asked.prompts]
    places = []
    for ids in asked.texts:
        rows = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
        values, found = rows.topk(TOP)
        following = rows.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1).tolist()
        tops = zip(found.tolist(), values.tolist(), strict=True)
        places += [(value, dict(zip(*top, strict=True))) for value, top in zip(following, tops, strict=True)]
    return Answer(f"transformers {transformers.__version__}", tokens, places)


def greedy(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    past = None
    chosen: list[int] = []
    for _ in range(GOAL):
        out = model(ids, past_key_values=past, use_cache=True)
        past = out.past_key_values
        ids = out.logits[:, -1:].argmax(-1)
        chosen.append(int(ids))
    return chosen


def write(output: Path, rows: list[tuple[str, ...]]) -> None:
    date = datetime.date.today().isoformat()
    lines = [
        f"# Inputs of GGUF files in 8 bits, {date}",
        "",
        f"Greedy tokens of {GOAL}; what the columns mean stands in `gguf_inputs.py`.",
        "",
        *markdown(HEAD, rows),
        "",
        f"- processor: {cpu_name()}",
        "- command: `python -m benchmarks.interop.gguf_inputs FILE.gguf ... --llama-server llama-server`",
    ]
    output.mkdir(parents=True, exist_ok=True)
    (output / f"gguf-inputs-{date}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
