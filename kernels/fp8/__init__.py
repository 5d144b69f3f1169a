"""FP8 (e4m3) quantization and scaled GEMMs."""
