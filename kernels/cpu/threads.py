"""Who may enter a parallel region of Numba, and with how many threads.

Kernels take the number of threads as an argument and split their work by it, so a caller needs no global
setting; with 1 they enter no parallel region at all.
"""

from __future__ import annotations

import os
import threading

import numba

_owner = 0
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


def start() -> None:
    """Start Numba's pool of threads, once for the process."""
    global _owner
    if _owner == 0:
        _owner = threading.get_ident()
        numba.get_num_threads()
        os.register_at_fork(after_in_child=_after_fork)


def usable(num_threads: int) -> int:
    """Return how many of the wanted threads the caller may use.

    OpenMP ends a forked child that enters a parallel region after its parent did, and Numba's own
    ``workqueue`` layer ends a process in which two threads enter one at once: both get 1.
    """
    if _forked or (numba.threading_layer() == "workqueue" and threading.get_ident() != _owner):
        return 1
    return max(1, min(num_threads, int(numba.config.NUMBA_NUM_THREADS)))
