"""Calibration text: data sets, documents, records, and the token ids drawn from them."""
