"""The three files that a report becomes beside the weights: JSON, an HTML page, and the model card."""

from __future__ import annotations

from pathlib import Path

from octavo.calibration.auxiliary_files import CARD, original_card
from octavo.calibration.report.file_names import PAGE, REPORT
from octavo.calibration.report.html import render_html
from octavo.calibration.report.model_card import model_card
from octavo.calibration.report.report import Report
from octavo.report.files import write_whole


def write_reports(directory: Path, report: Report, *, source: Path) -> None:
    """Write quantization_report.json, quantization_report.html and README.md into a quantized checkpoint.

    source is the original checkpoint: the text of its README.md goes below the new one, under "Original model card".
    Each file appears whole or not at all, and may be written again. Raises OSError.
    """
    write_whole(directory / REPORT, report.to_json())
    write_whole(directory / PAGE, render_html(report))
    write_whole(directory / CARD, model_card(report, directory.resolve().name, original_card(source)))
