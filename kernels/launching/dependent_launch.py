"""A kernel that starts while the one before it in the stream still runs, and waits by itself: sm_90 and later.

Programmatic dependent launch: started with `launch_pdl=True`, a kernel may begin as soon as every program of the kernel
before has said so (`griddepcontrol.launch_dependents`, PREEXIT in machine code) or ended. `griddepcontrol.wait`
(ACQBULK) blocks until the kernel before is complete and its writes are visible. A launch's latency, and with `prefetch`
the memory's, then pass under the end of the kernel before. A kernel takes part by a parameter `OVERLAPS: tl.constexpr`,
which `launch.Launch` fills, and by `await_previous(OVERLAPS)` before all that it reads or writes.

All wait, so completion is handed on: when a kernel is complete, so is all before it, and kernels of torch's between
ours, which are launched as ever, see what they always saw. What waits has read nothing: even a weight may have been
written by the kernel before, while a model loads or in a test. `ahead` objects to a launch that overlaps and whose
machine code doesn't wait before its first load or store, branch or exit. A prefetch into L2 is neither: L2 is what all
processors share, and a line in it is never stale.

The next kernel is let in right after the wait, not at the end. It starts when the last program has said so, so that
none of this kernel's programs can be left without a place by what only waits, however many waves it takes; and what is
before this kernel is complete by then: never more than two kernels are on the GPU. What it may cost: the next one's
programs lie where there is room meanwhile, not evenly, and its prefetches take bandwidth from this one's last wave.

A CUDA graph needs nothing more: capturing a stream turns the attribute into a programmatic edge between two kernels
(CUDA 12.3 and later). `benchmarks.gpu_step --apart` compares a step's time and its logits with and without all this.
"""

from __future__ import annotations

import triton
import triton.language as tl

PREFETCH_TILES = tl.constexpr(
    4
)  # of a program's weight, fetched before it waits: 16 to 32 KB, of which a processor has several
PREFETCH_TOKENS = tl.constexpr(
    64
)  # tokens of a program for which it fetches: with more it is the products that take long


@triton.jit
def await_previous(OVERLAPS: tl.constexpr):
    """Wait for the kernel before, then let the next one in: first of all that a kernel does, but prefetches."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(pointers):
    """Ask for the lines of 128 bytes that pointers lie in, into L2; only where OVERLAPS. The memory must exist."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def row_lines(w, at, first_n, N, K, BLOCK_N: tl.constexpr):
    """TILES lines of each of BLOCK_N rows, from one row and column on, of bytes w [N, K]; past the end the last one."""
    n = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - first_n)
    k = tl.minimum(at + tl.arange(0, PREFETCH_TILES) * 128, K - 1)
    return w + first_n.to(tl.int64) * K + (n[:, None] * K + k[None, :])


@triton.jit
def tile_lines(words, first, tiles, first_n, N, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    """The lines of BLOCK_N rows of TILES tiles, from one row and tile on, of words int16 [tiles, N, WIDTH]."""
    tile = tl.minimum(first + tl.arange(0, PREFETCH_TILES), tiles - 1).to(tl.int64)
    word = tl.minimum(tl.arange(0, BLOCK_N * WIDTH // 64) * 64, (N - first_n) * WIDTH - 1)
    return words + ((tile * N + first_n) * WIDTH)[:, None] + word[None, :]


@triton.jit
def group_lines(scale, first, tiles, first_n, N, TILE: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr):
    """The scales [groups, N] that go with `tile_lines`: of the first group in each tile. GROUP 0: all columns share."""
    tile = tl.minimum(first + tl.arange(0, PREFETCH_TILES), tiles - 1).to(tl.int64)
    group = tile * TILE // GROUP if GROUP else tile * 0
    return scale + (group * N)[:, None] + tl.minimum(first_n + tl.arange(0, BLOCK_N), N - 1)[None, :]
