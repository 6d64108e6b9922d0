"""How a session measures: the device, the sizes, the threads; and what the machine is."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, cached_property
from importlib.metadata import distributions
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.device import Cpu
    from fastdl.data import ImageData
    from fastdl.programs import Model
    from fastdl.reproduce import Examples

_SMALL_IMAGES, _SMALL_POINTS, _POINTS = 600, 100, 1000
_PACKAGES = ("jax", "scikit-learn", "llvmlite", "triton", "numba-cuda", "cuda-core")
# units that multiply numbers of 8 or 16 bits
REDUCED_PRECISION = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx_vnni", "avx512_fp16")


@dataclass(frozen=True)
class Setup:
    """How to measure: whose programs ("cpu" or "cuda"), on how many threads, each for about how many seconds.

    In a rehearsal the CPU stands in for a GPU. Where all is small, to see that it runs, no figure counts.
    """

    device_name: str
    rehearse: bool
    small: bool
    threads: int
    seconds: float

    @property
    def cuda(self) -> bool:
        """Whether the programs are those of a GPU."""
        return self.device_name == "cuda"

    @cached_property
    def device(self) -> Cpu:
        """What times."""
        from benchmarks.device import Cpu, Cuda

        return Cuda() if self.cuda and not self.rehearse else Cpu()

    @cached_property
    def images(self) -> ImageData:
        """Fashion-MNIST, or what stands in for it."""
        from fastdl import data

        # a machine with a GPU need not have a network, and its time is short
        without_data = self.cuda and not os.environ.get("FASTDL_DATA")
        return data.load("garments" if self.small or without_data else "auto")

    def examples(self, model: Model, count: int | None = None) -> Examples:
        """Return what a model trains on, synthetic points or images: so many, or as the setup says."""
        import torch

        from fastdl import data
        from fastdl.reproduce import image_examples, linear_examples

        if model != "linear":
            return image_examples(self.images, count or (_SMALL_IMAGES if self.small else None))
        count = count or (_SMALL_POINTS if self.small else _POINTS)
        return linear_examples(data.regression(count, generator=torch.Generator().manual_seed(0)))

    def as_json(self) -> dict[str, Any]:
        """Return the first line of a session's results."""
        from fastdl import machine

        found: dict[str, Any] = {"kind": "session", "date": datetime.now(UTC).isoformat(timespec="seconds")}
        found |= {"device": self.device_name, "rehearsal": self.small, "seconds": self.seconds}
        found |= {"machine": machine.describe() | {"threads": self.threads, "platform": platform.platform()}}
        installed = {package.name.lower(): package.version for package in distributions()}
        found |= {"versions": {name: installed.get(name, "missing") for name in _PACKAGES}}
        return found | {"features": cpu_features(), "load average": os.getloadavg()}


@cache
def cpu_features() -> list[str]:
    """Return which of the instruction sets that the figures depend on this CPU has."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return [name for name in ("avx2", "fma", "avx512f", *REDUCED_PRECISION) if name in flags]


def cpus(num_threads: int) -> set[int]:
    """Return as many of the CPUs that this process may use, on different cores as far as there are any."""
    cores: dict[str, list[int]] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.setdefault(siblings.read_text() if siblings.exists() else str(cpu), []).append(cpu)
    # the first of each core, then the second ones
    found = [cpu for own in zip_longest(*cores.values()) for cpu in own if cpu is not None]
    return set(found[:num_threads])


def pin_threads(num_threads: int) -> None:
    """Start Numba's threads, then set torch's count; let no peer round the factors of a product."""
    import torch

    from fastdl import arrays

    arrays.cpu_kernels()
    torch.set_num_threads(num_threads)
    torch.set_float32_matmul_precision("highest")
    for name in ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"):
        os.environ.pop(name, None)
