"""Triton bodies of the small operators."""
