"""These tests run in a process of their own: a process has Numba's CUDA compiler or its simulator."""

from __future__ import annotations

import os

if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
    # before a test module imports a kernel
    from tests.kernels.cuda.simulated import simulator  # noqa: F401
else:
    collect_ignore_glob = ["*.py"]
