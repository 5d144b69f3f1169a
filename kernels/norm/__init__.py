"""The small operators between GEMMs: norms, gated activations, rotary embedding."""
