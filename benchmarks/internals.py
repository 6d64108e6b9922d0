"""The one file that measures behind fastdl's public functions: adapt it where the internals change."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdl import arrays, optim
from fastdl.kernels.cpu.memory import aligned
from fastdl.ops.cross_entropy import cross_entropy_forward
from fastdl.ops.linear import linear_forward, linear_grad_input, linear_grad_weight

Run = Callable[[], object]
PRODUCTS = ("forward", "grad_input", "grad_weight")


class Product(NamedTuple):
    """One product of a linear layer: by fastdl on so many threads, by torch, both results, and the truth."""

    ours: Callable[[int], object]
    torchs: Run
    results: Callable[[], tuple[Tensor, Tensor]]
    truth: Callable[[], Tensor]


@lru_cache(maxsize=1)
def product(num_rows: int, num_inputs: int, num_outputs: int, name: str) -> Product:
    """Return one of the three products of a layer of this size, which writes to memory that is there."""
    kernels = arrays.cpu_kernels()
    generator = torch.Generator().manual_seed(0)
    shapes = (num_rows, num_inputs), (num_outputs, num_inputs), (num_outputs,), (num_rows, num_outputs)
    X, weight, bias, upstream = (torch.randn(shape, generator=generator) for shape in shapes)
    factors = {"forward": (X, weight.t()), "grad_input": (upstream, weight), "grad_weight": (upstream.t(), X)}
    left, right = factors[name]
    ours, torchs = (torch.empty(left.shape[0], right.shape[1]) for _ in range(2))
    grad_bias = torch.empty_like(bias)
    sizes, like = (num_rows, num_inputs, num_outputs), arrays.like(torch.float32)

    def at(*tensors: Tensor | None) -> tuple[int, ...]:
        # asked for at each call, so that the caller holds the tensors
        return tuple(map(arrays.address, tensors))

    runs: dict[str, Callable[[int], object]] = {
        "forward": lambda count: kernels.linear_forward(at(X, weight, bias, ours), sizes, False, count, like),
        "grad_input": lambda count: kernels.linear_grad_input(
            at(upstream, None, weight, ours), sizes, count, like
        ),
        "grad_weight": lambda count: kernels.linear_grad_weight(
            at(upstream, None, X, ours, grad_bias), sizes, count, like
        ),
    }
    added = bias if name == "forward" else 0.0
    return Product(
        runs[name],
        lambda: torch.mm(left, right, out=torchs),
        lambda: (ours - added, torchs),
        lambda: left.double() @ right.double(),
    )


@lru_cache(maxsize=1)
def bytes_product(num_rows: int, num_inputs: int, num_outputs: int, name: str) -> Product:
    """Return forward or grad_weight of a layer with bytes: packed operands in, float32 in panels out."""
    from fastdl.kernels.cpu import integer, tiles
    from fastdl.kernels.cpu.intrinsics import FROM_ZERO, Epilogue, Matrix
    from fastdl.kernels.jit import jit

    tile_begin: Any = tiles.tile_begin
    tile_end: Any = tiles.tile_end
    line, panel = tiles.DEPTH, integer.PANEL

    @jit
    def fill(digits: Any, matrix: Any, size: Any, columns: Any) -> None:
        own = integer.digits_of(digits, 0)
        integer.note_largest(matrix, (0, size[0]), columns, digits.largest[0])
        for tile in range(columns[1]):
            integer.find_scales(own, tile, size[1], np.float32(1))
        integer.write_columns(own, matrix, (0, size[0]), size, columns)

    @jit
    def multiply(tile: Any, a: Any, rows: Any, digits: Any, columns: Any, output: Any, epilogue: Any) -> None:
        own = integer.digits_of(digits, 0)
        tile_begin(tile.registers)
        integer.multiply_bytes(tile, a, rows, own, columns, own.blocks, output, epilogue)
        tile_end()

    generator = torch.Generator().manual_seed(0)
    left = torch.randint(0, 256, (num_rows, num_inputs), generator=generator, dtype=torch.uint8)
    # half of the pixels of a garment are 0
    left *= torch.rand(left.shape, generator=generator) < 0.5
    left = left.t().contiguous() if name == "grad_weight" else left
    (rows, depth), columns = left.shape, num_outputs
    right, floats = torch.randn(depth, columns, generator=generator), left.float()
    stride, blocks, panels = rows + 5, -(-depth // line), -(-columns // panel)
    words = torch.zeros(blocks, stride, line, dtype=torch.uint8)
    words[:, :rows] = F.pad(left, (0, blocks * line - depth)).reshape(rows, blocks, line).transpose(0, 1)
    memory = aligned(words.numel() + line * line, np.uint8)
    memory[: words.numel()] = words.flatten().numpy()
    matrix = F.pad(right, (0, panels * panel - columns)).reshape(depth, panels, panel).transpose(0, 1)
    digits = integer.digits_memory(depth, columns, 1)
    every_tile = 0, -(-columns // tiles.SIDE)
    fill(digits, Matrix(matrix.flatten().numpy(), 0, depth * panel), (depth, columns), every_tile)
    output, torchs = aligned(panels * stride * panel, np.float32), torch.empty(rows, columns)
    registers, sums = integer.tiles_memory(1)
    tile, a = integer.Tiles(registers[0], sums[0]), integer.Bytes(memory, stride)
    target = Matrix(output, 0, stride * panel), Epilogue(output, 0, FROM_ZERO, False)

    def results() -> tuple[Tensor, Tensor]:
        ours = torch.from_numpy(output).reshape(panels, stride, panel)[:, :rows]
        return ours.transpose(0, 1).reshape(rows, -1)[:, :columns], torchs

    return Product(
        lambda count: multiply(tile, a, (0, rows), digits, every_tile, *target),
        lambda: torch.mm(floats, right, out=torchs),
        results,
        lambda: left.double() @ right.double(),
    )


def gpu_product(size: tuple[int, int], dtype: torch.dtype, device: str, name: str) -> tuple[Run, Run, Tensor]:
    """Return a product of a layer with ReLU: fastdl's op, torch's bare product, and what is right."""
    torch.manual_seed(0)
    width, batch = size
    shapes = (batch, width), (width, width), (width,), (batch, width)
    x, weight, bias, grad = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    output = torch.relu(torch.addmm(bias, x, weight.t()))
    masked = torch.where(output > 0, grad, 0.0)
    if name == "forward":
        forward = partial(linear_forward, x, weight, bias, True)
        return forward, partial(torch.addmm, bias, x, weight.t()), output
    if name == "grad_input":
        input_grad = partial(linear_grad_input, grad, output, weight)
        return input_grad, partial(torch.mm, grad, weight), masked @ weight
    weight_grad = partial(linear_grad_weight, grad, output, x, True, True)
    return weight_grad, partial(torch.mm, grad.t(), x), masked.t() @ x


def cuda_kernels() -> list[str]:
    """Return the names of the CUDA kernels."""
    from fastdl.kernels.cuda.launch import KERNELS

    return list(KERNELS)


def compile_kernel(name: str, capability: tuple[int, int]) -> None:
    """Leave a CUDA kernel's machine code on disk, for GPUs of a compute capability."""
    from fastdl.kernels.cuda.launch import KERNELS, architecture

    KERNELS[name].machine_code(architecture(capability))


KERNELS = ("cross_entropy, 10", "cross_entropy, 1000", "cross_entropy, 4096", "SGD", "SGD, momentum")


def kernel(name: str, size: int, device: str) -> tuple[float, Run, Run]:
    """Return a call that memory limits, of so many classes or with momentum, on arrays of so many numbers.

    Its bytes come first, each read or written once; then fastdl's and torch's.
    """
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
        return 8.0 * (logits.numel() + len(logits)), ours, torchs

    def step(optimizer: Callable[..., torch.optim.Optimizer], **options: bool) -> Run:
        parameters = [torch.nn.Parameter(torch.randn(size // 16, device=device)) for _ in range(8)]
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 1e-3)
        # so slow that a thousand steps leave the numbers ordinary
        return optimizer(parameters, lr=1e-6, momentum=0.9 if detail else 0.0, **options).step

    num_bytes = (20.0 if detail else 12.0) * (size // 2)
    return num_bytes, step(optim.SGD), step(torch.optim.SGD, fused=True)
