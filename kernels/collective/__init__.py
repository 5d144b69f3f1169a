"""Sums and gathers over the ranks of an engine."""
