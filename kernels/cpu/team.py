"""The threads of a training run: all of them start or none, and all have ended before an error is raised.

They are Python threads inside a kernel that has released the GIL, so that the calling thread draws the next
epoch's order, reports progress, and is interruptible.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastdl.kernels.cpu.barrier import LINE, OWN, STEPS, STOP
from fastdl.kernels.cpu.memory import aligned

# how often a waiting thread looks for Ctrl-C and reports progress, in seconds
_PATIENCE = 0.05
# how long threads without work may take to begin and to end, in seconds
_LONGEST_WAIT = 1.0
# in place of a row
NO_ROW = np.iinfo(np.int64).max

# What a thread tells, in a cache line of its own: how fast it is; its right answers; the first of its rows
# whose label is no class; whether what it last wrote of the first layer's weight, and of the gradient of that
# layer's product, is finite.
MEMBER = np.dtype(
    {
        "names": ["speed", "num_correct", "wrong_row", "has_finite_weight", "has_finite_grad"],
        "formats": [np.float64, np.int64, np.int64, np.bool_, np.bool_],
        "itemsize": 8 * LINE,
    },
    align=True,
)


class Shared(NamedTuple):
    """What threads share: the counters of ``barrier``, 0 before a run, and (num_threads,) of MEMBER."""

    counters: Any
    members: Any


class Team:
    """So many threads that run a kernel together, and what they tell: ``members``, of MEMBER."""

    def __init__(self, num_threads: int) -> None:
        self.members: NDArray[Any] = aligned(num_threads, MEMBER)

    def run(
        self,
        work: Callable[[int, Shared], object],
        tick: Callable[[int], object] | None = None,
        meanwhile: Callable[[], object] | None = None,
        *,
        in_caller: bool = False,
    ) -> None:
        """Run work in every thread of the team, and return when all have ended.

        Whatever is raised, in a thread, by a callback or by Ctrl-C, is raised here when no thread works.
        The calling thread calls ``meanwhile`` once, and now and then ``tick`` with how many steps are done.
        With ``in_caller`` it does the work of a team of one itself, and calls neither.
        """
        self.members["num_correct"], self.members["wrong_row"] = 0, NO_ROW
        # fresh ones: nothing takes a STOP back from a thread that comes late
        shared = Shared(aligned(OWN + len(self.members) * LINE, np.int64), self.members)
        if in_caller:
            work(0, shared)
            return
        errors: list[BaseException] = []
        working: set[int] = set()

        def run_member(thread: int) -> None:
            try:
                working.add(thread)
                if shared.counters[STOP] == 0:
                    work(thread, shared)
            except BaseException as error:
                errors.append(error)
                shared.counters[STOP] = 1
            finally:
                working.discard(thread)

        threads = [
            threading.Thread(target=run_member, args=(index,), name=f"fastdl-{index}", daemon=True)
            for index in range(len(self.members))
        ]
        try:
            for thread in threads:
                thread.start()
            if meanwhile is not None:
                meanwhile()
            for thread in threads:
                while thread.is_alive():
                    thread.join(_PATIENCE)
                    if tick is not None:
                        tick(int(shared.counters[STEPS]))
        except BaseException as error:
            # a second Ctrl-C must not leave anybody behind either
            while True:
                try:
                    shared.counters[STOP] = 1
                    _wait_for_end(threads, working)
                    break
                except BaseException:
                    continue
            # Ctrl-C amidst a lock of Python's own may come out as the lock's error: "release unlocked lock"
            if isinstance(error.__context__, KeyboardInterrupt):
                raise error.__context__ from None
            raise
        if errors:
            raise errors.pop(0)


def _wait_for_end(threads: list[threading.Thread], working: set[int]) -> None:
    """Wait until no thread works, also where Ctrl-C came while one was started or joined."""
    # Python's own account of a thread may be wrong for good then: is_alive() is false of one that runs
    # (bpo-46726), and enumerate() has one that ended, where the caller let go of a lock that the beginning
    # thread held. Who begins after STOP does no work.
    latest = time.monotonic() + _LONGEST_WAIT
    while working or (time.monotonic() < latest and not set(threads).isdisjoint(threading.enumerate())):
        time.sleep(1e-3)
