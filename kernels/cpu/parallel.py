"""How the elementwise and row-wise kernels split their work among threads."""

from __future__ import annotations

from fastdl.kernels.jit import inlined_jit

# below this many elements a thread's share takes less time than entering a parallel region (about 2 us)
MIN_ELEMENTS_PER_THREAD = 1 << 13


@inlined_jit
def worthwhile_threads(num_elements, num_threads):
    """Return how many of the threads have enough of the elements to pay for entering a parallel region."""
    return max(1, min(num_threads, num_elements // MIN_ELEMENTS_PER_THREAD))


@inlined_jit
def share(length, thread, num_threads):
    """Return the half-open range of ``range(length)`` that is one thread's."""
    return length * thread // num_threads, length * (thread + 1) // num_threads
