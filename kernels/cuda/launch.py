"""From a Python function to a running kernel: compiled at its first launch, kept on disk, launched cheaply.

Numba turns a kernel's Python into PTX for the oldest GPU that is served, NVIDIA's linker turns that into
machine code for the GPU that is there, and cuda.core loads and launches it. Numba's own launch takes tens of
microseconds for its look at every argument; here the types are fixed, each argument is a number already, and
a launch takes two.

A kernel runs on the stream that its caller names, and nothing here waits for it.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, lru_cache
from importlib.metadata import version
from typing import Any, Protocol

import numpy as np

from fastdl.kernels import disk
from fastdl.kernels.cuda.numba_cuda import core, cuda, driver, types
from fastdl.kernels.garbage import collector_paused

# the element types that ship, and the type of a scalar argument of a kernel for each
ELEMENTS = {
    "float32": types.float32,
    "float64": types.float64,
    "float16": types.float16,
    "bfloat16": types.bfloat16,
}
SCALARS = {"float32": np.float32, "float64": np.float64, "float16": np.float32, "bfloat16": np.float32}

# PTX for this compute capability can be made into machine code for every newer GPU.
OLDEST_CAPABILITY = (8, 0)
# Kernels read and write so many elements at a time where an array's address and row length allow it.
CHUNK = 4
VECTOR_BYTES = 16
# the packages that make machine code, whose names may end in CUDA's release, and where else it comes from
_TOOLS = (
    *("numba-cuda", "cuda-bindings", "cuda-core", "cuda-pathfinder", "cuda-toolkit"),
    *("nvidia-cuda-nvcc", "nvidia-cuda-nvrtc", "nvidia-nvjitlink", "nvidia-nvvm"),
)
_TOOL_VARIABLES = ("NUMBA_CUDA_", "CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX")


class Array(Protocol):
    """An array on the GPU, contiguous: what a torch tensor has of it."""

    @property
    def shape(self) -> Sequence[int]:
        """The sizes."""

    @property
    def dtype(self) -> Any:
        """The element type; its name ends in one of ``ELEMENTS``."""

    def data_ptr(self) -> int:
        """Return the address."""


_element_names: dict[Any, str] = {}


def element_of(array: Array) -> str:
    """Return the name of an array's element type."""
    dtype = array.dtype
    name = _element_names.get(dtype)
    if name is None:
        name = _element_names[dtype] = str(dtype).rpartition(".")[2]
    return name


def address(array: Array | None) -> int:
    """Return an array's address, or 0 for an array left out."""
    return 0 if array is None else array.data_ptr()


def size_of(array: Array) -> int:
    """Return how many elements an array has."""
    return math.prod(array.shape)


def is_wide(length: int, *arrays: Array | None) -> int:
    """Return 1 if rows of this length can be read a chunk at a time in all the arrays, else 0."""
    if length % CHUNK:
        return 0
    return int(not any(address(array) % VECTOR_BYTES for array in arrays))


def architecture(capability: tuple[int, int]) -> str:
    """Return the linker's name for the GPUs of a compute capability."""
    if capability < OLDEST_CAPABILITY:
        raise RuntimeError(
            "the CUDA kernels need a GPU of compute capability {}.{} or newer (Ampere), but this one has "
            "{}.{}: use device='cpu', or torch's own modules".format(*OLDEST_CAPABILITY, *capability)
        )
    return "sm_{}{}".format(*capability) + ("a" if capability == (9, 0) else "")


class Stream:
    """Where kernels run: a CUDA stream of one GPU.

    Parameters
    ----------
    device : int
        torch's number of the GPU.
    handle : int
        The stream's raw handle; 0 is the default stream.
    """

    __slots__ = ("architecture", "core", "device", "handle")

    def __init__(self, device: int, handle: int):
        self.device = device
        self.handle = handle
        self.architecture = architecture(tuple(core.Device(device).compute_capability))
        self.core = core.Stream.from_handle(handle) if handle else core.LEGACY_DEFAULT_STREAM

    def is_capturing(self) -> bool:
        """Return whether the stream's work goes into a graph now, rather than to the GPU."""
        status, capture = driver.cuStreamIsCapturing(self.handle)
        return bool(
            status == driver.CUresult.CUDA_SUCCESS
            and capture != driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE
        )


