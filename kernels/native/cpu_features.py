"""What this machine's processor can do. Imports torch alone, so that anything may ask before it imports a kernel."""

from pathlib import Path

import torch


def has_dot_products() -> bool:
    """AVX-512 with VNNI and BF16, what the GEMM and prefill kernels are written for (Intel since Cooper Lake, Zen 4).

    LLVM can't compile those for another processor: it would end the process.
    """
    return bool(torch.cpu._is_avx512_bf16_supported() and torch.cpu._is_vnni_supported())


def has_wide_registers() -> bool:
    """AVX-512: 32 registers of 16 float32 numbers."""
    return bool(torch.cpu._is_avx512_supported())


def multiplies_bfloat16() -> bool:
    """Matrices of bfloat16 are multiplied faster than float32's: by AMX, and by AVX-512 of AMD, not of Intel.

    torch 2.13: 2.4 times as fast on Zen 4, 0.53 of the speed on an Intel that has no AMX.
    """
    return bool(torch.cpu._is_amx_tile_supported()) or (has_dot_products() and _is_amd())


def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
