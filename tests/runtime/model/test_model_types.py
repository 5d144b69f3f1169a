"""What docs/models.md says of every model type: that it is all of them, and that it is so."""

from __future__ import annotations

from pathlib import Path

import models_table
import pytest
from model_proofs import BOUND, prove
from model_types import MODEL_TYPES

from octavo.runtime.model.families.registry import ARCHITECTURES, ENCODER_DECODERS, ENCODERS, SPEECH, VISION


def test_every_model_type_has_a_tiny_checkpoint_and_a_row() -> None:
    """`python tests/support/models_table.py NAME` proves one more. tests/runtime/vision has what sees, too."""
    assert MODEL_TYPES.keys() == {*ARCHITECTURES, *VISION, *ENCODERS, *ENCODER_DECODERS, *SPEECH}
    rows = models_table.rows()
    assert list(rows) == list(MODEL_TYPES)
    assert all(float(cells[2]) < BOUND for cells in rows.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", models_table.rows())
def test_the_table_is_true(name: str, tmp_path: Path) -> None:
    """But for the difference, which is a machine's own, and is bounded where it is computed."""
    said = models_table.rows()[name]
    found = models_table.row(prove(MODEL_TYPES[name], tmp_path))
    assert (found[:2], found[3:]) == (said[:2], said[3:])
