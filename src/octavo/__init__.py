"""octavo: quantize Hugging Face checkpoints to eight bits or four, prove what it cost, and serve them."""

from octavo.jobs.quantize import quantize as quantize
from octavo.version import VERSION as __version__

__all__ = ["__version__", "quantize"]
