"""Whisper: an encoder of audio, and a decoder that attends to what it makes of it (runtime/model/speech.py)."""

from __future__ import annotations

from octavo.runtime.model.families.family import Family

FAMILY = Family(architectures={}, speech=("whisper",))
