"""How a loss is reduced over its elements, and sums that don't depend on timing.

A block adds its threads' sums in a fixed order, and one last block adds the blocks' sums. Atomic additions
would save the last block, but the order of their additions changes from run to run.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from fastdl.kernels.cuda.intrinsics import load, pointer_to, store
from fastdl.kernels.cuda.launch import Elements, Sums, build_kernels
from fastdl.kernels.cuda.numba_cuda import cuda, types

# the codes by which a kernel is told the reduction
NONE, MEAN, SUM = 0, 1, 2
CODES = {"none": NONE, "mean": MEAN, "sum": SUM}

WARP = 32
ALL_LANES = 0xFFFFFFFF
THREADS = 512
WARPS = THREADS // WARP
# a sum is made of the sums of at most so many blocks
MAX_BLOCKS = 1024


def lanes_for(count: int) -> int:
    """Return how many lanes share so many numbers: the least power of 2 that has one for each, or a warp."""
    return min(WARP, 1 << max(0, count - 1).bit_length())


def _build_reductions(combine: Any) -> tuple[Any, Any]:
    """Return how numbers are combined over each group of lanes, and over a block, to all of its threads.

    So many lanes of a warp, a power of 2, are a group; ``shared`` is workspace for WARPS numbers.
    """

    @cuda.jit(device=True, inline="always")
    def over_lanes(value, lanes):
        offset = lanes // 2
        while offset > 0:
            value = combine(value, cuda.shfl_xor_sync(ALL_LANES, value, offset))
            offset //= 2
        return value

    @cuda.jit(device=True, inline="always")
    def over_block(value, shared):
        thread = cuda.threadIdx.x
        value = over_lanes(value, WARP)
        if thread % WARP == 0:
            store(shared, thread // WARP, value)
        cuda.syncthreads()
        result = load(shared, 0)
        for warp in range(1, WARPS):
            result = combine(result, load(shared, warp))
        # the workspace may be written anew
        cuda.syncthreads()
        return result

    return over_lanes, over_block


lanes_sum, block_sum = _build_reductions(operator.add)
# NaN is left out
lanes_max, block_max = _build_reductions(max)


def _build(real: Any) -> Callable[..., None]:
    def add_partial_sums(
        partial_sums: Sums, count: int, factor: float, has_divisor: bool, has_second: bool, loss: Elements
    ) -> None:
        """Write partial_sums (count,) summed to loss (1,), times factor or over the number behind them.

        Behind that number may be as many sums of a second part of the loss.
        """
        shared = pointer_to(cuda.shared.array(WARPS, real, alignment=16))
        total, second = real(0), real(0)
        for i in range(types.int64(cuda.threadIdx.x), count, THREADS):
            total += load(partial_sums, i)
            if has_second:
                second += load(partial_sums, count + 1 + i)
        total, second = block_sum(total, shared), block_sum(second, shared)
        if cuda.threadIdx.x == 0:
            if has_divisor:
                divisor = load(partial_sums, count)
                # one by one, as over 0 infinities of both signs may meet
                result = total / divisor
                if has_second:
                    result += second / divisor
                store(loss, 0, result)
            else:
                store(loss, 0, (total + second) * factor)

    return add_partial_sums


ADD_PARTIAL_SUMS = build_kernels("add_partial_sums", _build, THREADS)
