"""The model card, read back by a YAML parser, with cards of originals as they are found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import yaml
from report_example import report

from octavo.calibration.report.model_card import model_card, parse_card
from octavo.calibration.report.weight_error import KindRow

ORIGINAL = """---
license: other
license_name: llama3.1
license_link: LICENSE
language: [en, de]
tags: [conversational, octavo]
base_model: someone/older
pipeline_tag: text-generation
---

# Tiny

It answers.
"""


def front_matter(card: str) -> tuple[dict[str, Any], str]:
    start, yaml_text, text = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(yaml_text), text


def test_license_language_and_task_are_the_originals() -> None:
    metadata, text = front_matter(model_card(report(), "tiny-w4a16", ORIGINAL))
    assert metadata == {
        "base_model": "someone/tiny",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": "llama3.1",
        "license_link": "LICENSE",
        "language": ["en", "de"],
        "tags": ["octavo", "compressed-tensors", "gptq", "w4a16", "4-bit", "8-bit", "conversational"],
    }
    assert text.rstrip().endswith("## Original model card\n\n# Tiny\n\nIt answers.")
    assert "## License" not in text


def test_the_card_tells_what_it_cost_and_how_to_serve() -> None:
    _, text = front_matter(model_card(report(), "it's tiny", None))
    for shown in (
        "[someone/tiny](https://huggingface.co/someone/tiny) quantized to W4A16@64",
        "| perplexity | 10.000 | 10.500 |",
        "| KL to the original per token, mean, nats | 0 | 0.0200 |",
        "| same most likely token as the original | 100% | 91.2% |",
        "octavo serve './it'\"'\"'s tiny'",
        "vllm serve ",
        "**FAILED: mean KL 0.0200 is above 0.01",
        "calibration text: text that the model itself generated, 32 samples, 16,384 tokens, seed 7",
        "- a warning",
        "names no license",
    ):
        assert shown in text
    assert "Original model card" not in text


def test_without_a_hub_id_no_base_model_is_claimed() -> None:
    metadata, text = front_matter(model_card(report(base_model=None), "out", ORIGINAL))
    assert "base_model" not in metadata
    assert "base_model_relation" not in metadata
    assert "tiny quantized to W4A16@64" in text


def test_three_bits_are_for_a_new_vllm() -> None:
    three = report(kinds=tuple(_with_scheme(kind, "int3/g64") for kind in report().kinds))
    _, text = front_matter(model_card(three, "out", None))
    assert "vllm serve ./out" in text
    assert "vLLM reads these few bits from 0.32 on" in text
    _, text = front_matter(model_card(replace(three, format="gptq"), "out", None))
    assert "vllm serve ./out" in text
    assert "0.32" not in text


def test_what_stays_is_named() -> None:
    _, text = front_matter(model_card(report(), "out", None))
    assert "embeddings, norms" in text
    quantized = report(kinds=(*report().kinds, replace(report().kinds[0], kind="embedding")))
    _, text = front_matter(model_card(quantized, "out", None))
    assert "embeddings" not in text


def _with_scheme(kind: KindRow, scheme: str) -> KindRow:
    return replace(kind, schemes=(scheme,))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "no front matter\n---\nbut a rule",
        "---\nnot: [closed\n---\ntext",
        "---\njust text\n---\ntext",
        "---\n---\ntext",
        "---\nlicense:\ntags: one\nlanguage: no\n---\ntext",
        "---\nlicense: mit",
    ],
)
def test_a_card_is_made_of_whatever_stands_there(content: str) -> None:
    """Front matter that can't be read is kept as text: nothing of the original is lost."""
    metadata, text = front_matter(model_card(report(), "out", content))
    assert metadata["base_model"] == "someone/tiny"
    kept = parse_card(content).text.strip()
    assert kept in text
    assert ("text" in content) <= ("text" in kept)


def test_windows_line_ends_and_a_byte_order_mark_do_not_hide_front_matter() -> None:
    card = parse_card("\ufeff" + ORIGINAL.replace("\n", "\r\n"))
    assert card.metadata["license_name"] == "llama3.1"
