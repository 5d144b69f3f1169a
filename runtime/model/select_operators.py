"""Which bodies of the decoder's operators serve a device, and their compiling at start."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from octavo.kernels.attention.latent import LatentBody
from octavo.kernels.native import cpu_features
from octavo.kernels.norm import reference as fused_reference
from octavo.runtime.model.operators import REFERENCE, Ops, one_after_the_other


def select_ops(device: torch.device, dtype: torch.dtype) -> Ops:
    """The bodies for a device. float32 on the CPU takes the fast bodies too: they compute in float32 throughout.

    float32 on a GPU takes the reference, whose products are float32's: tensor cores would round to tf32.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        from octavo.runtime.model.operators_gpu import make_ops

        return make_ops(dtype)
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return REFERENCE
    from octavo.kernels.attention import cpu as attention_cpu
    from octavo.kernels.attention import latent_cpu, rope_cpu
    from octavo.kernels.hadamard import cpu as hadamard_cpu
    from octavo.kernels.linear_attention import gated_delta_cpu, mamba2_decode_cpu, short_conv_decode_cpu
    from octavo.kernels.norm import cpu as fused_cpu

    ops = Ops(
        name="cpu",
        embed=fused_reference.embed,
        rms_norm=fused_cpu.rms_norm,
        add_rms_norm=fused_cpu.add_rms_norm,
        silu_and_mul=fused_cpu.silu_and_mul,
        gelu_tanh_and_mul=fused_cpu.gelu_tanh_and_mul,
        rope_and_attention=one_after_the_other(rope_cpu.rope_and_cache, attention_cpu.paged_attention),
        clamped_swiglu=fused_cpu.clamped_swiglu,
        recordable=True,
        latent=LatentBody(latent_cpu.write_latents, attention_cpu.paged_attention),
        gated_delta=gated_delta_cpu.gated_delta,
        mamba2_decode=mamba2_decode_cpu.mamba2_decode,
        short_conv_decode=short_conv_decode_cpu.short_conv_decode,
        hadamard=hadamard_cpu.hadamard_,
    )
    attention = one_after_the_other(rope_cpu.rope_and_cache, attention_cpu.invariant_attention)
    invariant = replace(
        ops, name="cpu, batch-invariant", rope_and_attention=attention, batch_invariant=True, latent=None
    )
    return replace(ops, invariant=invariant)


def warm_up(device: torch.device) -> float:
    """Compile the device's kernels, or load them from numba's cache; returns the seconds that it took."""
    begin = time.perf_counter()
    if device.type == "cpu":
        from octavo.kernels.attention import cpu as attention_cpu
        from octavo.kernels.attention import decode_cpu, prefill_cpu, rope_cpu
        from octavo.kernels.dense import cpu as dense_cpu
        from octavo.kernels.int8 import cpu as int8_cpu
        from octavo.kernels.norm import cpu as fused_cpu

        rooms = [fused_cpu, rope_cpu, attention_cpu]
        if cpu_features.has_dot_products():
            rooms += [decode_cpu, prefill_cpu, int8_cpu, dense_cpu]
        for kernel in (kernel for room in rooms for kernel in room.KERNELS):
            kernel.compile()
    return time.perf_counter() - begin
