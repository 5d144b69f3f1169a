"""Low-rank adapters beside a linear layer's own product, another one for each token."""
