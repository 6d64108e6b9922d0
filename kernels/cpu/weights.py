"""Weights between torch's layout, (M, K) row after row, and the panels of a training run.

Floor: a weight read once and written once. A column's numbers often lie a power of 2 apart, where all fall on
the same 8 lines of L1; so square blocks, of a vector's width, are transposed in registers, and no more rows
than that are read at a time.
"""

from __future__ import annotations

from fastdl.kernels.cpu.intrinsics import TILE, Matrix
from fastdl.kernels.cpu.panels import panel_of, panels_of, transpose_square
from fastdl.kernels.cpu.parallel import share
from fastdl.kernels.jit import inlined_jit, jit

_VECTORS = TILE.vectors


@inlined_jit
def _position(m, k, width, depth, is_skinny, panel):
    """Return where in its panels the number of output m and input k is."""
    if is_skinny:
        return (k // panel * width + m) * panel + k % panel
    return (m // panel * depth + k) * panel + m % panel


@inlined_jit
def _share_of_blocks(width, depth, is_skinny, panel, thread, num_threads):
    """Return a thread's rows of a weight, and how many rows and columns of them are whole blocks."""
    start, stop = share(panels_of(width, panel), thread, num_threads)
    first, last = start * panel, min(stop * panel, width)
    if is_skinny:
        return first, last, 0, 0
    return first, last, (last - first) // panel * panel, depth // panel * panel


@jit
def copy_weight(matrix, state, at, is_skinny, to_panels, thread, num_threads):
    """Copy one thread's share of a weight, (M, K), to its panels in state, which begin at ``at``, or back."""
    width, depth = matrix.shape
    flat = matrix.reshape(-1)
    panel = panel_of(state)
    lanes = panel // _VECTORS
    first, stop, whole_rows, columns = _share_of_blocks(width, depth, is_skinny, panel, thread, num_threads)
    for m_first in range(first, first + whole_rows, panel):
        for k_first in range(0, columns, panel):
            for m in range(m_first, m_first + panel, lanes):
                for k in range(k_first, k_first + panel, lanes):
                    position = at + _position(m, k, width, depth, False, panel)
                    rows, in_panels = Matrix(flat, m * depth + k, depth), Matrix(state, position, panel)
                    source, target = (rows, in_panels) if to_panels else (in_panels, rows)
                    transpose_square(source, target)
    for m in range(first, stop):
        for k in range(columns if m < first + whole_rows else 0, depth):
            position = at + _position(m, k, width, depth, is_skinny, panel)
            if to_panels:
                state[position] = flat[m * depth + k]
            else:
                flat[m * depth + k] = state[position]
