"""Memory for kernels that want it to begin at a cache line."""

from __future__ import annotations

import numpy as np


def aligned(count, dtype):
    """Return zeros that begin at a cache line."""
    size = count * np.dtype(dtype).itemsize
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype)
