"""Products with Hadamard matrices, which spread what is large in one channel over all of a block."""
