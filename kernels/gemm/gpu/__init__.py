"""Triton bodies of GEMMs."""
