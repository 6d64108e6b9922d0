"""Python stand-ins for ``fastdl.kernels.cuda.intrinsics``, which check what a GPU would let pass.

A pointer knows its memory's bounds, what lies where, and which thread touched an element since the last
barrier, so that a read or write outside, a misaligned wide access and a race are errors here.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right

import numpy as np
from numba.cuda import types

_NAMES = {
    types.float32: "float32",
    types.float64: "float64",
    types.float16: "float16",
    types.bfloat16: "bfloat16",
    types.int64: "int64",
    types.uint8: "uint8",
}
_REALS = {"float32": np.float32, "float64": np.float64}
_VECTOR_BYTES = 16


def computed_in(element):
    return types.float64 if element == types.float64 else types.float32


def widened(values, element):
    """Return stored values as the numbers that they stand for; a bfloat16 is stored as its 16 bits."""
    if element == "bfloat16":
        return (np.asarray(values, np.uint32) << 16).view(np.float32)
    return np.asarray(values).astype(np.float64 if element == "float64" else np.float32)


def narrowed(values, element):
    """Return numbers as they are stored, rounded to the nearest, ties to even."""
    if element == "bfloat16":
        values = np.asarray(values, np.float32)
        bits = values.view(np.uint32)
        rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)
    return np.asarray(values).astype(element)


class Region:
    """A stretch of memory, and who touched which element of it since the last barrier or launch."""

    def __init__(self, values, element, address):
        self.values, self.element, self.address = values, element, address
        self.forget()

    def forget(self):
        self.writers, self.readers = {}, {}

    def _check(self, index):
        if not 0 <= index < self.values.size:
            raise IndexError(f"element {index} of {self.values.size} elements of {self.element}")

    def read(self, index, thread):
        self._check(index)
        if self.writers.get(index, thread) != thread:
            raise RuntimeError(f"race: element {index} is read by {thread}, written by {self.writers[index]}")
        if self.readers.setdefault(index, thread) != thread:
            self.readers[index] = None
        return self.values[index]

    def write(self, index, value, thread):
        self._check(index)
        if self.writers.get(index, thread) != thread or self.readers.get(index, thread) != thread:
            raise RuntimeError(f"race: element {index} is written by {thread}, touched by another")
        self.writers[index] = thread
        self.values[index] = value


class Pointer:
    """An address in a region; a region of None is the null pointer."""

    def __init__(self, region, start, thread):
        self.region, self.start, self.thread = region, start, thread

    def __getitem__(self, index):
        return self.region.read(self.start + int(index), self.thread())

    def __setitem__(self, index, value):
        assert self.region.element == "int64"
        self.region.write(self.start + int(index), value, self.thread())


class Memory:
    """The GPU's memory: regions by their addresses."""

    def __init__(self):
        self._regions, self._addresses = [], []
        self._next = 1 << 20

    def allocate(self, values, element, offset=0):
        """Return the address of a region with these values, so many bytes off a multiple of 256."""
        address = self._next + offset
        self._next += (values.nbytes + offset + 511) // 256 * 256
        self.adopt(values, element, address)
        return address

    def adopt(self, values, element, address):
        """Take memory from outside, such as a tensor's, for a region at its own address."""
        at = bisect_left(self._addresses, address)
        if self._addresses[at : at + 1] == [address]:
            del self._addresses[at], self._regions[at]
        self._regions.insert(at, Region(values, element, address))
        self._addresses.insert(at, address)

    def pointer(self, address, thread):
        if address == 0:
            return Pointer(None, 0, thread)
        region = self._regions[bisect_right(self._addresses, address) - 1]
        start, rest = divmod(address - region.address, region.values.itemsize)
        if rest or start > region.values.size:
            raise IndexError(f"address {address} is in no region")
        return Pointer(region, start, thread)

    def forget(self):
        for region in self._regions:
            region.forget()


MEMORY = Memory()
# set by the simulator: returns what tells a thread of the running grid from the others
current_thread = None


def is_null(pointer):
    return pointer.region is None


def as_pointer(address, like):
    pointer = MEMORY.pointer(int(address), current_thread)
    assert is_null(pointer) or pointer.region.element == _NAMES[like.dtype]
    return pointer


def pointer_to(shared):
    return Pointer(shared, 0, current_thread)


def load(pointer, index):
    value = pointer[index]
    # float32 and float64 are what they are computed in
    return value if pointer.region.element in _REALS else widened([value], pointer.region.element)[0]


def store(pointer, index, value):
    element = pointer.region.element
    real = _REALS.get(element, np.float32)
    assert type(value) is real, f"{type(value)} is not what {element} is computed in"
    stored = value if element in _REALS else narrowed([value], element)[0]
    pointer.region.write(pointer.start + int(index), stored, pointer.thread())


def _check_alignment(pointer, index, count):
    item = pointer.region.values.itemsize
    at = pointer.region.address + (pointer.start + int(index)) * item
    if at % min(_VECTOR_BYTES, count * item):
        raise RuntimeError(f"a wide access to address {at}")


def load_tuple(pointer, index, count):
    _check_alignment(pointer, index, count)
    return tuple(load(pointer, int(index) + i) for i in range(count))


def store_tuple(pointer, index, values):
    _check_alignment(pointer, index, len(values))
    for i, value in enumerate(values):
        store(pointer, int(index) + i, value)


def store_rows(pointer, index, stride, values, length):
    for row in range(len(values) // length):
        store_tuple(pointer, index + row * stride, values[row * length : (row + 1) * length])


def load_word(pointer, index):
    assert pointer.region.element == "uint8"
    _check_alignment(pointer, index, 4)
    return np.uint32(sum(int(pointer[int(index) + i]) << 8 * i for i in range(4)))


def bytes_of(word):
    assert type(word) is np.uint32
    return tuple(np.float32(int(word) >> 8 * i & 255) for i in range(4))


def fill(pointer, value, count):
    return (np.float64(value) if pointer.region.element == "float64" else np.float32(value),) * count


def add_outer_product(sums, a, b):
    return tuple(sums[i * len(b) + j] + a[i] * b[j] for i in range(len(a)) for j in range(len(b)))


def add_tuples(a, b):
    return tuple(x + y for x, y in zip(a, b, strict=True))


def relu_masked(values, outputs):
    return tuple(type(value)(0) if by <= 0 else value for value, by in zip(values, outputs, strict=True))


def row_of_block(table, size_field, block, block_size):
    first = 0
    for row in table:
        blocks = -(-getattr(row, size_field) // block_size)
        if first <= block < first + blocks:
            return row, block - first
        first += blocks
    raise IndexError(f"block {block} of {first} blocks")
