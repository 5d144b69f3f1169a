"""Embeddings as bytes: the forms in which clients ask for them."""

from __future__ import annotations

import base64
import struct
from array import array
from typing import Literal

NumberType = Literal["float32", "float16", "bfloat16"]


def in_base64(data: bytes, number_type: NumberType = "float32") -> str:
    """float32 numbers, little-endian, as base64 of such numbers, little-endian too."""
    if number_type == "float16":
        values = array("f", data)
        data = struct.pack(f"<{len(values)}e", *values)
    elif number_type == "bfloat16":  # rounded to the nearest, to even between two
        bits = array("I", data)
        data = array("H", [(x + 0x7FFF + ((x >> 16) & 1)) >> 16 & 0xFFFF for x in bits]).tobytes()
    return base64.b64encode(data).decode("ascii")


def signs(values: list[float], *, is_signed: bool) -> list[int]:
    """A bit for each number, whether it is above 0, eight in a byte, the first one highest; as int8 or uint8."""
    found = []
    for begin in range(0, len(values), 8):
        byte = 0
        for place, value in enumerate(values[begin : begin + 8]):
            byte |= (value > 0) << (7 - place)
        found.append(byte - 128 if is_signed else byte)
    return found
