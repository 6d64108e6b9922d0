"""What a machine does at most: bytes copied, and multiply-adds in a loop of nothing else, in registers.

How near such a loop comes to the core's limit depends on how its instructions happen to fall on the two units
that execute them: on a Zen 3 loops that differ in nothing but the number of sums reach 75 to 99 % of it. So
several are tried, and the fastest is the peak.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial, reduce
from typing import Any

import numba
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from benchmarks.device import Cpu
from benchmarks.turns import timed
from fastdl import machine

# An addition to a sum waits 4 or 5 cycles for the last one, and a core begins one or two in a cycle: it takes
# 8 to 10 sums to keep it busy, and those and the two factors must fit in 16 registers.
_SUMS = (8, 10, 12)
_UNROLLED = 8
_FLOPS_PER_MULTIPLY_ADD = 2
_TRIAL_SECONDS, _TRIALS = 0.01, 3
# Factors at which the sums stay away from infinity and from the subnormal numbers, which take longer.
_FACTOR, _SMALL_FACTOR = 0.5, 1e-4
_Loop = Callable[[int, float, float], float]
_LANES = machine.vector_bits() // 32


def _loop(num_sums: int, scales_the_sum: bool) -> _Loop:
    """Return a loop of ``count * _UNROLLED`` multiply-adds on each of the sums.

    They are ``sum * factor + factor`` where it scales the sum, else ``factor * small + sum``.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        count, *scalars = arguments
        kind = ir.VectorType(ir.FloatType(), _LANES)
        function = ir.FunctionType(kind, [kind] * 3)
        multiply_add = cgutils.get_or_insert_function(builder.module, function, f"llvm.fmuladd.v{_LANES}f32")
        factors = [ir.Constant(kind, ir.Undefined) for _ in scalars]
        for lane in range(_LANES):
            lanes = zip(factors, scalars, strict=True)
            factors = [builder.insert_element(vector, x, ir.IntType(32)(lane)) for vector, x in lanes]
        starts = [ir.Constant(kind, [float(number)] * _LANES) for number in range(num_sums)]
        # LLVM keeps them in registers
        sums = [cgutils.alloca_once_value(builder, start) for start in starts]
        with cgutils.for_range(builder, count):
            totals = [builder.load(place) for place in sums]
            for _ in range(_UNROLLED):
                for number, total in enumerate(totals):
                    operands = [total, factors[0], factors[0]] if scales_the_sum else [*factors, total]
                    totals[number] = builder.call(multiply_add, operands)
            for place, total in zip(sums, totals, strict=True):
                builder.store(total, place)
        result = reduce(builder.fadd, map(builder.load, sums))
        return builder.extract_element(result, ir.IntType(32)(0))

    @intrinsic
    def multiply_adds(typing_context: Any, count: Any, factor: Any, small: Any) -> Any:
        return types.float32(types.intp, types.float32, types.float32), generate

    # Numba passes the typing context itself
    fused: Any = multiply_adds

    @numba.njit(nogil=True)
    def loop(count: int, factor: float, small: float) -> float:
        total: float = fused(count, numba.float32(factor), numba.float32(small))
        return total

    compiled: _Loop = loop
    return compiled


@cache
def _fastest_loop() -> tuple[_Loop, int, float]:
    """Return the fastest loop, its multiply-adds of vectors in a round, and the rounds in a second."""
    found = []
    for num_sums in _SUMS:
        for scales_the_sum in (True, False):
            loop = _loop(num_sums, scales_the_sum)
            run = partial(loop, 1000, _FACTOR, _SMALL_FACTOR)
            run()
            count = round(1000 * _TRIAL_SECONDS / timed(run))
            run = partial(loop, count, _FACTOR, _SMALL_FACTOR)
            rounds = count / min(timed(run) for _ in range(_TRIALS))
            found.append((rounds * num_sums, loop, num_sums * _UNROLLED, rounds))
    return max(found, key=lambda entry: entry[0])[1:]


def peak_program(num_threads: int, seconds: float = 0.01) -> tuple[Callable[[], object], float]:
    """Return a program of pure multiply-adds on so many cores, which takes about so long, and its FLOPs."""
    loop, vectors, rounds_per_second = _fastest_loop()
    count = max(1, round(rounds_per_second * seconds))
    num_flops = float(num_threads * count * vectors * _LANES * _FLOPS_PER_MULTIPLY_ADD)
    if num_threads == 1:
        return lambda: loop(count, _FACTOR, _SMALL_FACTOR), num_flops
    pool = ThreadPoolExecutor(num_threads)

    def program() -> None:
        # the loop holds no GIL
        list(pool.map(lambda _: loop(count, _FACTOR, _SMALL_FACTOR), range(num_threads)))

    program()
    return program, num_flops


@cache
def bandwidth(device: Cpu, size: int = 1 << 24) -> float:
    """Return the bytes a second, read and written together, of a copy of so many float32 numbers."""
    source = torch.randn(size, device=device.name)
    target = torch.empty_like(source)
    seconds = [device.timed(partial(target.copy_, source)) for _ in range(10)]
    return 2 * source.nbytes / min(seconds[2:])
