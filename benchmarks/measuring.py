"""How the report measures: threads pinned, programs in turn, medians."""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from fastdl import arrays

# threads that wait for work spin for a few milliseconds, and would slow the next program down
_SETTLE_SECONDS = 0.01
# a program that is quicker than this runs once untimed first, so that its threads are awake and its data near
_QUICK_SECONDS = 0.05


@dataclass(frozen=True)
class Timing:
    """The times that one program took, in seconds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """What the program usually takes."""
        return statistics.median(self.seconds)

    def percentile(self, percent: int) -> float:
        """Return the time that so many percent of the runs stayed within."""
        ordered = sorted(self.seconds)
        return ordered[round((len(ordered) - 1) * percent / 100)]

    def __truediv__(self, count: float) -> Timing:
        """Return the times of one of the `count` parts of a run."""
        return Timing(tuple(seconds / count for seconds in self.seconds))

    def as_json(self) -> dict[str, float | int]:
        """Return the median, the spread and the number of runs."""
        return {
            "median_s": self.median,
            "p20_s": self.percentile(20),
            "p80_s": self.percentile(80),
            "rounds": len(self.seconds),
        }


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def timed(program: Callable[[], object]) -> float:
    """Return the seconds that one run takes."""
    started = time.perf_counter()
    program()
    return time.perf_counter() - started


def interleaved(
    programs: Mapping[str, Callable[[], object]],
    *,
    budget: float,
    least: int = 3,
    most: int = 31,
    timer: Callable[[Callable[[], object]], float] = timed,
    settle: float = _SETTLE_SECONDS,
) -> dict[str, Timing]:
    """Time programs in turn, so that a busy moment of the machine meets them all.

    Parameters
    ----------
    programs : mapping of str to callable
        Warmed up already: compiled, their data in memory.
    budget : float
        Seconds after which a program has had enough rounds.
    least, most : int
        Rounds of each program, whatever the budget.
    timer : callable
        Runs a program and returns its seconds.
    settle : float
        Seconds to wait before each run.

    Returns
    -------
    dict of str to Timing
    """
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    with _no_collection():
        for _ in range(most):
            for name, program in programs.items():
                past = seconds[name]
                if len(past) >= least and sum(past) >= budget:
                    continue
                time.sleep(settle)
                if not past or past[-1] < _QUICK_SECONDS:
                    program()
                past.append(timer(program))
    return {name: Timing(tuple(past)) for name, past in seconds.items()}


def cpus(num_threads: int) -> set[int]:
    """Return as many of the CPUs that this process may use, on different cores as far as there are any."""
    allowed = sorted(os.sched_getaffinity(0))
    firsts: list[int] = []
    others: list[int] = []
    seen: set[str] = set()
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        core = siblings.read_text() if siblings.exists() else str(cpu)
        (others if core in seen else firsts).append(cpu)
        seen.add(core)
    return set((firsts + others)[:num_threads])


def pin_process(num_threads: int) -> None:
    """Start this process anew on so many CPUs, if it may use more.

    Every library sizes its pool of threads by the CPUs that it finds when it is loaded, and JAX's pool can be
    limited in no other way.
    """
    chosen = cpus(num_threads)
    if chosen != os.sched_getaffinity(0):
        os.sched_setaffinity(0, chosen)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def pin_threads(num_threads: int) -> None:
    """Start Numba's threads, which may change torch's count, then set the count."""
    arrays.cpu_kernels()
    torch.set_num_threads(num_threads)
    torch.set_float32_matmul_precision("highest")
