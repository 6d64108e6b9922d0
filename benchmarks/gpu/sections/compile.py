"""The machine code of every kernel for this GPU, made in as many processes as there are cores.

It needs no GPU, and leaves the code on disk for the sections that follow.
"""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed

from benchmarks.compile_report import num_processes
from benchmarks.gpu.settings import Settings, attempt
from benchmarks.results import Section, Table, duration

# where there is no GPU to ask: that of the H100 and the H200
_ARCHITECTURE = "sm_90a"
_QUICK_KERNELS = 3


def measure(settings: Settings) -> Section:
    """Compile all kernels, and time it."""
    from fastdl.kernels.cuda.launch import KERNELS

    architecture = _architecture(settings)
    section = Section(
        "Compiling the kernels",
        f"From Python to machine code for {architecture}, or from the disk where an earlier run left it, "
        f"in {num_processes()} processes.",
    )
    names = list(KERNELS)[: _QUICK_KERNELS if settings.quick else None]
    started = time.perf_counter()
    seconds = {}
    with ProcessPoolExecutor(num_processes(), multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_compile, name, architecture): name for name in names}
        for future in as_completed(futures):
            name = futures[future]
            with attempt(section.failures, name):
                seconds[name] = future.result()
    whole = time.perf_counter() - started
    section.figures |= {"architecture": architecture, "seconds of each": seconds, "seconds in all": whole}
    slowest = max(seconds, key=seconds.__getitem__, default="")
    row = [
        f"{len(seconds)} of {len(names)}",
        duration(whole),
        f"{slowest} {duration(seconds.get(slowest, 0.0))}",
    ]
    section.tables.append(Table("", ["kernels", "in all", "slowest"], [row]))
    return section


def _architecture(settings: Settings) -> str:
    import torch

    from fastdl.kernels.cuda.launch import architecture

    if settings.device.name != "cuda":
        return _ARCHITECTURE
    return architecture(torch.cuda.get_device_capability(0))


def _compile(name: str, architecture: str) -> float:
    from fastdl.kernels.cuda.launch import KERNELS

    started = time.perf_counter()
    KERNELS[name].machine_code(architecture)
    return time.perf_counter() - started
