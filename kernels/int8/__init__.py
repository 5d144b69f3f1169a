"""INT8 quantization and the GEMMs with 8-bit integer weights."""
