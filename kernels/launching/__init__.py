"""Triton's toolbox: launches as values, tuning tables, programmatic dependent launch, numerics, checks."""
