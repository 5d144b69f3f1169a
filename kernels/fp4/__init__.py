"""Floats in small groups with 8-bit scales: NVFP4, and OCP's microscaling formats MXFP4 and MXFP8."""
