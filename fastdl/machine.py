"""What a figure was measured on: processor, threads, versions."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import torch

import fastdl
from fastdl.cores import num_cores
from fastdl.cuda_arrays import missing_link


def cpu_model() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def gpu() -> str:
    """Return the CUDA device's name, and why the kernels can't use it if so, or why there is none."""
    if torch.cuda.is_available():
        name, reason = torch.cuda.get_device_name(), missing_link(torch.cuda.current_device())
        return name if reason is None else f"{name} ({reason})"
    return "none" if torch.version.cuda else "none (torch is built without CUDA)"


def vector_bits() -> int:
    """Return the width of the vectors that the kernels are built of; imports Numba."""
    from fastdl.kernels.cpu.intrinsics import TILE

    return int(TILE.vector_bytes) * 8


def integer_units() -> str:
    """Return which integer units the CPU has, and which of them the kernels use; imports Numba."""
    from fastdl.kernels.cpu.intrinsics import cpu_features
    from fastdl.kernels.cpu.tiles import integer_units

    features = cpu_features()
    names = {"AMX": {"amx-tile", "amx-int8"}, "AVX-512 VNNI": {"avx512vnni"}, "AVX-VNNI": {"avxvnni"}}
    found = ", ".join(name for name, needed in names.items() if needed <= features) or "none"
    return f"{found} (used: {integer_units()})"


def versions() -> dict[str, str]:
    """Return the versions of what computes."""
    packages = {name: version(name) for name in ("torch", "numba", "numpy")}
    return {"fastdl": fastdl.__version__, "python": platform.python_version()} | packages


def describe() -> dict[str, str | int]:
    """Return what a table or a file of measurements must name."""
    return {
        "cpu": cpu_model(),
        "cores": num_cores(),
        "threads": torch.get_num_threads(),
        "vector bits": vector_bits(),
        "integer units": integer_units(),
        "gpu": gpu(),
        **versions(),
    }
