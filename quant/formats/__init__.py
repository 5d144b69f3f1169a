"""On-disk layouts, one module per quantizer family; each maps canonical integers to tensors and back."""
