"""Numba's CUDA simulator with what it lacks, and with threads that cost microseconds.

The simulator runs each thread of a block as a thread of the operating system, and knows neither warp
shuffles nor the alignment of shared memory. Here the threads of a block are greenlets, and between two
barriers they run in a random order, so that a missing barrier shows. Shared memory starts as NaN in each
block. Kernels are launched through the kernels' own host code: only ``Kernel.launch`` is replaced.
"""

from __future__ import annotations

import contextvars
import random
import sys
from types import SimpleNamespace

import greenlet
import numba.cuda
import numpy as np
from numba import config
from numba.cuda import types
from numba.cuda.simulator.kernel import FakeCUDAKernel
from numba.cuda.simulator.kernelapi import FakeCUDAModule, FakeCUDAShared

from tests.kernels.cuda.simulated import intrinsics

assert config.ENABLE_CUDASIM, "the simulator needs NUMBA_ENABLE_CUDASIM=1 from the start of the process"
assert "fastdl.kernels.cuda" not in sys.modules
sys.modules["fastdl.kernels.cuda.intrinsics"] = intrinsics

from fastdl.kernels import cuda as kernels  # noqa: E402
from fastdl.kernels.cuda import cross_entropy, loss_row  # noqa: E402
from fastdl.kernels.cuda.launch import Kernel  # noqa: E402

WARP = 32
READY, AT_SHUFFLE, AT_BARRIER = "ready", "at a shuffle", "at a barrier"
STREAM = SimpleNamespace(device=0, handle=0)


class _Thread(greenlet.greenlet):
    """A thread of a block."""

    def __init__(self, run, block, index, parent):
        super().__init__(run, parent)
        self.threadIdx = SimpleNamespace(x=index, y=0, z=0)
        self.blockIdx = SimpleNamespace(x=block, y=0, z=0)
        self.name = block, index
        self.state, self.sent = READY, []
        self.gr_context = contextvars.copy_context()

    def wait(self, state):
        self.state = state
        self.parent.switch()


class _Block:
    """The block that runs now."""

    threads: list[_Thread]

    def run(self, function, block, num_threads, arguments):
        scheduler = greenlet.getcurrent()
        self.shared = {}
        self.threads = [
            _Thread(lambda: function(*arguments), block, index, scheduler) for index in range(num_threads)
        ]
        while any(not thread.dead for thread in self.threads):
            for thread in random.sample(self.threads, num_threads):
                if not thread.dead and thread.state is READY:
                    thread.switch()
            self._release()

    def _release(self):
        alive = [thread for thread in self.threads if not thread.dead]
        if all(thread.state is AT_BARRIER for thread in alive):
            for region in self.shared.values():
                region.forget()
            for thread in alive:
                thread.state = READY
        for first in range(0, len(self.threads), WARP):
            warp = self.threads[first : first + WARP]
            states = {None if thread.dead else thread.state for thread in warp}
            if states == {AT_SHUFFLE}:
                for thread in warp:
                    thread.state = READY
            elif AT_SHUFFLE in states:
                raise RuntimeError(f"lanes of one warp are apart at a shuffle: {states}")


_block = _Block()


def _current():
    return greenlet.getcurrent()


def _shuffle(self, mask, value, offset):
    assert mask == 0xFFFFFFFF
    thread = _current()
    turn = len(thread.sent)
    thread.sent.append(value)
    thread.wait(AT_SHUFFLE)
    return _block.threads[thread.threadIdx.x ^ int(offset)].sent[turn]


def _shared_array(self, shape, dtype, alignment=None):
    caller = sys._getframe(1)
    key = caller.f_code, caller.f_lineno
    if key not in _block.shared:
        name = intrinsics._NAMES[dtype]
        assert shape * np.dtype(name).itemsize <= 48 << 10, "more than the static shared memory of a block"
        # an index that nobody wrote lies outside of every array
        values = np.full(shape, 1 << 62 if name == "int64" else np.nan, name)
        _block.shared[key] = intrinsics.Region(values, name, 0 if alignment else 4)
    return _block.shared[key]


