"""Triton bodies of mixtures of experts."""
