"""Sums and gathers over the ranks of an engine, and tensors from one to another."""
