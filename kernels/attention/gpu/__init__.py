"""Triton bodies of attention over a paged cache and of the writes into it, for NVIDIA GPUs."""
