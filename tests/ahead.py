"""Work that tests wait for, done in the background from the first test on.

What keeps one core busy for long and needs nothing of the tests' own process, such as compiling CUDA kernels,
is begun early. The processes that do it have the lowest priority: they take what the running tests leave of
the cores, and all of it once a test waits for them.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

from tests.compile_report import num_processes

_LOWEST_PRIORITY = 19


class Ahead:
    """Calls of functions in other processes, each made once however many tests ask for it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(num_processes(), context, os.nice, (_LOWEST_PRIORITY,))
        self._futures: dict[tuple[Any, ...], Future[Any]] = {}

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Return the future of a call, which begins now unless a test's mark has had it begun."""
        call = function, *arguments
        if call not in self._futures:
            self._futures[call] = self._pool.submit(*call)
        return self._futures[call]

    def end(self) -> None:
        """Leave what has not begun."""
        self._pool.shutdown(cancel_futures=True)
