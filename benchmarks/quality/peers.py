"""Quality of octavo's algorithms and of other quantizers on the first blocks of a model, with what they took.

    python benchmarks/quality/peers.py MODEL SAMPLES.pt WORK CELL... --text prose=a.txt --text code=b.txt
        --tool autoround=/venvs/autoround/bin/python --tool gptqmodel=/venvs/gptqmodel/bin/python

A CELL is a symmetric scheme in groups and a number of blocks, W3A16@64:10. Each tool quantizes a model that ends behind
those blocks, on the same token ids. They then replace the original's in transformers' model, in float32, and what it
predicts is compared with the original's predictions on each text. So no tool's own code decides what its weights mean
for it, and a subset shows what a whole model would take hours for. CPU seconds and the peak of memory are those of the
tool's process. What WORK has already isn't done again: a run that was killed goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from octavo.quant.checkpoint import Checkpoint
from octavo.quant.qparams import QuantizedWeight

ALGORITHMS = ("rtn", "gptq", "awq", "awq+gptq", "tune")
AUTOROUND_STEPS = (50, 200)
WINDOW = 256
HERE = Path(__file__).parent
BLOCK = re.compile(r"layers\.(\d+)\.")
HEAD = ("cell", "tool", "KL mean", "p99", "CPU s", "peak MB")


def main() -> None:
    """Do what isn't done, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("samples", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("cells", nargs="*")
    parser.add_argument("--text", action="append", default=[], help="KIND=FILE")
    parser.add_argument("--tool", action="append", default=[], help="NAME=PYTHON of its environment")
    parser.add_argument("--windows", type=int, default=4, help=f"of {WINDOW} tokens, of each text")
    parser.add_argument("--only", help="a regex of tools' names")
    args = parser.parse_args()
    pythons = dict(word.split("=", 1) for word in args.tool)
    kept = args.work / "results.json"
    rows = json.loads(kept.read_text()) if kept.exists() else {}
    texts = {kind: Path(file) for kind, file in (word.split("=", 1) for word in args.text)}
    judge = Judge(args.model, texts, args.windows, args.work)
    for cell in args.cells:
        for tool, command in tools(cell, pythons):
            key = f"{cell} {tool}"
            if key in rows or (args.only and not re.fullmatch(args.only, tool)):
                continue
            blocks = int(cell.partition(":")[2])
            out = args.work / key.replace(" ", "-")
            cost = run(
                [*command[:2], str(trimmed(args.model, args.work, blocks)), str(args.samples), str(out), *command[2:]]
            )
            rows[key] = {"cell": cell, "tool": tool, **cost, **judge.compare(dense_blocks(out))}
            shutil.rmtree(out)
            kept.write_text(json.dumps(rows, indent=1) + "\n")
            print(rows[key], flush=True)
    print(table(list(rows.values()), list(texts)))


def tools(cell: str, pythons: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Each tool's name and its command, but for model, samples and output behind its script."""
    scheme = cell.partition(":")[0]
    bits, _, group = scheme.removeprefix("W").partition("A16@")
    for algorithm in ALGORITHMS:
        yield f"octavo {algorithm}", [sys.executable, str(HERE / "octavo_samples.py"), scheme, algorithm]
    if "autoround" in pythons:
        for steps in AUTOROUND_STEPS:
            script = str(HERE / "autoround_tuned.py")
            yield f"AutoRound {steps}", [pythons["autoround"], script, bits, group, str(steps)]
    if "gptqmodel" in pythons:
        yield "GPTQModel", [pythons["gptqmodel"], str(HERE / "gptqmodel_gptq.py"), bits, group]


def run(command: list[str]) -> dict[str, float]:
    """A tool to its end; its CPU seconds, and the peak of its memory in MB (10^6 bytes)."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    seconds = usage.ru_utime + usage.ru_stime
    return {"CPU s": round(seconds, 1), "peak MB": round(usage.ru_maxrss * 1024 / 1e6)}


def trimmed(model: Path, work: Path, blocks: int) -> Path:
    """The model up to a block, as a checkpoint of its own."""
    out = work / f"first-{blocks}"
    if (out / "config.json").exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    kept = {name: tensor for name, tensor in load_file(model / "model.safetensors").items() if of_first(name, blocks)}
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    for file in model.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, out)
    config = json.loads((model / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"num_hidden_layers": blocks}))
    return out


def of_first(name: str, blocks: int) -> bool:
    """A tensor of the first blocks, or of none."""
    found = BLOCK.search(name)
    return found is None or int(found[1]) < blocks


def dense_blocks(out: Path) -> dict[str, Tensor]:
    """Everything in a written checkpoint's blocks, in float32, by the original's names."""
    directory = next(path.parent for path in out.rglob("config.json"))
    checkpoint = Checkpoint.open(directory)
    found = {}
    for name in checkpoint.names:
        module, _, last = name.rpartition(".")
        if BLOCK.search(name) is None:
            continue
        if last in ("qweight", "weight_packed"):
            weight = checkpoint.linear(module)
            assert isinstance(weight, QuantizedWeight)
            found[f"{module}.weight"] = weight.dequantize()
        elif last in ("weight", "bias"):
            found[name] = checkpoint.tensor(name).float()
    return found


class Judge:
    """The original's predictions on all texts, and how far others are from them."""

    def __init__(self, model: Path, texts: dict[str, Path], windows: int, work: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(model)
        self._windows = {kind: _windows(tokenizer(text.read_text()).input_ids, windows) for kind, text in texts.items()}
        work.mkdir(parents=True, exist_ok=True)
        self._truth = work / "truth.pt"
        if not self._truth.exists():
            torch.save({kind: self._log_probabilities(kind) for kind in texts}, self._truth)

    @torch.inference_mode()
    def _log_probabilities(self, kind: str) -> Tensor:
        rows = [F.log_softmax(self._model(ids[None]).logits[0], -1) for ids in self._windows[kind]]
        return torch.cat(rows)

    @torch.inference_mode()
    def compare(self, blocks: dict[str, Tensor]) -> dict[str, float]:
        """KL(original || the original with other blocks), nats a token: mean and p99 over all texts, and each mean."""
        state = {name: tensor.clone() for name, tensor in self._model.state_dict().items() if name in blocks}
        if missing := blocks.keys() - state.keys():
            raise SystemExit(f"the original has no {sorted(missing)[0]}")
        self._model.load_state_dict(blocks, strict=False)
        truth = torch.load(self._truth, mmap=True)
        every = {}
        for kind in self._windows:
            p = truth[kind]
            every[kind] = (p.exp() * (p - self._log_probabilities(kind))).sum(-1)
        self._model.load_state_dict(state, strict=False)
        whole = torch.cat(list(every.values()))
        means = {kind: round(float(kl.mean()), 5) for kind, kl in every.items()}
        return {"KL mean": round(float(whole.mean()), 5), "p99": round(float(whole.quantile(0.99)), 4), **means}


def _windows(token_ids: list[int], count: int) -> list[Tensor]:
    """Windows that are evenly spread over a text."""
    room = len(token_ids) - WINDOW
    return [torch.tensor(token_ids[begin : begin + WINDOW]) for begin in range(0, room, room // count)][:count]


def table(rows: list[dict[str, object]], kinds: list[str]) -> str:
    """In Markdown: cell after cell, the least KL first."""
    head = [*HEAD[:4], *kinds, *HEAD[4:]]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    ordered = sorted(rows, key=lambda row: (str(row["cell"]), float(str(row["KL mean"]))))
    lines += ["| " + " | ".join(str(row[name]) for name in head) + " |" for row in ordered]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
