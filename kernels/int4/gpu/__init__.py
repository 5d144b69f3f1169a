"""GEMMs with weights of 2, 3 and 4 bits, in Triton."""
