"""What bits mean: schemes, on-disk formats, packing, quantized linear layers. Knows tensors, not models."""
