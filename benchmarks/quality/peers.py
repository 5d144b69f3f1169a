"""The table of quality: octavo beside other quantizers, on texts of three kinds, with what each took.

    python benchmarks/quality/peers.py MODEL SAMPLES.pt WORK --text prose=a.txt --text code=b.txt
        --tool autoround=/venvs/autoround/bin/python --tool gptqmodel=... --tool llm-compressor=...
        --llama BIN_DIRECTORY --llama-converter convert_hf_to_gguf.py --table results/NAME

A cell is a scheme; CELLS are all, --cell names some. Each tool quantizes the model on the same token ids, in a process
of its own whose seconds and peak of memory are taken. Then transformers computes with the weights that its files mean,
in float32, with inputs rounded as the scheme says by one code for all tools, and the KL divergence from the original's
predictions is taken of each window of each text. So no tool's own code decides what its weights mean for it.

What WORK or NAME.json has is not done again: a run that is killed goes on, and runs of several nights fill one table.
--blocks N quantizes only the first N blocks, where a whole model takes hours: another table, which says so. A few
blocks can't write, so the whole model has written for octavo's `best` there, before its seconds are counted. A tool
that refuses a cell has its last line there; to try again remove its directory in WORK, and its row.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from quality_table import markdown
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from octavo.calibration.recipe import parse_scheme
from octavo.quant.checkpoint import Checkpoint
from octavo.quant.input_rounding import Round, input_rounding
from octavo.quant.qparams import QuantizedWeight
from octavo.runtime.model.families.registry import LAYOUTS

CELLS = (
    *("W4A16@128", "W4A16@64", "W3A16@64", "W2A16@64"),
    *("NVFP4", "MXFP4", "W8A8", "FP8", "W4A8@64", "Q4_K_M"),
)
AUTOROUND_STEPS = "200"
WINDOW = 256
HERE = Path(__file__).parent
CPU = torch.device("cpu")


def main() -> None:
    """Do what isn't done, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("samples", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--cell", action="append", help="one of them; default: all")
    parser.add_argument("--text", action="append", default=[], help="KIND=FILE")
    parser.add_argument("--tool", action="append", default=[], help="NAME=PYTHON of its environment")
    parser.add_argument("--llama", type=Path, help="the directory of llama.cpp's programs")
    parser.add_argument("--llama-converter", type=Path, help="its convert_hf_to_gguf.py")
    parser.add_argument("--octavo", default="auto,best", help="efforts and algorithms of octavo")
    parser.add_argument("--only", default=".*", help="a regex of tools' names")
    parser.add_argument("--blocks", type=int, help="the first ones alone; default: the whole model")
    parser.add_argument("--windows", type=int, default=8, help=f"of {WINDOW} tokens, of each text")
    parser.add_argument("--table", type=Path, help="write NAME.md and NAME.json")
    args = parser.parse_args()
    texts = {kind: Path(file) for kind, file in (word.split("=", 1) for word in args.text)}
    pythons = dict(word.split("=", 1) for word in args.tool)
    llama = [str(args.llama), str(args.llama_converter)] if args.llama else []
    model = args.model if args.blocks is None else trimmed(args.model, args.work, args.blocks)
    work = args.work / ("whole" if args.blocks is None else f"first-{args.blocks}")
    judge = cache(lambda: Judge(args.model, texts, args.windows, args.work))
    facts = {"blocks": args.blocks, "windows": args.windows, "window": WINDOW}
    kept = _kept(args.table, facts)
    for cell in args.cell or CELLS:
        for tool, script, *words in tools(cell, args.octavo.split(","), pythons, llama):
            directory = work / cell / tool.replace(" ", "-")
            if not re.fullmatch(args.only, tool) or (directory / "kl.json").exists() or (cell, tool) in kept:
                continue
            out = directory / "model"
            if not (directory / "cost.json").exists():
                has_text = tool == "octavo best" and args.blocks is not None
                samples = own_text(args.model, args.samples, args.work) if has_text else args.samples
                run([script, words[0], str(model), str(samples), str(out), *words[1:]], directory)
            cost = json.loads((directory / "cost.json").read_text())
            if not cost["refusal"]:
                print(cell, tool, cost, flush=True)
                _write(directory / "kl.json", judge().compare(out, cell))
                shutil.rmtree(out)
    found = kept | {(cell, row["tool"]): row for cell in CELLS for row in _rows(work, cell)}
    rows = sorted(found.values(), key=lambda row: (CELLS.index(row["cell"]), row["tool"]))
    print(table := markdown(rows, list(texts)))
    if args.table is not None:
        _write(args.table.with_suffix(".json"), facts | {"rows": rows})
        args.table.with_suffix(".md").write_text(table)


