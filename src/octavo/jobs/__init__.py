"""What commands do, as a library: quantize, measure quality, write calibration text."""
