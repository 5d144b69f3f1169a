"""Paged attention over a block table, and the writes into the KV cache."""
