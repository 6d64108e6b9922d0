"""Work that tests wait for, done ahead on all cores at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from fastdl.machine import num_cores


def selected(request: pytest.FixtureRequest, argument: str) -> list[Any]:
    """Return the values of an argument in the tests that use this fixture and that this run selects."""
    # a doctest has neither fixtures nor arguments
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    users = [item for item in items if {request.fixturename, argument} <= set(item.fixturenames)]
    return list(dict.fromkeys(item.callspec.params[argument] for item in users))


@contextmanager
def processes(run: Callable[[Any], Any], values: list[Any]) -> Iterator[dict[Any, Future[Any]]]:
    """Start a process for each value, as many at once as there are cores; a future holds what it gives.

    ``run`` starts a process and waits for it; each test has the result, or the error, of its own.
    """
    with ThreadPoolExecutor(num_cores()) as pool:
        try:
            yield {value: pool.submit(run, value) for value in values}
        finally:
            pool.shutdown(cancel_futures=True)
