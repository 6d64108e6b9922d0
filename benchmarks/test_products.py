"""Kernels beside what limits them: products of a linear layer, and on a GPU what memory limits."""

from __future__ import annotations

import math
from functools import partial
from itertools import product as combinations
from typing import Any

import pytest
import torch

from benchmarks import internals
from benchmarks.conftest import SETUP, Turns
from benchmarks.device import FLOAT32, PRECISIONS, matmul_precision, torch_threads
from benchmarks.gate import same_norm, same_results
from benchmarks.internals import PRODUCTS
from benchmarks.peak import bandwidth, peak_program
from benchmarks.peers.epochs import FitTrainer
from benchmarks.peers.problem import textbook_problem
from benchmarks.setup import Setup
from benchmarks.turns import Work, itself
from fastdl import machine

BATCH, WIDTHS = 256, (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
SHAPES = ((BATCH, 784, 256), (BATCH, 784, 10), (BATCH, 256, 10), (1, 784, 256), (10, 2, 1))
# of a first layer, on images as they are stored, where the CPU multiplies integers
OF_BYTES = {f"{product} of bytes": product for product in ("forward", "grad_weight")}
GPU_WIDTHS, GPU_BATCHES = (64, 256, 1024, 4096), (32, 256, 2048, 16384, 65536)
_ROUNDS = 5
# float32 numbers of an array that no cache holds
_LARGE, _SMALL = 1 << 28, 1 << 13
# of linear regression: two sizes, whose difference is the kernel's alone
_EXAMPLES, _SMALL_EXAMPLES, _EPOCHS = (10_000, 1_000_000), (100, 200), 3


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    setup = metafunc.config.stash[SETUP]
    if metafunc.function is test_product:
        shapes = [*SHAPES, *((BATCH, width, width) for width in WIDTHS)]
        if setup.small:
            shapes = [shape for shape in shapes if shape[1] in ((64, 256) if setup.rehearse else (64,))]
        found = [*combinations(PRODUCTS, shapes, sorted({1, setup.threads}))]
        found += combinations(OF_BYTES, SHAPES[: 1 if setup.small else 2], [1])
        metafunc.parametrize("program", ("fastdl", "torch", "peak"))
        metafunc.parametrize(("product", "shape", "threads"), found, ids=_id)
    elif metafunc.function is test_gpu_product:
        sizes = [(64, 32)] if setup.small else list(combinations(GPU_WIDTHS, GPU_BATCHES))
        # the CPU's kernels, in a rehearsal, have no half precision
        precisions = ["float32", "TF32", "bfloat16"][: 2 if setup.rehearse else None]
        metafunc.parametrize("program", ("op", "cuBLAS"))
        cases = list(combinations(PRODUCTS, sizes, precisions))
        metafunc.parametrize(("product", "size", "precision"), cases, ids=_id)


def _id(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.mark.only("cpu")
def test_product(turns: Turns, setup: Setup, threads: int, shape: tuple[int, int, int], product: str) -> None:
    """Time a product on warm operands; fastdl's adds the bias or sums its gradient, torch's doesn't."""
    if product in OF_BYTES and machine.integer_units().endswith("(used: off)"):
        pytest.skip("no integer units")

    def make(name: str) -> Work:
        if name == "peak":
            peak, flops = peak_program(threads)
            return Work(peak, info={"flops": flops})
        find = internals.bytes_product if product in OF_BYTES else internals.product
        found = find(*shape, OF_BYTES.get(product, product))
        found.ours(threads)
        found.torchs()
        ours, torchs = found.results()
        info = {"flops": 2.0 * math.prod(shape), "parity": same_results([ours], [torchs], [found.truth()])}
        return Work(partial(found.ours, threads) if name == "fastdl" else found.torchs, info=info)

    with torch_threads(threads):
        title = f"{product} of {' x '.join(map(str, shape))}, {threads} thread{'s' * (threads > 1)}"
        turns(title, make, seconds=setup.seconds / 10, rounds=(3, 15))


@pytest.mark.only("cuda")
def test_gpu_product(turns: Turns, setup: Setup, precision: str, size: tuple[int, int], product: str) -> None:
    """Time a product with its ReLU by fastdl's op, and cuBLAS's, which has neither the ReLU nor its mask."""
    block = PRECISIONS[precision]
    width, batch = size

    def make(name: str) -> Work:
        ours, cublas, expected = internals.gpu_product(size, block.dtype, setup.device.name, product)
        found = ours()
        result = found[0] if isinstance(found, tuple) else found
        assert isinstance(result, torch.Tensor)
        info = {"parity": same_norm(result, expected, block)}
        run = ours if name == "op" else cublas
        return Work(run, timer=setup.device.kernel_timed, rounds=_ROUNDS, info=info)

    with matmul_precision(block.matmul), torch.no_grad():
        turns(f"{product} of {batch} x {width} x {width}, {precision}", make, settle=0.0)


@pytest.mark.only("cuda")
@pytest.mark.parametrize("program", ["fastdl", "torch"])
@pytest.mark.parametrize("kernel", internals.KERNELS)
def test_kernel(turns: Turns, setup: Setup, kernel: str) -> None:
    """Time the device's work of a call, many in one CUDA graph."""
    size = _SMALL if setup.small else _LARGE

    def make(name: str) -> Work:
        torch.manual_seed(0)
        num_bytes, ours, torchs = internals.kernel(kernel, size, setup.device.name)
        results: list[Any] = [ours(), torchs()]
        # an optimizer's step returns nothing
        has_loss = isinstance(results[0], tuple)
        parity = same_norm(results[0][0], results[1][0], FLOAT32) if has_loss else "by the gpu tests"
        info = {"parity": parity, "copy_s": num_bytes / bandwidth(setup.device, size)}
        run = ours if name == "fastdl" else torchs
        return Work(run, timer=setup.device.kernel_timed, rounds=_ROUNDS, info=info)

    with torch.no_grad():
        turns(f"kernel {kernel}, {size} numbers", make, settle=0.0)


@pytest.mark.only("cuda")
@pytest.mark.parametrize("program", ["fastdl fit"])
def test_linear_step(turns: Turns, setup: Setup) -> None:
    """Time a step of linear regression in fit's kernel, by the difference of a long and a short epoch."""

    def seconds(count: int) -> float:
        problem = textbook_problem("linear", setup.examples("linear", count)).on(setup.device.name)
        # nothing to draw: a million numbers in random order take longer than the kernel
        fit: Any = partial(FitTrainer(problem, torch.float32).fit, shuffle=False)
        fit(epochs=1)
        calls = (partial(fit, epochs=epochs) for epochs in (1, 1 + _EPOCHS))
        one, more = (min(setup.device.timed(call) for _ in range(3)) for call in calls)
        return (more - one) / _EPOCHS

    def run() -> float:
        few, many = _SMALL_EXAMPLES if setup.small else _EXAMPLES
        return 10 * (seconds(many) - seconds(few)) / (many - few)

    turns("step of linear regression", lambda name: Work(run, timer=itself, rounds=3))
