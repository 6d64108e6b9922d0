"""The one file that imports numba-cuda, and NVIDIA's Python packages, which it brings along.

Without the package numba-cuda the name ``numba.cuda`` is Numba's own deprecated target, which lacks what the
kernels need.
"""

from __future__ import annotations

from typing import Any

from numba import config

INSTALL = "install fastdl[cu13], or fastdl[cu12] where torch is built for CUDA 12"

try:
    import numba.cuda
except ImportError as error:
    raise ImportError(f"the CUDA kernels need numba-cuda, and numba.cuda is missing: {INSTALL}") from error

if not config.ENABLE_CUDASIM and getattr(numba.cuda, "implementation", None) != "NVIDIA":
    raise ImportError(
        f"the CUDA kernels need numba-cuda, but numba.cuda is Numba's own deprecated CUDA target: {INSTALL}"
    )

import cuda.bindings.driver as cuda_driver  # noqa: E402
import cuda.core as cuda_core  # noqa: E402
import numba.cuda.extending  # noqa: E402
import numba.cuda.types  # noqa: E402

# without types of their own: what a kernel calls is compiled, and typed, by Numba
cuda: Any = numba.cuda
extending: Any = numba.cuda.extending
types: Any = numba.cuda.types
core: Any = cuda_core
driver: Any = cuda_driver

__all__ = ["INSTALL", "core", "cuda", "driver", "extending", "types"]
