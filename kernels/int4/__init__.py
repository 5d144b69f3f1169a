"""INT4 packing and the GEMMs with 4-bit weights."""
