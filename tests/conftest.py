"""Fixtures that every room's tests share: tiny checkpoints that other tools wrote, with the logits they compute."""

from __future__ import annotations

from pathlib import Path

import pytest

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The directory of tiny checkpoints; its README says who wrote which, and how."""
    return FIXTURES
