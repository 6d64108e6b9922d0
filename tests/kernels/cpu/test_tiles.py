"""The tile instructions, or what stands for them on this CPU, against their definition."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import numpy as np
import pytest

from fastdl.kernels.cpu.memory import aligned
from fastdl.kernels.cpu.tiles import (
    DEPTH,
    IS_EMULATED,
    NUM_TILES,
    SIDE,
    TILE_BYTES,
    has_amx,
    integer_units,
    tile_begin,
    tile_end,
    tile_load,
    tile_multiply,
    tile_store,
    tile_zero,
)
from fastdl.kernels.jit import jit

# the instructions are an error of the CPU where Linux wasn't asked for them
needs_units = pytest.mark.skipif(not (IS_EMULATED or has_amx()), reason="the process may not use AMX")


@jit
def _multiply(registers, a, stride, b, steps, sums):
    tile_begin(registers)
    tile_zero(registers, 3)
    for step in range(steps):
        tile_load(registers, 6, a, step * DEPTH, stride)
        tile_load(registers, 7, b, step * TILE_BYTES, DEPTH)
        tile_multiply(registers, 3, 6, 7)
    tile_store(registers, 3, sums, 0, DEPTH)
    tile_end()


def _bytes(rng, kind, *shape):
    if kind == "random":
        return rng.integers(0, 256, shape).astype(np.uint8)
    return np.full(shape, kind, np.uint8)


@needs_units
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize(("left", "right"), [("random", "random"), (255, 0x80), (255, 0x7F), (0, "random")])
def test_sums_of_bytes_times_signed_bytes(steps, left, right, seed):
    rng = np.random.default_rng(seed)
    stride = 3 * DEPTH
    a = _bytes(rng, left, SIDE, stride)
    b = _bytes(rng, right, 3, SIDE, SIDE, 4)
    sums = aligned(SIDE * SIDE, np.int32)
    sums[:] = -1
    _multiply(aligned(NUM_TILES * TILE_BYTES, np.uint8), a.reshape(-1), stride, b.reshape(-1), steps, sums)
    # depth, columns
    digits = b.view(np.int8).transpose(0, 1, 3, 2).reshape(3 * DEPTH, SIDE)[: steps * DEPTH]
    expected = a[:, : steps * DEPTH].astype(np.int64) @ digits.astype(np.int64)
    np.testing.assert_array_equal(sums.reshape(SIDE, SIDE), expected)


def _units(value: str | None, **others: str) -> subprocess.CompletedProcess[str]:
    environment = {key: text for key, text in os.environ.items() if key != "FASTDL_INTEGER_UNITS"} | others
    if value is not None:
        environment["FASTDL_INTEGER_UNITS"] = value
    program = "from fastdl.kernels.cpu.tiles import integer_units; print(integer_units())"
    # each environment has machine code of its own, and only a few are kept
    with tempfile.TemporaryDirectory() as cache:
        environment["FASTDL_CACHE_DIR"] = cache
        return subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True
        )


@pytest.mark.parametrize("value", ["emulated", "off"])
def test_the_variable_forces_the_units(value):
    assert _units(value).stdout.strip() == value


def test_the_units_are_the_cpus():
    assert _units(None).stdout.strip() == ("amx" if has_amx() else "off")
    assert integer_units() in ("amx", "emulated", "off")


def test_amx_is_refused_where_there_is_none():
    result = _units("amx", NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="")
    assert result.returncode != 0
    assert "RuntimeError: FASTDL_INTEGER_UNITS is 'amx'" in result.stderr


@pytest.mark.parametrize("value", ["AMX", "vnni", "0"])
def test_another_value_is_refused(value):
    result = _units(value)
    assert result.returncode != 0
    assert f"ValueError: FASTDL_INTEGER_UNITS is {value!r}" in result.stderr
