"""Reports as values: what HTML, Markdown and CSV make of tables and charts, and a page that needs nothing else."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser

from octavo.report.chart import Chart, ChartPoint, Series
from octavo.report.page import HERE, LIBRARIES, Answer, Charts, Items, Page, Section, Tiles
from octavo.report.table import Cell, Table, to_csv

NASTY = "</script><img src=x onerror=alert(1)> & | \n"
CHART = Chart(
    NASTY,
    "x",
    "y",
    [
        Series(NASTY, [ChartPoint(1, 2.0, (1.5, 2.5), (0.5, 1.5), NASTY), ChartPoint(10, 3.0)], 0),
        Series("none", [], 1),
        Series("curve", [ChartPoint(1, 1.23456)], 7, dashed=True, markers=False),
    ],
    NASTY,
    y_logarithmic=True,
    limit=(2.5, "limit"),
)
PAGE = Page(
    NASTY,
    "sub",
    (
        Section("", (Answer((NASTY, "more"), unsure=True), Tiles(((NASTY, "what"),)))),
        Section("Table", (Table(NASTY, ("a", "b"), ((NASTY, Cell("1", NASTY, marked=True)),), note="note"),)),
        Section("Charts", (Charts((CHART, CHART)),)),
        Section("List", (Items((NASTY,)),)),
    ),
)


class Reader(HTMLParser):
    """The tags of a page, and its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script" and not self.scripts[-1]:
            self.scripts[-1] = data
        self.text += data


def test_a_page_needs_nothing_else_and_every_text_is_escaped() -> None:
    reader = Reader(PAGE.to_html())
    names = [tag for tag, _ in reader.tags]
    assert "img" not in names
    assert "link" not in names
    assert not [value for _, attributes in reader.tags for name, value in attributes.items() if name in ("src", "href")]
    assert len(reader.scripts) == 4  # the charts' configurations, two libraries, page.js
    configs = json.loads(reader.scripts[0])
    assert [config["data"]["datasets"][0]["label"] for config in configs] == [NASTY, NASTY]
    canvases = [attributes for tag, attributes in reader.tags if tag == "canvas"]
    assert [canvas["data-chart"] for canvas in canvases] == ["0", "1"]
    assert {canvas["aria-label"] for canvas in canvases} == {NASTY}


def test_a_page_without_charts_has_no_script() -> None:
    assert "<script" not in Page("t", "s", (Section("", (Items(("a",)),)),)).to_html()


def test_libraries_stand_in_the_page_with_their_licences() -> None:
    page = PAGE.to_html()
    for name in LIBRARIES:
        assert (HERE / "vendor" / name).read_text("utf-8") in page
    assert page.count("Permission is hereby granted, free of charge") >= 2
    assert "Chart.js Contributors" in page
    assert "Samuel Gratzl" in page


def test_a_chart_draws_points_with_their_intervals() -> None:
    config = CHART.config()
    first, curve, limit = config["data"]["datasets"]
    assert first["data"][0] == {"x": 1, "y": 2, "xMin": 0.5, "xMax": 1.5, "yMin": 1.5, "yMax": 2.5, "label": NASTY}
    assert first["data"][1] == {"x": 10, "y": 3}
    assert curve["data"] == [{"x": 1, "y": 1.235}]
    assert (curve["pointStyle"], curve["borderDash"]) == (False, [4, 4])
    assert limit["pointStyle"] == "line"
    assert limit["data"] == [{"x": 1, "y": 2.5}, {"x": 10, "y": 2.5}]
    assert config["options"]["scales"]["y"]["type"] == "logarithmic"
    assert config["options"]["scales"]["x"]["type"] == "linear"


def test_markdown_says_the_same_without_charts() -> None:
    text = PAGE.to_markdown()
    assert text.startswith("# </script>")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    assert len(rows) == 2
    assert all(len(re.split(r"(?<!\\)\|", row)) == 4 for row in rows)  # a bar in a cell is escaped
    assert "**1 (" in rows[1]
    assert "## Charts" not in text
    assert "\nnote\n" in text


def test_csv_is_for_spreadsheets() -> None:
    text = to_csv(("a", "b"), [(NASTY, 1.5), ("", 2)])
    assert list(csv.reader(text.splitlines(keepends=True))) == [["a", "b"], [NASTY, "1.5"], ["", "2"]]


def test_a_table_without_rows_is_nothing() -> None:
    table = Table("t", ("a",), ())
    assert (table.to_html(), table.to_markdown()) == ("", "")
