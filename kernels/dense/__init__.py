"""GEMMs with unquantized weights."""
