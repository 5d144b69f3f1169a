"""A chart as a value, and the configuration that Chart.js draws it from.

A point has its interval, which is drawn as a bar through it. Colors are the page's: a configuration says the number of
a series, and page.js takes its color from the style sheet, light or dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Bounds = tuple[float, float]
MARKERS = ("circle", "triangle", "rect", "rectRot", "star", "crossRot")


@dataclass(frozen=True)
class ChartPoint:
    """A point, with the intervals of its y and, where it has one, of its x. label: what the pointer shows."""

    x: float
    y: float
    y_bounds: Bounds | None = None
    x_bounds: Bounds | None = None
    label: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one color; `color` counts from 0, and series that belong together share it. dashed: its line.

    markers: False for a curve of which no point was measured by itself
    """

    name: str
    points: Sequence[ChartPoint]
    color: int
    line: bool = True
    dashed: bool = False
    markers: bool = True


@dataclass(frozen=True)
class Chart:
    """limit: a horizontal line and what it is called. summary: the chart in a sentence, for who doesn't see it."""

    title: str
    x: str
    y: str
    series: Sequence[Series]
    summary: str
    x_logarithmic: bool = False
    y_logarithmic: bool = False
    limit: tuple[float, str] | None = None

    def config(self) -> dict[str, Any]:
        """What `new Chart(canvas, config)` takes, without colors."""
        # a curve without markers has a box of its color in the legend
        labels = {"usePointStyle": all(series.markers for series in self.series), "boxHeight": 7, "boxWidth": 14}
        datasets = [_dataset(series) for series in self.series if series.points]
        if self.limit is not None:
            datasets.append(self._limit(*self.limit))
        return {
            "type": "scatterWithErrorBars",
            "data": {"datasets": datasets},
            "options": {
                "maintainAspectRatio": False,
                "animation": False,
                "interaction": {"mode": "nearest", "intersect": False},
                "scales": {
                    "x": _axis(self.x, self.x_logarithmic),
                    "y": _axis(self.y, self.y_logarithmic),
                },
                "plugins": {"legend": {"position": "bottom", "labels": labels}},
            },
        }

    def _limit(self, y: float, name: str) -> dict[str, Any]:
        xs = [point.x for series in self.series for point in series.points] or [0.0, 1.0]
        return {
            "label": name,
            "data": [{"x": x, "y": y} for x in (min(xs), max(xs))],
            "color": "limit",
            "showLine": True,
            "pointStyle": "line",
            "borderDash": [6, 4],
        }


def _axis(title: str, logarithmic: bool) -> dict[str, Any]:
    kind: dict[str, Any] = {"type": "logarithmic"} if logarithmic else {"type": "linear", "beginAtZero": True}
    return kind | {"title": {"display": True, "text": title}}


def _dataset(series: Series) -> dict[str, Any]:
    found: dict[str, Any] = {
        "label": series.name,
        "data": [_point(point) for point in series.points],
        "color": series.color,
        "showLine": series.line,
        "pointRadius": 3 if series.line else 6,
        "pointStyle": MARKERS[series.color % len(MARKERS)] if series.markers else False,
    }
    return found | ({"borderDash": [4, 4]} if series.dashed else {})


def _point(point: ChartPoint) -> dict[str, Any]:
    found: dict[str, Any] = {"x": _short(point.x), "y": _short(point.y)}
    if point.label:
        found["label"] = point.label
    if point.y_bounds is not None:
        found |= {"yMin": _short(point.y_bounds[0]), "yMax": _short(point.y_bounds[1])}
    if point.x_bounds is not None:
        found |= {"xMin": _short(point.x_bounds[0]), "xMax": _short(point.x_bounds[1])}
    return found


def _short(value: float) -> float:
    return float(f"{value:.4g}")
