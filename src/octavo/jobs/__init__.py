"""The application layer: quantize, measure quality and write calibration text, as a library."""