@cache
def stream(device: int, handle: int) -> Stream:
    """Return the stream with this raw handle, the same object at each call."""
    return Stream(device, handle)


@lru_cache(maxsize=1024)
def _configuration(blocks: int, threads: int) -> Any:
    return core.LaunchConfig(grid=blocks, block=threads)


@cache
def _toolchain() -> str:
    """Return a digest of all that machine code is made with, besides the kernels' text and Numba."""
    tools = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(_TOOL_VARIABLES)]
    for name in (f"{package}{release}" for package in _TOOLS for release in ("", "-cu12", "-cu13")):
        with suppress(ImportError):
            tools.append(f"{name} {version(name)}")
    return hashlib.sha256(" ".join(sorted(tools)).encode()).hexdigest()[:12]


class Kernel:
    """A kernel for fixed argument types and a fixed number of threads a block.

    Parameters
    ----------
    name : str
        What profilers show, and the name of its file on disk.
    function
        The kernel's Python, in the part of it that Numba compiles for CUDA.
    arguments
        Their Numba types: pointers, ``int64``, ``float32`` or ``float64``.
    threads : int
        Threads of a block.
    """

    def __init__(self, name: str, function: Callable[..., None], arguments: Sequence[Any], threads: int):
        self.name = name
        self.function = function
        self.signature = types.void(*arguments)
        self.threads = threads
        self._loaded: dict[str, Any] = {}
        KERNELS[name] = self

    @collector_paused()
    def ptx(self) -> str:
        """Return the kernel's PTX. This needs no GPU."""
        text, _ = cuda.compile(
            self.function,
            self.signature,
            cc=OLDEST_CAPABILITY,
            device=False,
            abi="numba",
            output="ptx",
            launch_bounds=self.threads,
        )
        text = text.decode() if isinstance(text, bytes) else text
        (mangled,) = re.findall(r"\.visible \.entry (\w+)\(", text)
        return str(text.replace(mangled, self.name))

    def machine_code(self, architecture: str) -> bytes:
        """Return the kernel's machine code, from the disk if it is there. This needs no GPU."""
        file = f"cuda.{self.name}-{architecture}-{_toolchain()}.cubin"
        code = disk.read(file)
        if code is None:
            code, _ = link(self.ptx(), architecture)
            disk.write(file, code)
        return code

    def launch(self, stream: Stream, blocks: int, *arguments: Any) -> None:
        """Start so many blocks on a stream; arrays are given by their addresses."""
        kernel = self._loaded.get(stream.architecture) or self._load(stream)
        core.launch(stream.core, _configuration(blocks, self.threads), kernel, *arguments)

    def _load(self, stream: Stream) -> Any:
        if stream.is_capturing():
            raise RuntimeError(
                f"the CUDA kernel {self.name} is not loaded yet, and can't be while a graph is captured: run "
                "the same step once before the capture"
            )
        code = core.ObjectCode.from_cubin(self.machine_code(stream.architecture))
        self._loaded[stream.architecture] = code.get_kernel(self.name)
        return self._loaded[stream.architecture]


# every kernel that ships, by name
KERNELS: dict[str, Kernel] = {}


def link(ptx: str, architecture: str) -> tuple[bytes, str]:
    """Return the machine code for an architecture, and the report of its registers, stack and spills."""
    linker = core.Linker(
        core.ObjectCode.from_ptx(ptx.encode()),
        options=core.LinkerOptions(arch=architecture, ptxas_options=["-v"]),
    )
    code = linker.link("cubin").code
    return bytes(code), linker.get_info_log()


def pointer(element: str) -> Any:
    """Return the type of a pointer to elements of this name."""
    return types.CPointer(getattr(types, element))
