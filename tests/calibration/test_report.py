"""The report: JSON there and back, a page that needs nothing else, files that appear whole."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from report_example import QUALITY, report, row
from rich.console import Console

from octavo.calibration.report.files import write_reports, write_whole
from octavo.calibration.report.html import render_html
from octavo.calibration.report.model_card import model_card
from octavo.calibration.report.report import EmbeddingQuality, Report, ReportError
from octavo.calibration.report.terminal import print_report
from octavo.calibration.report.weight_error import by_kind, squared_error
from octavo.calibration.verify import BlockSnr
from octavo.quant.qparams import quantize_weight
from octavo.quant.scheme import PRESETS
from octavo.server.web.page import MAGIC

NASTY = '<script src="https://example.org/x.js">&"\'$x^2$-->'
VOID = {"meta"}


def test_json_gives_the_same_report_back() -> None:
    text = report().to_json()
    assert Report.from_json(text) == report()
    content = json.loads(text)
    assert content["schema_version"] == 1
    assert content["sizes"] == {
        "before": 10_000, "after": 2_500, "saved": 7_500, "ratio": 4.0, "bits_per_weight": 272 * 8 / (8 * 64)
    }  # fmt: skip
    assert content["quality"]["blocks"][0] == {"block": 0, "snr_db": None}
    assert content["seconds"] == {"quantize": 1.23}
    assert [layer["block"] for layer in content["layers"]] == [0, 0, 1]
    bare = report(quality=None, verdict=None, calibration=None, base_model=None)
    assert Report.from_json(bare.to_json()) == bare


def test_a_reader_takes_fields_that_it_does_not_know() -> None:
    content = json.loads(report().to_json()) | {"later": [1]}
    content["quality"]["later"] = 1
    assert Report.from_json(json.dumps(content)) == report()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema 2; this octavo .* reads 1"),
        ({"schema_version": None}, "no report that octavo wrote"),
        ({"sizes": {"before": "much"}}, r"no report that octavo wrote.*\$\.sizes"),
    ],
)
def test_what_is_no_report_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ReportError, match=message):
        Report.from_json(json.dumps(json.loads(report().to_json()) | change))
    with pytest.raises(ReportError, match="no report"):
        Report.from_json("{")


def test_kinds_add_up_their_layers() -> None:
    rows = [row(0, "mlp.experts.0.up_proj", 1.0), row(0, "mlp.experts.12.up_proj", 3.0), row(0, "mlp.up_proj", 0.0)]
    experts, plain = by_kind(rows)
    assert (experts.kind, experts.count, experts.bytes_before) == ("mlp.experts.*.up_proj", 2, 2048)
    assert experts.snr_db == pytest.approx(10 * torch.log10(torch.tensor(200 / 4)).item(), rel=1e-6)
    assert experts.worst_layer == "model.layers.0.mlp.experts.12.up_proj"
    assert plain.snr_db is None


@pytest.mark.parametrize("name", ["W4A16_ASYM", "FP8_BLOCK"])
def test_squared_error_is_that_of_the_whole_matrix(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of rows, also where a piece ends within a block of scales."""
    monkeypatch.setattr("octavo.calibration.report.weight_error.ROWS_AT_A_TIME", 1000)
    weight = torch.randn(300, 256, generator=torch.Generator().manual_seed(0))
    quantized = quantize_weight(weight, PRESETS[name])
    difference = weight.double() - quantized.dequantize().double()
    expected = (float(weight.double().square().sum()), float(difference.square().sum()))
    assert squared_error(weight, quantized) == pytest.approx(expected, rel=1e-5)  # squares in float32


