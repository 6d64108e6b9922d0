"""Tiles of sums of bytes times signed bytes: AMX's instructions, and plain loops that do the same.

There are eight tile registers, of 16 rows of 64 bytes. A tile of sums is 16 x 16 int32, a tile of a is 16
rows of 64 uint8, and a tile of b is 16 rows of 16 columns of 4 int8, which follow each other in the depth:

    sums[i, j] += sum over p < 64 of a[i, p] b[p // 4, 4 j + p % 4]

Sums of integers are exact, so the instructions and the loops give the same bits. Everything is an array of
bytes but the sums; positions and strides are in elements, and nothing here checks a bound.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from functools import cache, wraps

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastdl.kernels.cpu.intrinsics import cpu_features, pointer_to
from fastdl.kernels.jit import inlined_jit
from fastdl.kernels.numba_private import cgutils

# rows of a tile, columns of a tile of sums; bytes of a tile's row; bytes of a tile
SIDE, DEPTH, TILE_BYTES = 16, 64, 1024
NUM_TILES = 8

# what Linux calls a process's request to use the tiles: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18

_BYTE = ir.IntType(8)
_AMX_FEATURES = {"amx-tile", "amx-int8"}
_CHOICES = ("amx", "emulated", "off")


def _forced_units() -> str:
    forced = os.environ.get("FASTDL_INTEGER_UNITS", "")
    if forced and forced not in _CHOICES:
        raise ValueError(f"FASTDL_INTEGER_UNITS is {forced!r}; it must be one of amx, emulated and off.")
    return forced


@cache
def has_amx() -> bool:
    """Return whether this process may use AMX's integer tiles; asks Linux for them at the first call."""
    if not cpu_features() >= _AMX_FEATURES or sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0)


@cache
def integer_units() -> str:
    """Return what multiplies integers: ``"amx"``, ``"emulated"``, or ``"off"`` where nothing should.

    The variable ``FASTDL_INTEGER_UNITS`` forces one; else it is AMX where the process may use it.

    Raises
    ------
    ValueError
        If the variable has another value.
    RuntimeError
        If it asks for AMX where there is none.
    """
    forced = _forced_units()
    if forced == "amx" and not has_amx():
        raise RuntimeError("FASTDL_INTEGER_UNITS is 'amx', which this process can't use; unset it.")
    return forced or ("amx" if has_amx() else "off")


def _instruction(name, num_tiles=0):
    """Make an intrinsic of one of AMX's instructions, whose arguments are those of a stub.

    Behind the registers are the numbers of tiles, literals, and then an array, a position and numbers.
    """

    def decorate(stub):
        @intrinsic(prefer_literal=True)
        @wraps(stub)
        def define(typing_context, *kinds):
            tiles, memory = kinds[1 : num_tiles + 1], kinds[num_tiles + 1 :]
            if not all(isinstance(tile, types.IntegerLiteral) for tile in tiles):
                return None

            def generate(context, builder, signature, values):
                operands = [_BYTE(tile.literal_value) for tile in tiles]
                if memory:
                    array, position, *numbers = values[num_tiles + 1 :]
                    pointer = pointer_to(context, builder, memory[0], array, position)
                    operands += [builder.bitcast(pointer, _BYTE.as_pointer()), *numbers]
                kind = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
                function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}")
                builder.call(function, operands)
                return context.get_dummy_value()

            numbers = [types.int64] * len(memory[1:])
            return types.void(*kinds[: num_tiles + 1], *memory[:1], *numbers), generate

        return define

    return decorate


@_instruction("ldtilecfg")
def _load_configuration(typing_context, registers, source, source_at):
    pass


@inlined_jit
def _amx_begin(registers):
    registers[:DEPTH] = 0
    registers[0] = 1
    for tile in range(NUM_TILES):
        registers[16 + 2 * tile] = DEPTH
        registers[48 + tile] = SIDE
    _load_configuration(registers, registers, 0)


@_instruction("tilerelease")
def _amx_end(typing_context):
    pass


@_instruction("tilezero", 1)
def _amx_zero(typing_context, registers, tile):
    pass


@_instruction("tileloadd64", 1)
def _amx_load(typing_context, registers, tile, source, source_at, stride):
    pass


@_instruction("tdpbusd", 3)
def _amx_multiply(typing_context, registers, sums, a, b):
    pass


@_instruction("tilestored64", 1)
def _amx_store(typing_context, registers, tile, target, target_at, stride):
    pass


@inlined_jit
def _emulated_begin(registers):
    registers[:] = 0


@inlined_jit
def _emulated_end():
    pass


@inlined_jit
def _emulated_zero(registers, tile):
    registers[tile * TILE_BYTES : (tile + 1) * TILE_BYTES] = 0


@inlined_jit
def _emulated_load(registers, tile, source, source_at, stride):
    for i in range(SIDE):
        for p in range(DEPTH):
            registers[tile * TILE_BYTES + i * DEPTH + p] = source[source_at + i * stride + p]


@inlined_jit
def _emulated_multiply(registers, sums, a, b):
    totals = registers.view(np.int32)[sums * SIDE * SIDE : (sums + 1) * SIDE * SIDE]
    left = registers[a * TILE_BYTES : (a + 1) * TILE_BYTES]
    right = registers.view(np.int8)[b * TILE_BYTES : (b + 1) * TILE_BYTES]
    for i in range(SIDE):
        for p in range(DEPTH):
            factor = np.int32(left[i * DEPTH + p])
            for j in range(SIDE):
                totals[i * SIDE + j] += factor * np.int32(right[p // 4 * DEPTH + 4 * j + p % 4])


@inlined_jit
def _emulated_store(registers, tile, target, target_at, stride):
    totals = registers.view(np.int32)
    for i in range(SIDE):
        for j in range(SIDE):
            target[target_at + i * stride // 4 + j] = totals[(tile * SIDE + i) * SIDE + j]


# A machine without AMX must not compile the instructions; whether the process may use them is asked later.
IS_EMULATED = _forced_units() == "emulated" or not cpu_features() >= _AMX_FEATURES
# whether kernels that may multiply integers are compiled for it
USES_INTEGERS = _forced_units() == "emulated" or (_forced_units() != "off" and not IS_EMULATED)

# tile_begin(registers) comes before all others, tile_end() after them, before the thread may sleep.
# The registers are (NUM_TILES * TILE_BYTES,) uint8, a multiple of 64 bytes from 0; tiles are literals.
tile_begin = _emulated_begin if IS_EMULATED else _amx_begin
tile_end = _emulated_end if IS_EMULATED else _amx_end
tile_zero = _emulated_zero if IS_EMULATED else _amx_zero
tile_load = _emulated_load if IS_EMULATED else _amx_load
tile_multiply = _emulated_multiply if IS_EMULATED else _amx_multiply
tile_store = _emulated_store if IS_EMULATED else _amx_store
