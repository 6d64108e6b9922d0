"""What every test shares: work ahead, fresh seeds, NaN in fresh memory, a summary of what did not run."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter

import pytest
import torch

from tests.ahead import Ahead

_SEED_VARIABLE = "FASTDL_TEST_SEED"


def pytest_configure(config):
    # a shell's background jobs ignore Ctrl-C, and so would the processes that tests send it to
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        # before -m selects: what waits for other processes keeps the cores busy for minutes
        if "ahead" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
    if not torch.cuda.is_available():
        for item in items:
            # the mark alone: keywords are the names of folders too
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    # who waits for other processes comes last
    items.sort(key=lambda item: "ahead" in getattr(item, "fixturenames", ()))


def pytest_terminal_summary(terminalreporter):
    reasons = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reasons[report.longrepr[2].removeprefix("Skipped: ")] += 1
    terminalreporter.section("what did not run")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} tests: {reason}")
    if not reasons:
        terminalreporter.write_line("nothing: every collected test ran")
    if not torch.cuda.is_available():
        terminalreporter.write_line("no CUDA device: nothing was checked on a GPU")


@pytest.fixture(scope="session")
def ahead():
    """Return what gives the future of a call in another process."""
    ahead = Ahead()
    yield ahead
    ahead.end()


@pytest.fixture(scope="session", autouse=True)
def _begin_ahead(request):
    """Begin the calls that the marks of the selected tests name; a test that -m leaves out begins none."""
    for item in request.session.items:
        for mark in item.iter_markers("ahead"):
            function, argument = mark.args
            request.getfixturevalue("ahead")(function, item.callspec.params[argument])


@pytest.fixture
def seed():
    """Return a fresh seed, printed where a test fails; FASTDL_TEST_SEED repeats one."""
    seed = int(os.environ.get(_SEED_VARIABLE, random.SystemRandom().randrange(2**31)))
    print(f"{_SEED_VARIABLE}={seed}")
    torch.manual_seed(seed)
    random.seed(seed)
    return seed


@pytest.fixture
def uninitialised_is_nan():
    """Fill memory from torch.empty with NaN, so that an element that no kernel wrote is found."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def fashion_mnist_data():
    """Return the real Fashion-MNIST."""
    if not os.environ.get("FASTDL_DATA"):
        pytest.skip("FASTDL_DATA does not name a folder with Fashion-MNIST")
    from fastdl import data

    return data.fashion_mnist(download=False)
