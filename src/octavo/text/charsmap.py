"""SentencePiece's map of characters (`precompiled_charsmap`), checked before the `tokenizers` library reads by it.

The library trusts a map: a text that leads it beyond the map's end is a panic, and no Exception. A map is the number of
a trie's bytes, the trie, and texts, each with a 0 behind it. The trie is an array of units of 32 bits. From a base, a
byte leads to the unit at base ^ byte if that has the byte as its label, and on to the base place ^ offset of this unit;
if it has a leaf, the unit there has the place of a text. Numbers are little-endian.

Source: google/sentencepiece, `normalizer.cc`; s-yata/darts-clone, `darts.h`; the crate spm_precompiled.
"""

from __future__ import annotations

import struct

LABEL = 0xFF
IS_VALUE = 1 << 31
HAS_LEAF = 1 << 8


class CharsMapError(ValueError):
    """A damaged map; the message says how."""


def check_charsmap(data: bytes) -> None:
    """Follow the trie from its root, and raise CharsMapError where it leads out of the map."""
    size = int.from_bytes(data[:4], "little")
    if not size or size % 4 or size > len(data) - 4:
        raise CharsMapError(f"its trie has {size} bytes, and {max(len(data) - 4, 0)} are there")
    units = struct.unpack_from(f"<{size // 4}I", data, 4)
    texts = data[4 + size :]
    labeled: dict[int, list[int]] = {}  # the units that a base leads to
    for place, unit in enumerate(units):
        if unit & LABEL and not unit & IS_VALUE:
            labeled.setdefault(place ^ unit & LABEL, []).append(place)
    bases = [_offset(units[0])]
    seen = set(bases)
    while bases:
        base = bases.pop()
        if base | LABEL >= len(units):
            raise CharsMapError(f"its trie of {len(units)} units leads to unit {base | LABEL}")
        for place in labeled.get(base, ()):
            behind = place ^ _offset(units[place])
            if units[place] & HAS_LEAF:
                _check_leaf(units, behind, texts)
            if behind not in seen:
                seen.add(behind)
                bases.append(behind)


def _check_leaf(units: tuple[int, ...], leaf: int, texts: bytes) -> None:
    if leaf >= len(units):
        raise CharsMapError(f"its trie of {len(units)} units leads to unit {leaf}")
    begin = units[leaf] & ~IS_VALUE
    if begin > len(texts) or (texts[begin : begin + 1] and texts[begin] & 0xC0 == 0x80):
        raise CharsMapError(f"byte {begin} of its {len(texts)} bytes of texts begins none")


def _offset(unit: int) -> int:
    return unit >> 10 << ((unit & 1 << 9) >> 6)