def tools(cell: str, efforts: list[str], pythons: dict[str, str], llama: list[str]) -> Iterator[list[str]]:
    """Each tool that has the cell: name, interpreter, script, and its words behind model, samples and output."""
    weights_only = re.fullmatch(r"W(\d)A16@(\d+)", cell)
    for effort in efforts:
        yield [f"octavo {effort}", sys.executable, str(HERE / "octavo_samples.py"), cell, effort]
    if cell.startswith("Q4_K"):
        script = [pythons.get("llama", sys.executable), str(HERE / "llama_quantize.py"), cell, *llama]
        if llama:
            yield ["llama.cpp", *script]
            yield ["llama.cpp imatrix", *script, "imatrix"]
        return
    if "gptqmodel" in pythons and weights_only:
        yield ["GPTQModel", pythons["gptqmodel"], str(HERE / "gptqmodel_gptq.py"), *weights_only.groups()]
    if "llm-compressor" in pythons:
        yield ["llm-compressor", pythons["llm-compressor"], str(HERE / "llm_compressor.py"), cell]
    if "autoround" in pythons:
        yield ["AutoRound", pythons["autoround"], str(HERE / "autoround_tuned.py"), cell, AUTOROUND_STEPS]


def run(command: list[str], directory: Path) -> None:
    """A tool to its end; directory/cost.json has what it took (`measured.py`)."""
    directory.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(directory / "model", ignore_errors=True)
    files = [str(directory / name) for name in ("cost.json", "log")]
    if subprocess.run([sys.executable, str(HERE / "measured.py"), *files, *command], check=False).returncode:
        raise SystemExit(f"see {files[1]}")


def own_text(model: Path, samples: Path, work: Path) -> Path:
    """The samples and what octavo has the whole model write beside them."""
    directory = work / "own-text"
    out = directory / "samples.pt"
    if not (directory / "cost.json").exists():
        run([sys.executable, str(HERE / "own_text.py"), str(model), str(samples), str(out)], directory)
    if refusal := json.loads((directory / "cost.json").read_text())["refusal"]:
        raise SystemExit(f"{model.name} wrote no text: {refusal}; see {directory / 'log'}, and remove {directory}")
    return out


def trimmed(model: Path, work: Path, blocks: int) -> Path:
    """The model up to a block, as a checkpoint of its own."""
    out = work / f"model-{blocks}"
    if (out / "config.json").exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    kept = {name: tensor for name, tensor in load_file(model / "model.safetensors").items() if _is_kept(name, blocks)}
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    for file in model.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, out)
    config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": blocks}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:blocks]
    _write(out / "config.json", config)
    return out


def _is_kept(name: str, blocks: int) -> bool:
    found = re.search(r"layers\.(\d+)\.", name)
    return found is None or int(found[1]) < blocks


