"""Where Triton kernels run in the tests: on the GPU when there is one, else in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    """Tensors of kernels that are written in Triton lie here."""
    return torch.device("cpu" if "TRITON_INTERPRET" in os.environ else "cuda")
