"""A size as argparse's type, for flags that no struct states yet."""

from __future__ import annotations

import argparse

from octavo import flags


def parse_size(text: str) -> int:
    """'5GB' in bytes."""
    try:
        return flags.parse_size(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None
