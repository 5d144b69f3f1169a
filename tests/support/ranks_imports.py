"""What the process that ranks are forked off imports and loads, once for all of them (ranks.py)."""

from __future__ import annotations

import gc

import divided  # noqa: F401
import hf_oracle  # noqa: F401
import torch
import trimmed  # noqa: F401

import octavo.calibration.quantize_model
import octavo.runtime.startup  # noqa: F401
from octavo.runtime.model import select_operators

select_operators.warm_up(torch.device("cpu"))
gc.freeze()  # a collection in a fork would touch, and so copy, all that was imported
