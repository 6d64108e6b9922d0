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
from benchmarks.peak import peak_program
from benchmarks.setup import Setup
from benchmarks.turns import Work

BATCH = 256
WIDTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
SHAPES = ((BATCH, 784, 256), (BATCH, 784, 10), (BATCH, 256, 10), (1, 784, 256), (10, 2, 1))
GPU_WIDTHS, GPU_BATCHES = (64, 256, 1024, 4096), (32, 256, 2048, 16384, 65536)
KERNEL, HANDED_OVER, OP, CUBLAS = "kernel", "cuBLAS + epilogue", "op", "cuBLAS"
PRODUCTS = ("forward", "grad_input", "grad_weight")
_COPIED = 1 << 26


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every shape, on one core and on all."""
    setup = metafunc.config.stash[SETUP]
    if metafunc.function is test_product:
        small = ((BATCH, 64, 64),) if not setup.rehearse else ((BATCH, 784, 256), (BATCH, 64, 64))
        shapes = small if setup.small else SHAPES + tuple((BATCH, width, width) for width in WIDTHS)
        counts = sorted({1, setup.threads})
        cells = [
            (count, shape, product, program)
            for shape in shapes
            for product in PRODUCTS
            for count in counts
            for program in ("fastdl", "torch", "peak")
        ]
        ids = ["-".join(["x".join(map(str, cell[1])), f"{cell[0]} threads", *cell[2:]]) for cell in cells]
        metafunc.parametrize(("threads", "shape", "product", "program"), cells, ids=ids)
    if metafunc.function is test_product_beside_cublas:
        # the CPU's kernels, in a rehearsal, have no half precision
        precisions = ["float32", "TF32"] if setup.rehearse else ["float32", "TF32", "bfloat16"]
        sizes = (
            [(64, 32)] if setup.small else [(width, batch) for width in GPU_WIDTHS for batch in GPU_BATCHES]
        )
        metafunc.parametrize("program", (KERNEL, HANDED_OVER, OP, CUBLAS))
        metafunc.parametrize("product", PRODUCTS)
        metafunc.parametrize("size", sizes, ids=lambda size: "x".join(map(str, size)))
        metafunc.parametrize("precision", precisions)


@pytest.mark.only("cpu")
def test_product(turns: Turns, setup: Setup, threads: int, shape: tuple[int, int, int], product: str) -> None:
    """Time a product on operands that are warm; fastdl's adds the bias or sums its gradient, torch's doesn't."""

    def make(name: str) -> Work:
        torch.set_num_threads(threads)
        flops = 2.0 * math.prod(shape)
        if name == "peak":
            peak, flops = peak_program(threads)
            return Work(peak, info={"flops": flops})
        found = internals.products(*shape)[product]
        found.ours(threads)
        found.torchs()
        ours, torchs = found.results()
        parity = same_results([ours], [torchs], [found.truth()])
        return Work(
            partial(found.ours, threads) if name == "fastdl" else found.torchs,
            info={"flops": flops, "parity": parity},
        )

    before = torch.get_num_threads()
    try:
        title = f"{product} of {' x '.join(map(str, shape))}, {threads} thread{'s' * (threads > 1)}"
        turns(title, make, seconds=setup.seconds / 10)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("program", ["torch"])
def test_copy(turns: Turns, setup: Setup) -> None:
    """Time a copy from an array to another, both larger than the caches: the bandwidth of memory."""
    source = torch.randn(_COPIED >> (10 * setup.small), device=setup.device.name)
    target = torch.empty_like(source)
    work = Work(partial(target.copy_, source), timer=setup.device.timed, info={"bytes": 2 * source.nbytes})
    turns("copy of an array that no cache holds", lambda name: work)


@pytest.mark.only("cuda")
def test_product_beside_cublas(
    turns: Turns, setup: Setup, precision: str, size: tuple[int, int], product: str
) -> None:
    """Time a product with its ReLU: by fastdl's kernel, by cuBLAS with fastdl's around it, by the op's choice."""
    block = PRECISIONS[precision]

    def make(name: str) -> Work:
        torch.manual_seed(0)
        ours, cublas, (expected,) = internals.gpu_products(size[1], size[0], block.dtype, setup.device.name)[
            product
        ]
        limit = {KERNEL: sys.maxsize, HANDED_OVER: -1}.get(name)

        def run() -> object:
            with internals.most_products(limit):
                return ours()

        if name == CUBLAS:
            # the bare product has neither the ReLU nor its mask
            return Work(cublas, timer=setup.device.kernel_timed, rounds=5)
        found = run()
        result = found[0] if isinstance(found, tuple) else found
        assert isinstance(result, torch.Tensor)
        return Work(
            run,
            timer=setup.device.kernel_timed,
            rounds=5,
            info={"parity": same_norm(result, expected, block)},
        )

    with block.active(), torch.no_grad():
        turns(f"{product} of {size[1]} x {size[0]} x {size[0]}, {precision}", make, settle=0.0)
