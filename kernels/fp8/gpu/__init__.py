"""Triton bodies of FP8 GEMMs, and of the rounding before them."""