class Page(HTMLParser):
    """Every tag is closed in order, and all that could lead elsewhere is kept."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parse(text: str) -> Page:
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    return page


def test_the_page_is_whole_and_leads_nowhere() -> None:
    text = render_html(report())
    assert render_html(report()) == text
    assert text.encode().startswith(MAGIC)  # or the server would not show it
    page = parse(text)
    assert page.tags.count("svg") == 3
    assert not {"script", "style", "link", "img", "iframe", "a", "object"} & set(page.tags[page.tags.index("body") :])
    assert not {"src", "srcset"} & {name for name, _ in page.attributes}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert all(value.startswith("#") for name, value in page.attributes if name.endswith("href"))
    assert not re.search(r"https?:|//|url\((?!#)|@import", text.removeprefix("<!DOCTYPE html>"))
    for shown in ("perplexity", "0.0200", "FAILED", "--group-size 32", "a warning", "self_attn.q_proj", "someone/tiny"):
        assert shown in page.text
    for shown in (
        "0 to 1e-06 nats: 3 tokens",
        "10 to more nats: 7 tokens",
        "block 1: 30.2 dB",
        "worst: model.layers.1.mlp",
    ):
        assert shown in page.text  # under the pointer
    assert not re.search("#00000[1-4]", text)  # colors that the plots have before they are the page's


def test_the_page_escapes_what_strangers_named() -> None:
    layers = (replace(row(0, "mlp.up_proj", 1.0), module=NASTY, kind=NASTY, scheme=NASTY),)
    nasty = report(
        model=NASTY, scheme=NASTY, base_model=NASTY, layers=layers, kinds=by_kind(layers), warnings=(NASTY,),
        ignore=(NASTY,), options={NASTY: NASTY}, quality=replace(QUALITY, text=NASTY),
    )  # fmt: skip
    page = parse(render_html(nasty))
    assert not {"script", "src", "onerror"} & {*page.tags, *(name for name, _ in page.attributes)}
    assert page.text.count(NASTY) >= 8


@pytest.mark.parametrize(
    "changes",
    [
        {"quality": None, "verdict": None},
        {"layers": (), "kinds": ()},
        {"quality": replace(QUALITY, blocks=(), mean_kl=0.0, p99_kl=0.0)},
        {"quality": replace(QUALITY, blocks=(BlockSnr(0, None), BlockSnr(1, None)), mean_kl=50.0)},
    ],
)
def test_the_page_does_without_what_was_not_measured(changes: dict[str, object]) -> None:
    parse(render_html(report(**changes)))


def test_the_report_is_printed() -> None:
    console = Console(width=160, record=True)
    print_report(report(), console)
    printed = console.export_text()
    for shown in ("4.00x smaller, 4.25 bits", "10.000 -> 10.500 (+5.00%)", "91.2%", "FAILED", "30.2 dB behind block 1"):
        assert shown in printed
    assert "a warning" in printed


def test_an_encoder_s_cosines_are_its_quality() -> None:
    """Nothing says that it was not measured: not the terminal, nor the page, nor the card."""
    of_encoder = report(quality=None, verdict=None, embeddings=EmbeddingQuality(0.99921, 0.99849, 100))
    assert Report.from_json(of_encoder.to_json()) == of_encoder
    console = Console(width=160, record=True)
    print_report(of_encoder, console)
    printed = console.export_text()
    assert "cosine to the original over 100 texts: 0.99921, at the least 0.99849" in printed
    page = parse(render_html(of_encoder)).text
    card = model_card(of_encoder, "tiny", None)
    for text in (printed, page, card):
        assert "0.99921" in text
        assert "0.99849" in text
        assert "not measured" not in text


def test_files_appear_whole(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir(), out.mkdir()
    for _ in range(2):  # written again over what is there
        write_reports(out, report(), source=source)
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "quantization_report.html", "quantization_report.json",
    ]  # fmt: skip
    assert Report.from_json((out / "quantization_report.json").read_text()) == report()
    with pytest.raises(UnicodeEncodeError):
        write_whole(out / "README.md", "half \udc80")
    assert (out / "README.md").read_text().startswith("---\n")
    assert len(list(out.iterdir())) == 3
