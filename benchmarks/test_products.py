"""The three products of a linear layer: on the CPU beside the measured peak, on a GPU beside cuBLAS."""

from __future__ import annotations

import math
import sys
from functools import partial

import pytest
import torch

from benchmarks import internals
from benchmarks.conftest import SETUP, Turns
from benchmarks.device import PRECISIONS
from benchmarks.gate import same_norm, same_results
from benchmarks.internals import PRODUCTS
from benchmarks.peak import peak_program
from benchmarks.setup import Setup
from benchmarks.turns import Work
from fastdl import machine

BATCH, WIDTHS = 256, (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
SHAPES = ((BATCH, 784, 256), (BATCH, 784, 10), (BATCH, 256, 10), (1, 784, 256), (10, 2, 1))
GPU_WIDTHS, GPU_BATCHES = (64, 256, 1024, 4096), (32, 256, 2048, 16384, 65536)
KERNEL, HANDED_OVER, OP, CUBLAS = "kernel", "cuBLAS + epilogue", "op", "cuBLAS"
_ROUNDS = 5


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    setup = metafunc.config.stash[SETUP]
    if metafunc.function is test_bytes_product:
        metafunc.parametrize("product", ("forward", "grad_weight"))
        metafunc.parametrize("program", ("fastdl", "torch", "peak"))
        metafunc.parametrize("shape", SHAPES[:2], ids=lambda shape: "x".join(map(str, shape)))
        return
    metafunc.parametrize("product", PRODUCTS)
    if metafunc.function is test_product:
        shapes = [*SHAPES, *((BATCH, width, width) for width in WIDTHS)]
        if setup.small:
            shapes = [shape for shape in shapes if shape[1] in ((64, 256) if setup.rehearse else (64,))]
        metafunc.parametrize("program", ("fastdl", "torch", "peak"))
        metafunc.parametrize("shape", shapes, ids=lambda shape: "x".join(map(str, shape)))
        metafunc.parametrize("threads", sorted({1, setup.threads}))
    else:
        sizes = (
            [(64, 32)] if setup.small else [(width, batch) for width in GPU_WIDTHS for batch in GPU_BATCHES]
        )
        metafunc.parametrize("program", (KERNEL, HANDED_OVER, OP, CUBLAS))
        metafunc.parametrize("size", sizes, ids=lambda size: "x".join(map(str, size)))
        # the CPU's kernels, in a rehearsal, have no half precision
        metafunc.parametrize("precision", ["float32", "TF32", "bfloat16"][: 2 if setup.rehearse else None])


@pytest.mark.only("cpu")
def test_product(turns: Turns, setup: Setup, threads: int, shape: tuple[int, int, int], product: str) -> None:
    """Time a product on warm operands; fastdl's adds the bias or sums its gradient, torch's doesn't."""

    def make(name: str) -> Work:
        torch.set_num_threads(threads)
        if name == "peak":
            peak, flops = peak_program(threads)
            return Work(peak, info={"flops": flops})
        found = internals.products(*shape)[product]
        found.ours(threads)
        found.torchs()
        ours, torchs = found.results()
        info = {"flops": 2.0 * math.prod(shape), "parity": same_results([ours], [torchs], [found.truth()])}
        return Work(partial(found.ours, threads) if name == "fastdl" else found.torchs, info=info)

    before = torch.get_num_threads()
    try:
        title = f"{product} of {' x '.join(map(str, shape))}, {threads} thread{'s' * (threads > 1)}"
        turns(title, make, seconds=setup.seconds / 10)
    finally:
        torch.set_num_threads(before)


@pytest.mark.only("cpu")
def test_bytes_product(turns: Turns, setup: Setup, shape: tuple[int, int, int], product: str) -> None:
    """Time a product of bytes in integers on one core, operands packed; torch's has them in float32."""
    if machine.integer_units().endswith("(used: off)"):
        pytest.skip("no integer units")

    def make(name: str) -> Work:
        torch.set_num_threads(1)
        if name == "peak":
            peak, flops = peak_program(1)
            return Work(peak, info={"flops": flops})
        found = internals.bytes_products(*shape)[product]
        found.ours(1)
        found.torchs()
        ours, torchs = found.results()
        info = {"flops": 2.0 * math.prod(shape), "parity": same_results([ours], [torchs], [found.truth()])}
        return Work(partial(found.ours, 1) if name == "fastdl" else found.torchs, info=info)

    before = torch.get_num_threads()
    try:
        turns(f"{product} of {' x '.join(map(str, shape))} with bytes", make, seconds=setup.seconds / 10)
    finally:
        torch.set_num_threads(before)


@pytest.mark.only("cuda")
def test_gpu_product(turns: Turns, setup: Setup, precision: str, size: tuple[int, int], product: str) -> None:
    """Time a product with its ReLU: by fastdl's kernel, by cuBLAS and fastdl's, by the op's choice."""
    block = PRECISIONS[precision]
    width, batch = size

    def make(name: str) -> Work:
        ours, cublas, expected = internals.gpu_products(batch, width, block.dtype, setup.device.name)[product]
        limit = {KERNEL: sys.maxsize, HANDED_OVER: -1}.get(name)

        def run() -> object:
            with internals.most_products(limit):
                return ours()

        found = run()
        result = found[0] if isinstance(found, tuple) else found
        assert isinstance(result, torch.Tensor)
        info = {"parity": same_norm(result, expected, block)}
        # the bare product has neither the ReLU nor its mask
        work = cublas if name == CUBLAS else run
        return Work(work, timer=setup.device.kernel_timed, rounds=_ROUNDS, info=info)

    with block.active(), torch.no_grad():
        turns(f"{product} of {batch} x {width} x {width}, {precision}", make, settle=0.0)
