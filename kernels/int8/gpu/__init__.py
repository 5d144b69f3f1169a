"""Triton bodies of GEMMs with int8 weights."""
