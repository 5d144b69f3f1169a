"""`octavo quantize` and `octavo.quantize` given what can't work: one line that says what, and nothing left behind.

Each row of docs/errors.md about quantizing is a case here or in test_quantize_model.py, which has the disk's.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import octavo
from octavo.calibration import quantize_model as module
from octavo.calibration.block import Block
from octavo.calibration.layers import QuantizeError
from octavo.calibration.recipe import Recipe, RecipeError
from octavo.calibration.workspace import MANIFEST, read_manifest
from octavo.cli import main

Tensors = dict[str, torch.Tensor]
FIRST = "model.layers.0."
INTEGERS = ("--scheme", "W4A16", "--group-size", "32")
W4 = (*INTEGERS, "--algorithm", "rtn")
GPTQ = (*INTEGERS, "--algorithm", "gptq", "--num-calibration-samples", "4", "--max-seq-length", "32")
TEXT = "The quick brown fox jumps over the lazy dog while forty two files are opened, read and closed again. "


@pytest.fixture
def model(tmp_path: Path, fixtures: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(fixtures / "tiny", copy, ignore=shutil.ignore_patterns("expected.safetensors"))
    (tmp_path / "text.txt").write_text("\n\n".join(f"{i}. {TEXT}" for i in range(100)))
    return copy


def edit(model: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def configure(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def quantize(model: Path, *options: Any) -> int:
    data = () if "rtn" in options else ("--dataset", model.parent / "text.txt")
    arguments = [model, "-o", model.parent / "out", "--no-eval", *data, *options]
    return main(["quantize", *map(str, arguments)])


def refusal(capsys: pytest.CaptureFixture[str], model: Path, *options: Any) -> str:
    """The one line of a run that is refused, which leaves nothing."""
    before = sorted(path.name for path in model.parent.iterdir())
    assert quantize(model, *options) == 1
    assert sorted(path.name for path in model.parent.iterdir()) == before
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    return error


BROKEN: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "norm missing": (lambda t: t.pop(f"{FIRST}input_layernorm.weight"), "has no weights for model.layers.0.input_lay"),
    "head missing": (lambda t: t.pop("lm_head.weight"), "has no weights for lm_head"),
    "wrong shape": (
        lambda t: t.update({f"{FIRST}mlp.up_proj.weight": torch.zeros(352, 96)}),
        "up_proj.weight is [352, 96] in the checkpoint; config.json makes it [352, 128]",
    ),
    "embedding": (lambda t: t.update({"model.embed_tokens.weight": torch.zeros(500, 128)}), "is [500, 128]"),
    "one too many": (lambda t: t.update({"model.layers.7.mlp.up_proj.weight": torch.zeros(2, 2)}), "doesn't: model.la"),
}


@pytest.mark.parametrize("options", [W4, GPTQ], ids=["rtn", "gptq"])
@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_whole_model(
    model: Path, capsys: pytest.CaptureFixture[str], case: str, options: tuple[str, ...]
) -> None:
    change, message = BROKEN[case]
    edit(model, change)
    error = refusal(capsys, model, *options)
    assert "is not a whole model" in error
    assert message in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": "4"}, "Expected `int | null`, got `str` - at `num_attention_heads`"),
        ({"hidden_size": 64}, "config.json makes it [1024, 64]"),
        ({"num_hidden_layers": 3}, "has no weights for model.layers.2"),
        ({"rope_parameters": [1]}, "at `rope_parameters`"),
    ],
)
def test_a_config_that_is_wrong(
    model: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    configure(model, **changes)
    assert message in refusal(capsys, model, *W4)


def test_an_architecture_that_is_unknown(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure(model, model_type="martian")
    error = refusal(capsys, model, *GPTQ)
    assert "model_type 'martian' has no decoder here" in error
    assert "algorithm rtn with a scheme whose activations are dynamic" in error
    assert quantize(model, *W4) == 0
    report = json.loads((model.parent / "out" / "quantization_report.json").read_text())
    assert any("its linear layers were told by their tensors' names" in warning for warning in report["warnings"])


@pytest.mark.parametrize("algorithm", ["gptq", "awq", "smoothquant"])
def test_activations_that_overflow(model: Path, capsys: pytest.CaptureFixture[str], algorithm: str) -> None:
    def overflow(tensors: Tensors) -> None:
        for name, factor in (("up_proj", 1e30), ("gate_proj", 1e20)):
            tensors[f"{FIRST}mlp.{name}.weight"] *= factor

    edit(model, overflow)
    error = refusal(capsys, model, *GPTQ, "--algorithm", algorithm)
    assert "model.layers.0.mlp.down_proj: its input holds NaN or infinity" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((*W4, "--dataset", "text.txt"), "uses no calibration text"),
        ((*W4, "--smoothing-strength", "0.5"), "smoothing is SmoothQuant's"),
        ((*W4, "--act-order", "none"), "act_order is GPTQ's"),
        ((*W4, "--true-sequential"), "true_sequential is for algorithms that measure inputs"),
        ((*W4, "--bits-budget", "1"), "the smallest schemes take 2.50 bits per weight"),
        ((*W4, "--bits-budget", "5", "--format", "awq"), "format awq has one for all"),
        ((*GPTQ, "--offload-dir", "/nowhere/at/all"), "is not a directory that is there"),
        ((*GPTQ, "--max-seq-length", "4096"), "the model has 512 positions; 512 works"),
        (("--scheme", "W4A16", "--group-size", "64"), "32 is the largest that fits all: --group-size 32"),
    ],
)
def test_options_that_can_not_be(
    model: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert message in refusal(capsys, model, *options)


RECIPES: dict[str, Any] = {
    "dampening -1 is not a number from 0 to 1": {"algorithm": "gptq", "dampening": -1},
    "smoothing 7 is not a number from 0 to 1": {"algorithm": "smoothquant", "smoothing": 7},
    "pattern 're:(' is not a regex": {"layers": {"re:(": "W8A16@32"}},
    "algorithm": {"algorithm": "gtpq"},
    "format": {"format": "ggml"},
    "search": {"search": "best"},
    "act_order": {"algorithm": "gptq", "act_order": "desc"},
    "scheme": {"scheme": 4},
    "kv_cache": {"kv_cache": 8},
}


@pytest.mark.parametrize("message", RECIPES)
def test_a_recipe_that_is_none(message: str) -> None:
    with pytest.raises(RecipeError, match=message.replace("(", r"\(")):
        Recipe(**{"scheme": "W4A16@32"} | RECIPES[message])


def test_a_recipe_file_that_is_not_text(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = model.parent / "recipe.json"
    path.write_bytes(b'{"octavo_recipe": 1, "scheme": "\xe9"}')
    assert "recipe.json is not a recipe: 'utf-8' codec" in refusal(capsys, model, "--recipe", path)


def test_a_link_to_nothing_beside_the_weights(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "merges.txt").symlink_to("/blobs/not-downloaded")
    assert "merges.txt is a link to nothing: the download is incomplete" in refusal(capsys, model, *W4)


def test_the_place_of_the_work_is_no_directory(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    precious = model.parent / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    (model.parent / ".out.partial").symlink_to(precious)
    assert "isn't a directory; remove it" in refusal(capsys, model, *W4)
    assert (precious / "file").read_text() == "kept"


def test_the_function_takes_what_people_write(model: Path) -> None:
    out = model.parent / "out"
    report = octavo.quantize(model, out, scheme="W4A16@32", algorithm="rtn", ignore="down_proj", evaluate=False)
    assert {layer.kind for layer in report.layers} & {"mlp.down_proj"} == set()
    with pytest.raises(RecipeError, match="--bits-budget nan: a number above 0 is needed"):
        octavo.quantize(model, out, scheme="W4A16@32", bits_budget=float("nan"), overwrite=True)
    with pytest.raises(RecipeError, match="recipe is a dict"):
        octavo.quantize(model, out, recipe={"scheme": "W4A16"})  # type: ignore[arg-type]


def press_ctrl_c() -> None:
    raise KeyboardInterrupt


def killed(
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    *options: Any,
    by: Callable[[], Any] = press_ctrl_c,
    code: int = 130,
) -> Path:
    """What a run leaves that ends behind its first block."""
    advance = Block.advance

    def interrupted(block: Block, *hidden: Any) -> Any:
        if block.index == 1:
            by()
        return advance(block, *hidden)

    with monkeypatch.context() as patch:
        patch.setattr(Block, "advance", interrupted)
        assert quantize(model, *GPTQ, "--kv-cache-scheme", "fp8", *options) == code
    return model.parent / ".out.partial"


def fill_the_disk() -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        full.write(b"x")


@pytest.mark.parametrize(
    ("by", "message"),
    [
        (fill_the_disk, "No space left on device; --resume goes on with it"),
        (lambda: bytearray(1 << 62), "out of memory; --resume goes on with it"),
        (lambda: torch.empty(1 << 60), "out of memory; --resume goes on with it"),
    ],
    ids=["disk", "Python's memory", "torch's memory"],
)
def test_finished_blocks_outlive_a_full_disk_and_full_memory(
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    by: Callable[[], Any],
    message: str,
) -> None:
    assert quantize(model, *GPTQ, "--kv-cache-scheme", "fp8") == 0
    whole = (model.parent / "out").rename(model.parent / "whole")
    capsys.readouterr()
    partial = killed(model, monkeypatch, by=by, code=1)
    assert capsys.readouterr().err.strip().endswith(message)
    assert set(read_manifest(partial)["units"]) == {"outside", "model.layers.0"}
    assert quantize(model, *GPTQ, "--kv-cache-scheme", "fp8", "--resume") == 0
    written = (model.parent / "out" / "model.safetensors").read_bytes()
    assert written == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--group-size", "-1"), "has another recipe (scheme 'W4A16@32')"),
        (("--max-seq-length", "16"), "has another calibration text"),
        (("--offload-dir", "."), "--offload-dir must be the one that the run was started with"),
    ],
)
def test_work_stays_that_other_options_can_not_go_on_with(
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    partial = killed(model, monkeypatch)
    assert set(read_manifest(partial)["units"]) == {"outside", "model.layers.0"}
    capsys.readouterr()
    assert message in refusal(capsys, model, *GPTQ, "--kv-cache-scheme", "fp8", "--resume", *options)
    (partial / "tokenizer.json").unlink()
    assert quantize(model, *GPTQ, "--kv-cache-scheme", "fp8", "--resume") == 0
    assert (model.parent / "out" / "tokenizer.json").is_file()


def test_what_appears_at_the_output_meanwhile_is_not_replaced(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = model.parent / "out"
    finish = module._finish

    def somebody_else_writes(*run: Any) -> None:
        out.mkdir()
        (out / "thesis.txt").write_text("three years of work")
        finish(*run)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_finish", somebody_else_writes)
        assert quantize(model, *GPTQ) == 1
    assert "was made meanwhile, by something else: move it away, then --resume" in capsys.readouterr().err
    assert (out / "thesis.txt").read_text() == "three years of work"
    out.rename(model.parent / "elsewhere")
    assert quantize(model, *GPTQ, "--resume") == 0


def test_a_manifest_that_is_none_is_no_work(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (killed(model, monkeypatch) / MANIFEST).write_text("[]")
    assert quantize(model, *GPTQ, "--kv-cache-scheme", "fp8", "--resume") == 0, capsys.readouterr().err


def test_a_run_that_is_killed_between_its_last_renames(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As SIGKILL would leave it: the first shard has its name already, the second has not."""
    partial = killed(model, monkeypatch, "--max-shard-size", "700KB")
    first = min(partial.glob("*.part"))
    first.rename(first.with_suffix(""))
    more = ("--max-shard-size", "700KB", "--resume")
    assert quantize(model, *GPTQ, "--kv-cache-scheme", "fp8", *more) == 0, capsys.readouterr().err


def test_nothing_stays_where_hidden_states_are_offloaded(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offload = tmp_path / "offload"
    offload.mkdir()
    seen: list[str] = []
    checked = module._checked

    def broken(item: Any) -> torch.Tensor:
        seen.extend(os.listdir(offload))
        if ".layers.1." in item.name:
            raise QuantizeError("broken")
        return checked(item)

    monkeypatch.setattr(module, "_checked", broken)
    assert quantize(model, *GPTQ, "--offload-dir", offload) == 1
    assert seen
    assert os.listdir(offload) == []
