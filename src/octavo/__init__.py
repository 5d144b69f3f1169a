"""octavo: quantize Hugging Face checkpoints to eight bits or four, prove what it cost, and serve them."""

from typing import TYPE_CHECKING, Any

from octavo.version import VERSION as __version__

if TYPE_CHECKING:
    from octavo.jobs.quantize import quantize as quantize

__all__ = ["__version__", "quantize"]


def __getattr__(name: str) -> Any:
    """`octavo.quantize`, imported when it is asked for: every process of a server imports this package first."""
    if name != "quantize":
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    from octavo.jobs.quantize import quantize

    return quantize
