"""Which tokens are computed next, and who holds which block of the KV cache. Pure Python."""
