"""Workers for kernels that a test calls itself; an op starts its own."""

from __future__ import annotations

import pytest

from fastdl.kernels.cpu import threads

NUM_WORKERS = 7


@pytest.fixture(scope="session", autouse=True)
def _workers():
    threads.start_workers(NUM_WORKERS)
