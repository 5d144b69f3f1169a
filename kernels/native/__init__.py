"""The CPU's toolbox: machine code out of numba and LLVM, its cache, threads, and GEMM tiles."""
