"""`octavo inspect` of the formats of GPTQ and AWQ, and of the kernels that would serve a checkpoint."""

from __future__ import annotations

import html
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType
from gguf_oracle import write_gguf
from hf_oracle import CASES, make_hf, save
from trimmed import whole

from octavo.cli import main
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.decoder import Decoder
from octavo.runtime.model.weights import load_model

# name -> (format, scheme, bytes of the two down_proj [128, 352], whose 11 groups are scales of two bytes)
SCALES = 11 * 128 * 2
FOUND = {
    "tiny--autogptq-w4g32": ("gptq", "int4/g32", 128 * 352 // 2 + SCALES + 11 * 128 // 2 + 352 * 4 + 128 * 2),
    "tiny--gptqmodel-w4g32-v2": ("gptq_v2", "int4/g32", 128 * 352 // 2 + SCALES + 11 * 128 // 2 + 352 * 4),
    "tiny--gptqmodel-w3g32": ("gptq", "int3/g32", 128 * 352 * 3 // 8 + SCALES + 11 * 128 * 3 // 8 + 352 * 4),
    "tiny--gptqmodel-w8g32": ("gptq", "int8/g32", 128 * 352 + SCALES + 11 * 128 + 352 * 4),
    "tiny--autoawq-w4g32": ("awq", "int4/g32/asym", 128 * 352 // 2 + SCALES + 11 * 128 // 2),
    "tiny--torchao-int4": ("torchao", "int4/g32/asym", 128 * 352 + SCALES + 11 * 128),
}


@pytest.mark.parametrize("name", FOUND)
def test_layers_of_other_formats(fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main(["inspect", str(whole(fixtures / name, tmp_path)), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    format_, scheme, nbytes = FOUND[name]
    assert facts["format"] == format_
    rows = {row["kind"]: row for row in facts["layers"]}
    down = rows["model.layers.*.mlp.down_proj"]
    biases = 2 * 128 if "autogptq" in name else 0  # of zeros, which AutoGPTQ adds
    assert (down["scheme"], down["count"], down["bytes"]) == (scheme, 2, 2 * nbytes)
    assert down["parameters"] == 2 * 128 * 352 + biases
    assert rows["lm_head"]["parameters"] == 1024 * 128
    assert set(rows) == {
        "lm_head",
        "model.embed_tokens",
        "model.norm",
        *(f"model.layers.*.{norm}layernorm" for norm in ("input_", "post_attention_")),
        *(f"model.layers.*.mlp.{kind}_proj" for kind in ("gate", "up", "down")),
        *(f"model.layers.*.self_attn.{kind}_proj" for kind in "qkvo"),
    }
    assert "problem" not in facts["to_serve"]


def test_layers_of_a_gguf_file(
    fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write_gguf(fixtures / "tiny", tmp_path / "tiny.gguf", "llama", GGMLQuantizationType.Q8_0)
    assert main(["inspect", str(tmp_path / "tiny.gguf"), "--json"]) == 0
    rows = {row["kind"]: row for row in json.loads(capsys.readouterr().out)["layers"]}
    down = rows["model.layers.*.mlp.down_proj"]
    assert (down["scheme"], down["count"], down["bytes"]) == ("int8/g32", 2, 2 * 128 * 352 // 32 * 34)
    assert down["parameters"] == 2 * 128 * 352
    assert down["kernel"] is not None


SERVED = sorted(path.name for path in (Path(__file__).parents[1] / "fixtures").iterdir() if "--" in path.name)
FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}


def kernels_of(facts: dict[str, Any]) -> dict[str, set[str]]:
    """Kernels by the loader's names for layers; of a tied head, whose module is the embedding, too."""
    found: dict[str, set[str]] = {}
    for row in facts["layers"]:
        module = row["kind"].rpartition(".")[2]
        if row["kernel"] is not None:
            name = FUSED.get(module, module.removesuffix("_proj")).replace("embed_tokens", "lm_head")
            found.setdefault(name, set()).add(row["kernel"])
    return found


@pytest.mark.parametrize("name", SERVED)
def test_inspect_names_the_kernels_that_the_loader_chooses(
    fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    model = whole(fixtures / name, tmp_path)
    assert main(["inspect", str(model), "--json", "--device", "cpu"]) == 0
    facts = json.loads(capsys.readouterr().out)
    loaded = load_model(EngineConfig(model=str(model), device="cpu"))
    assert isinstance(loaded, Decoder)
    rows: dict[str, set[str]] = {}
    for kind, _, kernel in loaded.report_layers():  # "o (1 of 2)" where layers of a kind differ
        rows.setdefault(kind.partition(" (")[0].rpartition(".")[2], set()).add(kernel)
    assert kernels_of(facts) == {kind: rows[kind] for kind in ("qkv", "o", "gate_up", "down", "lm_head")}
    reasons = {row["reason"] for row in facts["layers"] if row["kernel"] and "dequantized" in row["kernel"]}
    assert reasons <= set(loaded.notes)


@pytest.mark.parametrize(
    ("name", "device", "kernel", "said"),
    [
        ("tiny--llmc-w8a8", "cuda:8.0", "int8 x int8", "int8 products, inputs rounded per token"),
        ("tiny--llmc-fp8-dynamic", "cuda:9.0", "fp8 x fp8, token", "fp8 products, inputs rounded per token"),
        ("tiny--llmc-fp8-dynamic", "cuda:8.0", "fp8 weights, 16 bits", "need compute capability 8.9"),
        ("tiny--gptqmodel-w4g32-act", "cuda:9.0", "int4 weights, 16 bits", "int4 weights decoded in registers"),
        (
            "tiny-moe--llmc-fp8-dynamic",
            "cuda:8.9",
            "grouped by expert, fp8 x fp8, token",
            "inputs rounded per token",
        ),
        ("tiny-moe--llmc-w4a16-g32", "cuda:8.6", "grouped by expert, int4 weights, 16 bits", "decoded in registers"),
    ],
)
def test_inspect_names_kernels_of_another_machine(
    fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, device: str, kernel: str, said: str
) -> None:
    model = str(whole(fixtures / name, tmp_path))
    assert main(["inspect", model, "--json", "--device", device]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["to_serve"]["device"] == f"a GPU of compute capability {device.removeprefix('cuda:')}"
    (down,) = (row for row in facts["layers"] if row["kind"].endswith("down_proj"))
    assert down["kernel"] == kernel
    assert down["batch_invariant"] is False
    assert said in down["reason"]
    assert main(["inspect", model, "--device", device]) == 0
    assert kernel in " ".join(capsys.readouterr().out.split())


def test_layers_of_a_name_are_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts, those that are shared and dense MLPs of a Nemotron all have an up_proj."""
    monkeypatch.setenv("COLUMNS", "500")
    assert main(["inspect", str(save(make_hf(*CASES["nemotron_h"]), tmp_path / "model"))]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "up_proj" in line and " for " in line]
    names = line.partition(" for ")[2].partition(":")[0].split(", ")
    assert sorted(names) == sorted(set(names))


def test_inspect_refuses_a_device_that_is_none(fixtures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", str(fixtures / "tiny"), "--device", "cuda:H100"])
    assert "'cuda:H100' is none of auto, cpu, cuda and such as cuda:9.0" in capsys.readouterr().err


def test_the_page_has_what_the_table_has(fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It needs nothing else, names no path of this machine, and lets no name out of a checkpoint be HTML."""
    model = tmp_path / "<i>tiny"
    shutil.copytree(fixtures / "tiny--gptqmodel-w3g32", model)
    config = json.loads((model / "config.json").read_text("utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["<script>alert(1)</script>"]}), "utf-8")
    page = tmp_path / "page.html"
    assert main(["inspect", str(model), "--device", "cpu", "--json", "--html", str(page)]) == 0
    facts = json.loads(capsys.readouterr().out)
    text = page.read_text("utf-8")
    for row in facts["layers"]:
        cells = (row["kind"].removeprefix("model."), row["scheme"], f"{row['count']}", f"{row['parameters']:,}")
        assert f'<th scope="row">{cells[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in cells[1:]) in text
        assert html.escape(row["reason"] or "") in text
    assert f"{facts['to_serve']['weight_bytes'] / 1e6:,.1f} MB" in text
    assert "<h1>&lt;i&gt;tiny</h1>" in text
    assert "&lt;script&gt;alert(1)" in text
    for forbidden in ("<script", "http:", "https:", "src=", "<link", str(tmp_path)):
        assert forbidden not in text


def test_the_page_says_why_a_model_is_not_served(
    fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(fixtures / "tiny", model)
    config = json.loads((model / "config.json").read_text("utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}), "utf-8")
    assert main(["inspect", str(model), "--json", "--html", str(tmp_path / "page.html")]) == 0
    problem = json.loads(capsys.readouterr().out)["to_serve"]["problem"]
    assert f"Not served by octavo&#x27;s decoder: {html.escape(problem)}" in (tmp_path / "page.html").read_text("utf-8")
    assert main(["inspect", str(fixtures / "tiny"), "--html", str(tmp_path / "none" / "page.html")]) == 1
    assert "No such file or directory" in capsys.readouterr().err
