"""How a loss is reduced over its elements, and sums that don't depend on the number of threads."""

from __future__ import annotations

from fastdl.kernels.jit import inlined_jit

# the codes by which a kernel is told the reduction
NONE, MEAN, SUM = 0, 1, 2
CODES = {"none": NONE, "mean": MEAN, "sum": SUM}

# sums are made of partial sums over this many elements, in a fixed order
BLOCK = 4096
RUN = 128


@inlined_jit
def ordered_sum(values):
    """Return the sum of values (n,), in float64, of partial sums over short runs.

    The error grows with the length of a run plus the number of runs, not with their product.
    """
    total = 0.0
    for start in range(0, values.size, RUN):
        partial = 0.0
        for i in range(start, min(start + RUN, values.size)):
            partial += values[i]
        total += partial
    return total
