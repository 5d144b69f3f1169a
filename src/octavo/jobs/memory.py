"""Whether this machine's memory holds what a quantization needs."""

from __future__ import annotations

from octavo.calibration.layers import QuantizeError
from octavo.runtime.worker.device import choose_device, free_memory


def check_memory(needed: int, what_works: str) -> None:
    """Raise QuantizeError for more bytes than are free, with what would need fewer."""
    free = free_memory(choose_device("cpu"))
    if needed > free:
        raise QuantizeError(
            f"some {needed / 1e9:.1f} GB of memory are needed and {free / 1e9:.1f} GB are free; {what_works}"
        )