FakeCUDAModule.threadIdx = property(lambda self: _current().threadIdx)
FakeCUDAModule.blockIdx = property(lambda self: _current().blockIdx)
FakeCUDAModule.syncthreads = lambda self: _current().wait(AT_BARRIER)
FakeCUDAModule.shfl_xor_sync = _shuffle
FakeCUDAShared.array = _shared_array
intrinsics.current_thread = lambda: greenlet.getcurrent().name
# Numba's own puts this into a function's globals at each call, which takes longer than the call itself
_cuda_module = FakeCUDAModule((1, 1, 1), (1, 1, 1), 0)
for _name, _module in list(sys.modules.items()):
    if _name.startswith("fastdl.kernels.cuda.") and getattr(_module, "cuda", None) is numba.cuda:
        _module.cuda = _cuda_module
FakeCUDAKernel.__call__ = lambda self, *arguments: self.fn(*arguments)
# Python's own raise an error where a GPU returns infinity
for _module in (cross_entropy, loss_row):
    _module.exp, _module.log = np.exp, np.log


def _argument(kind, numbers):
    """Return an argument as the kernel sees it: an address as a pointer, records and tables as such."""
    if isinstance(kind, types.BaseNamedTuple):
        return kind.instance_class(*(_argument(each, numbers) for each in kind.types))
    if isinstance(kind, types.UniTuple):
        return tuple(_argument(kind.dtype, numbers) for _ in range(kind.count))
    number = next(numbers)
    if isinstance(kind, types.CPointer):
        pointer = intrinsics.MEMORY.pointer(number, intrinsics.current_thread)
        assert intrinsics.is_null(pointer) or pointer.region.element == intrinsics._NAMES[kind.dtype]
        return pointer
    if kind == types.int64:
        assert type(number) is int
    else:
        assert type(number) is (np.float64 if kind == types.float64 else np.float32)
    return number


LAUNCHES: list[str] = []


def _launch(self, stream, blocks, /, **arguments):
    assert stream is STREAM
    assert 0 < blocks < 2**31
    LAUNCHES.append(self.name)
    intrinsics.MEMORY.forget()
    with np.errstate(all="ignore"):
        numbers = iter(self.numbers(**arguments))
        seen = tuple(_argument(kind, numbers) for kind in self.signature.args)
        assert next(numbers, None) is None
        for block in random.sample(range(blocks), blocks):
            _block.run(self.function, block, self.threads, seen)


Kernel.launch = _launch


class DeviceArray:
    """An array in the simulated GPU's memory."""

    def __init__(self, values, dtype="float32", offset=0):
        """Copy the values there, rounded to the element type, so many bytes off a multiple of 256."""
        is_integer = dtype in ("int64", "uint8")
        stored = np.array(values, dtype) if is_integer else intrinsics.narrowed(values, dtype)
        self._stored = np.ascontiguousarray(stored).reshape(-1)
        self.shape = np.shape(values)
        self.dtype = f"torch.{dtype}"
        self.element = dtype
        self._address = intrinsics.MEMORY.allocate(self._stored, dtype, offset)

    @classmethod
    def nan(cls, shape, dtype="float32", offset=0):
        """Return an array whose elements are all to be written."""
        return cls(np.full(shape, np.nan), dtype, offset)

    @classmethod
    def of(cls, tensor):
        """Return a CPU tensor's own memory as an array on the simulated GPU."""
        assert tensor.is_contiguous()
        array = cls.__new__(cls)
        array._stored = tensor.detach().numpy().reshape(-1)
        array.shape, array.dtype = tuple(tensor.shape), str(tensor.dtype)
        array.element = array.dtype.partition(".")[2]
        array._address = tensor.data_ptr()
        intrinsics.MEMORY.adopt(array._stored, array.element, array._address)
        return array

    def data_ptr(self):
        return self._address

    def numpy(self):
        """Return the numbers in float64."""
        return intrinsics.widened(self._stored, self.element).astype(np.float64).reshape(self.shape)


__all__ = ["LAUNCHES", "STREAM", "DeviceArray", "kernels"]
