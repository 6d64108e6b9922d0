"""CHUNK numbers at a time between memory and registers, where an array ends too."""

from __future__ import annotations

from fastdl.kernels.cuda.intrinsics import fill, load, load_tuple, store, store_tuple
from fastdl.kernels.cuda.launch import CHUNK
from fastdl.kernels.cuda.numba_cuda import cuda


@cuda.jit(device=True, inline="always")
def load_padded(array, at, left, wide, padding):
    """Return CHUNK numbers from an index on, of which so many are left, and padding behind the last one."""
    if wide:
        return load_tuple(array, at, CHUNK)
    return (
        load(array, at),
        load(array, at + 1) if left > 1 else padding,
        load(array, at + 2) if left > 2 else padding,
        load(array, at + 3) if left > 3 else padding,
    )


@cuda.jit(device=True, inline="always")
def load_chunk(array, at, left, wide):
    """Return CHUNK numbers from an index on, of which so many are left, and 0 behind the last one."""
    return load_padded(array, at, left, wide, fill(array, 0, 1)[0])


@cuda.jit(device=True, inline="always")
def store_chunk(array, at, left, wide, values):
    """Write CHUNK numbers from an index on, or as many of them as are left."""
    if wide:
        store_tuple(array, at, values)
    else:
        for i in range(CHUNK):
            if left > i:
                store(array, at + i, values[i])
