"""The one file that measures behind fastdl's public functions: adapt it where the internals change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers.problem import Problem
from fastdl import arrays, cuda_arrays, data, optim
from fastdl.kernels.cpu.memory import aligned
from fastdl.ops import _cuda
from fastdl.ops.cross_entropy import cross_entropy_forward
from fastdl.ops.linear import linear_forward, linear_grad_input, linear_grad_weight
from fastdl.training.lower import lower
from fastdl.training.program import Program

Run = Callable[[], object]
PRODUCTS = ("forward", "grad_input", "grad_weight")


def compiled_epoch(problem: Problem) -> Callable[[], float]:
    """Return what trains an epoch of the compiled program in an order that lies ready, for its loss."""
    net = problem.net(torch.float32)
    optimizer = torch.optim.SGD(net.parameters(), lr=problem.lr)
    lowered = lower(net, problem.loss(), optimizer, tuple(problem.X.shape[1:]))
    X = problem.X.flatten(1)
    program = Program(lowered, X, problem.y, problem.batch_size, 1.0 if X.is_floating_point() else 1 / 255)
    program.read()
    order = data.order(len(X), problem.order())
    return lambda: float(program.epoch(order).loss)


class Product(NamedTuple):
    """One product of a linear layer: by fastdl on so many threads, by torch, both results, and the truth."""

    ours: Callable[[int], object]
    torchs: Run
    results: Callable[[], tuple[Tensor, Tensor]]
    truth: Callable[[], Tensor]


def products(num_rows: int, num_inputs: int, num_outputs: int) -> dict[str, Product]:
    """Return the three products of a layer of this size, each writing to memory that is there."""
    kernels = arrays.cpu_kernels()
    generator = torch.Generator().manual_seed(0)
    shapes = (num_rows, num_inputs), (num_outputs, num_inputs), (num_outputs,), (num_rows, num_outputs)
    X, weight, bias, upstream = (torch.randn(shape, generator=generator) for shape in shapes)
    grad_bias = torch.empty_like(bias)
    (forward, torchs), (gx, torchs_gx), (gw, torchs_gw) = (
        (torch.empty_like(tensor), torch.empty_like(tensor)) for tensor in (upstream, X, weight)
    )
    sizes, like = (num_rows, num_inputs, num_outputs), arrays.like(torch.float32)

    def at(*tensors: Tensor | None) -> tuple[int, ...]:
        # asked for at each call, so that the caller holds the tensors
        return tuple(map(arrays.address, tensors))

    return {
        "forward": Product(
            lambda count: kernels.linear_forward(at(X, weight, bias, forward), sizes, False, count, like),
            lambda: torch.mm(X, weight.t(), out=torchs),
            lambda: (forward - bias, torchs),
            lambda: X.double() @ weight.double().t(),
        ),
        "grad_input": Product(
            lambda count: kernels.linear_grad_input(at(upstream, None, weight, gx), sizes, count, like),
            lambda: torch.mm(upstream, weight, out=torchs_gx),
            lambda: (gx, torchs_gx),
            lambda: upstream.double() @ weight.double(),
        ),
        "grad_weight": Product(
            lambda count: kernels.linear_grad_weight(
                at(upstream, None, X, gw, grad_bias), sizes, count, like
            ),
            lambda: torch.mm(upstream.t(), X, out=torchs_gw),
            lambda: (gw, torchs_gw),
            lambda: upstream.double().t() @ X.double(),
        ),
    }


def bytes_products(num_rows: int, num_inputs: int, num_outputs: int) -> dict[str, Product]:
    """Return the products of a layer with bytes, in integers: packed operands in, float32 in panels out."""
    from fastdl.kernels.cpu import integer
    from fastdl.kernels.cpu import tiles as units
    from fastdl.kernels.cpu.intrinsics import FROM_ZERO, Epilogue, Matrix
    from fastdl.kernels.cpu.tiles import DEPTH, SIDE
    from fastdl.kernels.jit import jit

    tile_begin: Any = units.tile_begin
    tile_end: Any = units.tile_end

    @jit
    def fill(digits: Any, matrix: Any, size: Any) -> None:
        own = integer.digits_of(digits, 0)
        tiles = 0, own.inverses.size // SIDE
        integer.note_largest(matrix, (0, size[0]), tiles, digits.largest[0])
        for tile in range(tiles[1]):
            integer.find_scales(own, tile, size[1], np.float32(1))
        integer.write_columns(own, matrix, (0, size[0]), size, tiles)

    @jit
    def multiply(tiles: Any, a: Any, rows: int, digits: Any, output: Any, epilogue: Any) -> None:
        own = integer.digits_of(digits, 0)
        columns = 0, own.inverses.size // SIDE
        tile_begin(tiles.registers[0])
        tile = integer.Tiles(tiles.registers[0], tiles.sums[0])
        integer.multiply_bytes(tile, a, (0, rows), own, columns, own.blocks, output, epilogue)
        tile_end()

    def product(left: Tensor, right: Tensor) -> Product:
        """Return the product of bytes, rows by depth, with floats, depth by columns."""
        (rows, depth), columns = left.shape, right.shape[1]
        panel, line = integer.PANEL, DEPTH
        stride, blocks, panels = rows + 5, -(-depth // line), -(-columns // panel)
        words = torch.zeros(blocks, stride, line, dtype=torch.uint8)
        words[:, :rows] = F.pad(left, (0, blocks * line - depth)).reshape(rows, blocks, line).transpose(0, 1)
        memory = aligned(words.numel() + line * line, np.uint8)
        memory[: words.numel()] = words.flatten().numpy()
        matrix = F.pad(right, (0, panels * panel - columns)).reshape(depth, panels, panel).transpose(0, 1)
        digits = integer.digits_memory(depth, columns, 1)
        fill(digits, Matrix(matrix.flatten().numpy(), 0, depth * panel), (depth, columns))
        output = aligned(panels * stride * panel, np.float32)
        arguments = (
            integer.tiles_memory(1),
            integer.Bytes(memory, stride),
            rows,
            digits,
            Matrix(output, 0, stride * panel),
            Epilogue(output, 0, FROM_ZERO, False),
        )
        floats, torchs = left.float(), torch.empty(rows, columns)

        def results() -> tuple[Tensor, Tensor]:
            ours = torch.from_numpy(output).reshape(panels, stride, panel)[:, :rows]
            return ours.transpose(0, 1).reshape(rows, -1)[:, :columns], torchs

        return Product(
            lambda count: multiply(*arguments),
            lambda: torch.mm(floats, right, out=torchs),
            results,
            lambda: left.double() @ right.double(),
        )

    generator = torch.Generator().manual_seed(0)
    shape = num_rows, num_inputs
    X = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    # half of the pixels of a garment are 0
    X *= torch.rand(shape, generator=generator) < 0.5
    weight, upstream = (torch.randn(size, num_outputs, generator=generator) for size in shape[::-1])
    return {"forward": product(X, weight), "grad_weight": product(X.t().contiguous(), upstream)}


def gpu_products(
    batch: int, width: int, dtype: torch.dtype, device: str
) -> dict[str, tuple[Run, Run, Tensor]]:
    """Return the three products of a layer with ReLU: fastdl's, torch's bare product, and what is right."""
    torch.manual_seed(0)
    shapes = (batch, width), (width, width), (width,), (batch, width)
    x, weight, bias, grad = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    output = torch.relu(torch.addmm(bias, x, weight.t()))
    masked = torch.where(output > 0, grad, 0.0)
    forward = partial(linear_forward, x, weight, bias, True), partial(torch.addmm, bias, x, weight.t())
    grad_input = partial(linear_grad_input, grad, output, weight), partial(torch.mm, grad, weight)
    grad_weight = partial(linear_grad_weight, grad, output, x, True, True), partial(torch.mm, grad.t(), x)
    truths = output, masked @ weight, masked.t() @ x
    pairs: list[tuple[Run, Run]] = [forward, grad_input, grad_weight]
    return {name: (*pair, truth) for name, pair, truth in zip(PRODUCTS, pairs, truths, strict=True)}


@contextmanager
def most_products(count: int | None) -> Iterator[None]:
    """Let fastdl's CUDA kernels compute products of at most so many multiply-adds."""
    before = _cuda.MOST_PRODUCTS, _cuda.MOST_PRODUCTS_BESIDE_TENSOR_CORES
    if count is not None:
        _cuda.MOST_PRODUCTS = _cuda.MOST_PRODUCTS_BESIDE_TENSOR_CORES = count
    try:
        yield
    finally:
        _cuda.MOST_PRODUCTS, _cuda.MOST_PRODUCTS_BESIDE_TENSOR_CORES = before


