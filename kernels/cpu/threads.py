"""Who may enter a parallel region of Numba, and with how many threads.

Kernels take the number of threads as an argument and split their work by it, so a caller needs no global
setting; with 1 they enter no parallel region at all.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numba

_owner = 0
_limit = 1
_is_for_owner_alone = False
# Linux's mark of a process that forked and runs on its parent's program
_FORKED_WITHOUT_EXEC = 0x40


def _after_fork() -> None:
    global _limit
    _limit = 1


def _is_fork() -> bool:
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return bool(int(fields[6]) & _FORKED_WITHOUT_EXEC)


def start(is_forked: bool) -> None:
    """Start Numba's pool of threads, once for the process.

    Parameters
    ----------
    is_forked : bool
        Whether the process is known to be a forked child. It gets no pool: OpenMP's may have been in use
        in the parent, by torch or by others.
    """
    global _owner, _limit, _is_for_owner_alone
    if _owner == 0:
        _owner = threading.get_ident()
        if is_forked or _is_fork():
            return
        numba.get_num_threads()
        _limit = int(numba.config.NUMBA_NUM_THREADS)
        _is_for_owner_alone = numba.threading_layer() == "workqueue"
        os.register_at_fork(after_in_child=_after_fork)


def usable(num_threads: int) -> int:
    """Return how many of the wanted threads the caller may use.

    OpenMP ends or hangs a forked child that enters a parallel region after its parent did, and Numba's own
    ``workqueue`` layer ends a process in which two threads enter one at once: both get 1.
    """
    if _is_for_owner_alone and threading.get_ident() != _owner:
        return 1
    return num_threads if num_threads < _limit else _limit
