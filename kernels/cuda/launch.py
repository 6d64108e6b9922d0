"""From a Python function to a running kernel: compiled at its first launch, kept on disk, launched cheaply.

Numba turns a kernel's Python into PTX for the oldest GPU that is served, NVIDIA's linker turns that into
machine code for the GPU that is there, and cuda.core loads and launches it. Numba's own launch takes tens of
microseconds for its look at every argument; here the types are fixed, each argument is a number already, and
a launch takes two.

A kernel's arguments, and the fields of the records among them, are annotated: ``int`` and ``bool`` are 64-bit
integers on the GPU, ``float`` is the type that the kernel computes in, the names below are pointers. Numba's
types are made of this, and a launch names each argument.

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
from typing import Annotated, Any, NamedTuple, Protocol, get_type_hints

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

# the annotations of pointers: to a kernel's element type, to what its sums are kept in, to int64, and to
# uint8 or the element type. A launch is given arrays, or None for one left out.
Elements = Annotated[Any, "elements"]
Sums = Annotated[Any, "sums"]
Integers = Annotated[Any, "integers"]
Inputs = Annotated[Any, "inputs"]

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


def is_wide(length: int, *arrays: Array | None) -> bool:
    """Return whether rows of this length can be read a chunk at a time in all the arrays."""
    return length % CHUNK == 0 and not any(address(array) % VECTOR_BYTES for array in arrays)


def architecture(capability: tuple[int, int]) -> str:
    """Return the linker's name for the GPUs of a compute capability."""
    if capability < OLDEST_CAPABILITY:
        raise RuntimeError(
            "the CUDA kernels need a GPU of compute capability {}.{} or newer (Ampere), but this one has "
            "{}.{}: use device='cpu', or torch's own modules".format(*OLDEST_CAPABILITY, *capability)
        )
    return "sm_{}{}".format(*capability) + ("a" if capability == (9, 0) else "")


class Stream:
    """Where kernels run: a CUDA stream, by torch's number of the GPU and its raw handle, 0 by default."""

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


class Table(NamedTuple):
    """The type of an argument that is so many records of one kind."""

    record: type
    num_rows: int


# a type of Numba's, and the expression that makes what the driver gets of what a launch is given
_Scalar = tuple[Any, str]


def _argument(hint: Any, name: str, scalars: dict[Any, _Scalar]) -> tuple[Any, list[str]]:
    """Return an argument's type, and the expressions for the numbers that it is handed over as."""
    if isinstance(hint, Table):
        row, _ = _argument(hint.record, name, scalars)
        return types.UniTuple(row, hint.num_rows), [f"*{name}"]
    if hint in scalars:
        kind, expression = scalars[hint]
        return kind, [expression.format(name)]
    hints = get_type_hints(hint, include_extras=True)
    fields = [_argument(field, f"{name}.{key}", scalars) for key, field in hints.items()]
    kinds = [kind for kind, _ in fields]
    return types.BaseTuple.from_types(kinds, hint), [each for _, numbers in fields for each in numbers]


class Kernel:
    """A kernel for one element type and a fixed number of threads a block.

    Profilers and its file on disk show its name. The function is Python that Numba compiles for CUDA, with
    annotated arguments; ``element`` names the type that `Elements` are of, ``inputs``, if it is another, that
    of `Inputs`, and tables are the types of arguments whose size is no annotation's.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., None],
        threads: int,
        element: str,
        inputs: str | None = None,
        **tables: Table,
    ):
        real = real_of(element)
        array = "0 if {0} is None else {0}.data_ptr()"
        scalars: dict[Any, _Scalar] = {
            int: (types.int64, "{0}"),
            bool: (types.int64, "int({0})"),
            float: (real, "real({0})"),
            Elements: (pointer(element), array),
            Sums: (types.CPointer(real), array),
            Integers: (pointer("int64"), array),
            Inputs: (pointer(inputs or element), array),
        }
        hints = get_type_hints(function, include_extras=True) | tables
        arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
        kinds, numbers = zip(*(_argument(hints[each], each, scalars) for each in arguments), strict=True)
        self.name = name
        self.function = function
        self.signature = types.void(*kinds)
        self.threads = threads
        # as Python makes a NamedTuple's constructor: names are resolved here, and a launch takes no longer
        namespace: dict[str, Any] = {"real": SCALARS[element]}
        expressions = ", ".join(each for several in numbers for each in several)
        exec(f"def {name}(*, {', '.join(arguments)}): return ({expressions},)", namespace)
        # what the driver gets for a launch's arguments: a number for each pointer and scalar
        self.numbers: Callable[..., tuple[Any, ...]] = namespace[name]
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

    def launch(self, stream: Stream, blocks: int, /, **arguments: Any) -> None:
        """Start so many blocks on a stream.

        Raises
        ------
        TypeError
            If an argument is missing, or is none of the kernel's; the message names it.
        """
        kernel = self._loaded.get(stream.architecture) or self._load(stream)
        numbers = self.numbers(**arguments)
        core.launch(stream.core, _configuration(blocks, self.threads), kernel, *numbers)

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


def build_kernels(name: str, build: Callable[[Any], Callable[..., None]], threads: int) -> dict[str, Kernel]:
    """Return a kernel for each element type; ``build`` makes its Python for the type that is computed in."""
    return {
        element: Kernel(f"{name}_{element}", build(real_of(element)), threads, element)
        for element in ELEMENTS
    }


def link(ptx: str, architecture: str) -> tuple[bytes, str]:
    """Return the machine code for an architecture, and the report of its registers, stack and spills."""
    linker = core.Linker(
        core.ObjectCode.from_ptx(ptx.encode()),
        options=core.LinkerOptions(arch=architecture, ptxas_options=["-v"]),
    )
    code = linker.link("cubin").code
    return bytes(code), linker.get_info_log()


def real_of(element: str) -> Any:
    """Return the type that sums of elements of this name are computed in."""
    return ELEMENTS[SCALARS[element].__name__]


def pointer(element: str) -> Any:
    """Return the type of a pointer to elements of this name."""
    return types.CPointer(getattr(types, element))