def launch(x: Tensor) -> Run:
    """Return what launches the ReLU's CUDA kernel on memory that is there, with no op around it."""
    output = torch.empty_like(x)
    kernel = cuda_arrays.cuda_kernels().relu_forward
    return lambda: cuda_arrays.run(x, kernel, x, output)


def compile_kernel(name: str, architecture: str) -> None:
    """Leave a CUDA kernel's machine code on disk."""
    from fastdl.kernels.cuda.launch import KERNELS

    KERNELS[name].machine_code(architecture)


def kernel_names() -> list[str]:
    """Return every CUDA kernel."""
    from fastdl.kernels.cuda.launch import KERNELS

    return list(KERNELS)


class Kernel(NamedTuple):
    """A call that memory limits: its bytes, each read or written once; fastdl's and torch's."""

    num_bytes: float
    ours: Run
    torchs: Run


KERNELS = ("cross_entropy, 10", "cross_entropy, 1000", "cross_entropy, 4096", "SGD", "SGD, momentum")


def kernel(name: str, size: int, device: str) -> Kernel:
    """Return one of the kernels, with so many classes or momentum, on arrays of so many float32 numbers."""
    kind, _, detail = name.partition(", ")
    if kind == "cross_entropy":
        logits = torch.randn(size // int(detail), int(detail), device=device)
        target = torch.randint(int(detail), (len(logits),), device=device)

        def torchs() -> object:
            with torch.enable_grad():
                leaf = logits.detach().requires_grad_()
                loss = F.cross_entropy(leaf, target)
                return loss.detach(), *torch.autograd.grad(loss, leaf)

        ours = partial(cross_entropy_forward, logits, target, None, -100, 0.0, "mean", True)
        return Kernel(8.0 * logits.numel() + 8.0 * len(logits), ours, torchs)

    def step(optimizer: Callable[..., torch.optim.Optimizer], **options: bool) -> Run:
        parameters = [torch.nn.Parameter(torch.randn(size // 16, device=device)) for _ in range(8)]
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 1e-3)
        # so slow that a thousand steps leave the numbers ordinary
        return optimizer(parameters, lr=1e-6, momentum=0.9 if detail else 0.0, **options).step

    return Kernel(
        (20.0 if detail else 12.0) * (size // 2), step(optim.SGD), step(torch.optim.SGD, fused=True)
    )
