"""Tests once more in processes whose vectors have another width, which this machine may not have itself."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from fastdl.kernels.cpu.intrinsics import TILE

# the environment variables of each; this process's own width is that of all other tests
OTHERS = {
    str(bits): {"FASTDL_VECTOR_BITS": str(bits)} for bits in (512, 256, 128) if bits != 8 * TILE.vector_bytes
} | {"generic": {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}}
# integers on a CPU that has the units, and on others
EMULATED = {
    "emulated": {"FASTDL_INTEGER_UNITS": "emulated"},
    "emulated, 128 bits": {"FASTDL_INTEGER_UNITS": "emulated", "FASTDL_VECTOR_BITS": "128"},
}


def run(width: str, file: str, expression: str) -> subprocess.CompletedProcess[str]:
    """Run the tests of a file that an expression selects, with an empty cache of machine code."""
    with tempfile.TemporaryDirectory() as cache:
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", expression, file],
            env=os.environ | (OTHERS | EMULATED)[width] | {"FASTDL_CACHE_DIR": cache},
            cwd=Path(__file__).parents[3],
            capture_output=True,
            text=True,
        )
