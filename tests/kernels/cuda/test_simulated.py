"""Runs the tests in ``simulated/``, which need a process whose Numba has the CUDA simulator."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed: no CUDA kernel was simulated")
pytest.importorskip("greenlet", reason="greenlet is not installed: no CUDA kernel was simulated")

FOLDER = Path(__file__).parent / "simulated"


def simulate(file):
    """Run a file's tests in a process of their own."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / file)],
        env=os.environ | {"NUMBA_ENABLE_CUDASIM": "1"},
        cwd=FOLDER.parents[3],
        capture_output=True,
        text=True,
    )


@pytest.mark.ahead(simulate, "file")
@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_kernels_are_right_in_the_simulator(file, ahead):
    done = ahead(simulate, file).result()
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"^\d+ passed in ", done.stdout, re.MULTILINE), done.stdout[-2000:]