class Judge:
    """The original's last hidden states on all texts, and how far the predictions of others are from its own."""

    def __init__(self, model: Path, texts: dict[str, Path], windows: int, work: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(model)
        self._windows = {kind: _windows(tokenizer(text.read_text()).input_ids, windows) for kind, text in texts.items()}
        self._head = self._model.get_output_embeddings().weight.detach().clone()
        work.mkdir(parents=True, exist_ok=True)
        self._hidden_file = work / "hidden.pt"
        self._parameters = dict(self._model.state_dict())

    @torch.inference_mode()
    def compare(self, out: Path, cell: str) -> dict[str, Any]:
        """KL(original || the original with a checkpoint's weights) in nats a token, the mean of each window of a text.

        Also the megabytes of the checkpoint's tensors.
        """
        truth = self._original()
        directory = next(file.parent for file in out.rglob("config.json"))
        checkpoint = Checkpoint.open(directory, LAYOUTS)
        kept = {}
        hooks = []
        asked = parse_scheme(cell).activation if checkpoint.quantization is None else None
        for name, weight in _weights(checkpoint):
            if name not in self._parameters:
                raise SystemExit(f"the original has no {name}")
            module = name.rpartition(".")[0]
            layer = self._model.get_submodule(module)
            rounds = None
            if isinstance(weight, QuantizedWeight):
                rounds = input_rounding(weight.scheme.activation, weight.input_scale, CPU)
                weight = weight.dequantize()
            elif isinstance(layer, torch.nn.Linear) and "layers." in module:
                rounds = input_rounding(asked, None, CPU)  # of a checkpoint that has the rounded weights alone
            if rounds is not None:
                hooks.append(layer.register_forward_pre_hook(_rounding(rounds)))
            kept[name] = self._parameters[name].clone()
            self._parameters[name].copy_(weight)
        found = {
            kind: [round(self._kl(ids, hidden), 6) for ids, hidden in zip(windows, truth[kind], strict=True)]
            for kind, windows in self._windows.items()
        }
        for hook in hooks:
            hook.remove()
        for name, weight in reversed(kept.items()):  # of tensors that are one the first kept is the original's
            self._parameters[name].copy_(weight)
        size = sum(checkpoint.spec(name).nbytes for name in checkpoint.names)
        if (directory / "model.gguf").exists():
            size = (directory / "model.gguf").stat().st_size
        return {"MB": round(size / 1e6, 1), "KL": found}

    def _original(self) -> dict[str, list[Tensor]]:
        """Each window's last hidden states [T, hidden]."""
        if not self._hidden_file.exists():
            hidden = {kind: [self._run(ids) for ids in windows] for kind, windows in self._windows.items()}
            torch.save(hidden, self._hidden_file)
        return torch.load(self._hidden_file)

    def _run(self, ids: Tensor) -> Tensor:
        return self._model.base_model(ids[None]).last_hidden_state[0]

    def _kl(self, ids: Tensor, original: Tensor) -> float:
        before = F.log_softmax(original @ self._head.T, -1)
        after = F.log_softmax(self._model.get_output_embeddings()(self._run(ids)), -1)
        return float((before.exp() * (before - after)).sum(-1).mean())


def _weights(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
    """All weights and biases, by the original's names."""
    for name in sorted(checkpoint.names):
        if name.endswith((".weight", ".bias")) and name.rpartition(".")[0] not in checkpoint.quantized:
            yield name, checkpoint.tensor(name)
    for module in checkpoint.quantized:
        yield f"{module}.weight", checkpoint.linear(module)
        if checkpoint.has(f"{module}.bias"):
            yield f"{module}.bias", checkpoint.tensor(f"{module}.bias")


def _rounding(rounds: Round) -> Any:
    def hook(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        x = inputs[0]
        return rounds(x.reshape(-1, x.shape[-1])).view(x.shape)

    return hook


def _windows(token_ids: list[int], count: int) -> list[Tensor]:
    """Windows that are evenly spread over a text."""
    room = len(token_ids) - WINDOW
    return [torch.tensor(token_ids[begin : begin + WINDOW]) for begin in range(0, room, room // count)][:count]


def _rows(work: Path, cell: str) -> Iterator[dict[str, Any]]:
    """What WORK has of a cell."""
    for file in sorted((work / cell).glob("*/cost.json")):
        judged = file.with_name("kl.json")
        row = {"cell": cell, "tool": file.parent.name.replace("-", " ").replace("llm compressor", "llm-compressor")}
        row |= json.loads(file.read_text())
        if judged.exists() or row["refusal"]:
            yield row | (json.loads(judged.read_text()) if judged.exists() else {})


def _kept(table: Path | None, facts: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows of an earlier run of a table, by cell and tool."""
    file = None if table is None else table.with_suffix(".json")
    if file is None or not file.exists():
        return {}
    earlier = json.loads(file.read_text())
    rows = earlier.pop("rows")
    if earlier != facts:
        raise SystemExit(f"{file} is a table of {earlier}, and this would be one of {facts}: give it another name")
    return {(row["cell"], row["tool"]): row for row in rows}


def _write(file: Path, value: object) -> None:
    """All of it or nothing."""
    beside = file.with_name(f".{file.name}")
    beside.write_text(json.dumps(value, indent=1) + "\n")
    beside.replace(file)


if __name__ == "__main__":
    main()
