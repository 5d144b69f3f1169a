"""`octavo inspect` of the formats of GPTQ and AWQ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from trimmed import whole

from octavo.cli import main

# name -> (format, scheme, bytes of the two down_proj [128, 352], whose 11 groups are scales of two bytes)
SCALES = 11 * 128 * 2
FOUND = {
    "tiny--autogptq-w4g32": ("gptq", "int4/g32", 128 * 352 // 2 + SCALES + 11 * 128 // 2 + 352 * 4 + 128 * 2),
    "tiny--gptqmodel-w4g32-v2": ("gptq_v2", "int4/g32", 128 * 352 // 2 + SCALES + 11 * 128 // 2 + 352 * 4),
    "tiny--gptqmodel-w3g32": ("gptq", "int3/g32", 128 * 352 * 3 // 8 + SCALES + 11 * 128 * 3 // 8 + 352 * 4),
    "tiny--gptqmodel-w8g32": ("gptq", "int8/g32", 128 * 352 + SCALES + 11 * 128 + 352 * 4),
    "tiny--autoawq-w4g32": ("awq", "int4/g32/asym", 128 * 352 // 2 + SCALES + 11 * 128 // 2),
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
