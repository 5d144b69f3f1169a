"""The model card (README.md) of a quantized checkpoint, as the Hub reads it, with the original's own card below it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from octavo.calibration.report.report import Report, source_note
from octavo.calibration.report.tables import quality_table

INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
FEW_BITS = ("int2", "int3")  # which vLLM reads from compressed-tensors from 0.32 on


@dataclass(frozen=True)
class Card:
    """A README.md of the Hub: its YAML front matter, and the text below."""

    metadata: dict[str, Any] = field(default_factory=dict)
    text: str = ""


def parse_card(content: str) -> Card:
    """A card from a file's content. Front matter that is not YAML is left in the text: nothing of it is lost."""
    from huggingface_hub import RepoCard  # takes a second to import

    content = content.removeprefix("\ufeff").replace("\r\n", "\n")
    if not content.startswith("---"):
        return Card(text=content)
    try:
        card = RepoCard(content, ignore_metadata_errors=True)
        return Card(dict(vars(card.data)), card.text)
    except Exception:  # whatever the YAML of a stranger makes a parser raise
        return Card(text=content)


def model_card(report: Report, directory: str, original: str | None) -> str:
    """README.md of the checkpoint in the directory of that name; original: the content of the original's, or None.

    Licence, language and task are the original card's. Its text stands below, under "Original model card".
    """
    from huggingface_hub.repocard_data import CardData

    card = parse_card(original or "")
    parts = [
        f"---\n{CardData(**_metadata(report, card)).to_yaml()}\n---",
        f"# {report.model} {report.scheme}",
        _introduction(report),
        _quality(report),
        _serving(report, directory),
        _making(report),
        _license(card),
    ]
    if card.text.strip():
        parts.append(f"## Original model card\n\n{card.text.strip()}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(report: Report, card: Card) -> dict[str, Any]:
    inherited = {key: card.metadata[key] for key in INHERITED if card.metadata.get(key) is not None}
    relation = {"base_model": report.base_model, "base_model_relation": "quantized"} if report.base_model else {}
    theirs = card.metadata.get("tags")
    tags = [*_tags(report), *(map(str, theirs) if isinstance(theirs, list) else ())]
    return {
        **relation,
        "library_name": "transformers",
        **({"pipeline_tag": "text-generation"} | inherited),
        "tags": list(dict.fromkeys(tags)),
    }


def _tags(report: Report) -> list[str]:
    tags = ["octavo", report.format, report.algorithm, report.scheme.partition("@")[0].lower()]
    bits = {scheme.partition("/")[0] for kind in report.kinds for scheme in kind.schemes}
    names = {f"int{count}": f"{count}-bit" for count in (2, 3, 4, 5, 6, 8)} | {"fp4_e2m1": "fp4", "fp8_e4m3": "fp8"}
    return tags + [names[name] for name in sorted(bits) if name in names]


def _introduction(report: Report) -> str:
    hub_id = report.base_model
    original = f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else report.model
    schemes = ", ".join(f"`{scheme}`" for scheme in dict.fromkeys(s for kind in report.kinds for s in kind.schemes))
    size = report.sizes
    return (
        f"{original} quantized to {report.scheme} ({schemes}) by octavo {report.versions['octavo']}: "
        f"{size.before / 1e6:,.1f} MB of weights became {size.after / 1e6:,.1f} MB, {size.ratio:.2f} times smaller."
        + (f" {source_note(report.source)}" if report.source else "")
    )


def _quality(report: Report) -> str:
    quality = report.quality
    if report.embeddings is not None:
        cosines = report.embeddings
        return (
            f"## Quality\n\nIts vectors have a mean cosine of {cosines.mean:.5f} to the original's in float32, and of "
            f"{cosines.least:.5f} at the least, over {cosines.num_texts} texts, through octavo's serving path."
        )
    if quality is None:
        return "## Quality\n\nIt was not measured."
    lines = [
        "## Quality",
        "",
        quality_table(report).to_markdown().strip(),
        "",
        f"Measured over {quality.num_tokens:,} tokens of {quality.text}, in windows of {quality.window}, through "
        "octavo's serving path. `quantization_report.html` has the plots, `quantization_report.json` every figure.",
    ]
    if report.verdict is not None and not report.verdict.passed:
        lines += ["", *(f"**{line}**  " for line in report.verdict.lines()[:1])]
    return "\n".join(lines)


def _serving(report: Report, directory: str) -> str:
    few = any(scheme.startswith(FEW_BITS) for kind in report.kinds for scheme in kind.schemes)
    path = shlex.quote(f"./{directory}")
    new = few and report.format == "compressed-tensors"
    note = "\n\nvLLM reads these few bits from 0.32 on, on GPUs with its Humming kernels." if new else ""
    return f"## Serving\n\n```sh\noctavo serve {path}\nvllm serve {path}\n```{note}{_listed(report.warnings)}"


def _making(report: Report) -> str:
    facts = [f"format: {report.format}", f"algorithm: {report.algorithm}"]
    facts += [f"{name}: {value}" for name, value in report.options.items() if value is not None]
    if report.kv_cache:
        facts.append(f"KV cache: {report.kv_cache}")
    data = report.calibration
    if data is not None:
        made = "text that the model itself generated" if data.generated else data.source
        facts.append(f"calibration text: {made}, {data.samples} samples, {data.tokens:,} tokens, seed {data.seed}")
    kept = [name for name in report.ignore if name != "lm_head"]
    head = "lm_head, " if "lm_head" in report.ignore else ""
    table = "" if any(kind.kind == "embedding" for kind in report.kinds) else "embeddings, "
    facts.append(f"not quantized: {head}{table}norms{_counted(kept)}")
    return f"## How it was made{_listed(facts)}"


def _license(card: Card) -> str:
    if card.metadata.get("license"):
        return ""
    return "## License\n\nThe original's card names no license; its terms, whatever they are, hold for this copy too."


def _counted(names: list[str], most: int = 6) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:most])
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f", {shown}{more}" if names else ""


def _listed(lines: Iterable[str]) -> str:
    items = "\n".join(f"- {line}" for line in lines)
    return f"\n\n{items}" if items else ""
