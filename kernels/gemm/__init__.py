"""GEMM bodies, whatever their weights' storage."""
