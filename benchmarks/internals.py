"""The one file that measures behind fastdl's public functions: adapt it where the internals change.

On the CPU: the compiled epoch alone, and the products on one core. On a GPU: products, kernels that memory limits, a
bare launch, and the compilation of all kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers.problem import Problem
from fastdl import arrays, cuda_arrays, data, functional, optim
from fastdl.ops import _cuda
from fastdl.ops.cross_entropy import cross_entropy_forward
from fastdl.ops.linear import linear_forward, linear_grad_input, linear_grad_weight
from fastdl.training.lower import lower
from fastdl.training.program import Program

Run = Callable[[], object]


def compiled_epoch(problem: Problem) -> Callable[[], float]:
    """Return what trains an epoch of the compiled program in an order that lies ready, and returns its loss."""
    net = problem.net(torch.float32)
    optimizer = torch.optim.SGD(net.parameters(), lr=problem.lr)
    lowered = lower(net, problem.loss(), optimizer, tuple(problem.X.shape[1:]))
    X = problem.X.flatten(1)
    program = Program(lowered, X, problem.y, problem.batch_size, 1.0 if X.is_floating_point() else 1 / 255)
    program.read()
    order = data.order(len(X), problem.order())
    return lambda: float(program.epoch(order).loss)


@dataclass(frozen=True)
class Product:
    """One product of a linear layer: by fastdl on so many threads, by torch, and both results."""

    ours: Callable[[int], object]
    torchs: Run
    results: Callable[[], tuple[Tensor, Tensor]]
    truth: Callable[[], Tensor]


def products(num_rows: int, num_inputs: int, num_outputs: int) -> dict[str, Product]:
    """Return the three products of a layer of this size, each writing to memory that is there."""
    kernels = arrays.cpu_kernels()
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    X, weight, bias = normal(num_rows, num_inputs), normal(num_outputs, num_inputs), normal(num_outputs)
    upstream = normal(num_rows, num_outputs)
    x, w, b, g = (tensor.numpy() for tensor in (X, weight, bias, upstream))
    no_mask = np.empty((0, 0), np.float32)
    grad_bias = torch.empty_like(bias).numpy()
    forward, torch_forward = torch.empty_like(upstream), torch.empty_like(upstream)
    grad_input, torch_grad_input = torch.empty_like(X), torch.empty_like(X)
    grad_weight, torch_grad_weight = torch.empty_like(weight), torch.empty_like(weight)
    return {
        "forward": Product(
            lambda count: kernels.linear_forward(x, w, b, False, forward.numpy(), count),
            lambda: torch.mm(X, weight.t(), out=torch_forward),
            lambda: (forward - bias, torch_forward),
            lambda: X.double() @ weight.double().t(),
        ),
        "grad_input": Product(
            lambda count: kernels.linear_grad_input(g, no_mask, w, grad_input.numpy(), count),
            lambda: torch.mm(upstream, weight, out=torch_grad_input),
            lambda: (grad_input, torch_grad_input),
            lambda: upstream.double() @ weight.double(),
        ),
        "grad_weight": Product(
            lambda count: kernels.linear_grad_weight(g, no_mask, x, grad_weight.numpy(), grad_bias, count),
            lambda: torch.mm(upstream.t(), X, out=torch_grad_weight),
            lambda: (grad_weight, torch_grad_weight),
            lambda: upstream.double().t() @ X.double(),
        ),
    }


def gpu_products(
    batch: int, width: int, dtype: torch.dtype, device: str
) -> dict[str, tuple[Run, Run, list[Tensor]]]:
    """Return the three products of a layer with ReLU: fastdl's, torch's bare product, and what is right."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    x, weight, bias, grad = normal(batch, width), normal(width, width), normal(width), normal(batch, width)
    output = torch.relu(torch.addmm(bias, x, weight.t()))
    masked = torch.where(output > 0, grad, 0.0)
    return {
        "forward": (
            partial(linear_forward, x, weight, bias, True),
            partial(torch.addmm, bias, x, weight.t()),
            [output],
        ),
        "grad_input": (
            partial(linear_grad_input, grad, output, weight),
            partial(torch.mm, grad, weight),
            [masked @ weight],
        ),
        "grad_weight": (
            partial(linear_grad_weight, grad, output, x, True, True),
            partial(torch.mm, grad.t(), x),
            [masked.t() @ x],
        ),
    }


@contextmanager
def most_products(count: int | None) -> Iterator[None]:
    """Let fastdl's CUDA kernels compute products of at most so many multiply-adds; larger ones are torch's."""
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


@dataclass(frozen=True)
class Kernel:
    """A call that memory limits: its bytes, each input read once and each output written once; and torch's call."""

    num_bytes: float
    ours: Run
    torchs: Run


def kernel(name: str, size: int, device: str) -> Kernel:
    """Return a call on arrays of so many float32 numbers, which no cache holds.

    Parameters
    ----------
    name : str
        One of ``KERNELS``; behind a comma the number of classes, or momentum.
    size : int
    device : str
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    kind, _, detail = name.partition(", ")
    if kind == "cross_entropy":
        logits = normal(size // int(detail), int(detail))
        target = torch.randint(int(detail), (len(logits),), device=device)

        def torchs() -> object:
            with torch.enable_grad():
                leaf = logits.detach().requires_grad_()
                loss = F.cross_entropy(leaf, target)
                return loss.detach(), *torch.autograd.grad(loss, leaf)

        ours = partial(cross_entropy_forward, logits, target, None, -100, 0.0, "mean", True)
        return Kernel(8.0 * logits.numel() + 8.0 * len(logits), ours, torchs)
    if kind == "SGD":

        def step(optimizer: Callable[..., torch.optim.Optimizer], **options: bool) -> Run:
            parameters = [torch.nn.Parameter(normal(size // 16)) for _ in range(8)]
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, 1e-3)
            # so slow that a thousand steps leave the numbers ordinary
            return optimizer(parameters, lr=1e-6, momentum=0.9 if detail else 0.0, **options).step

        return Kernel(
            (20.0 if detail else 12.0) * (size // 2), step(optim.SGD), step(torch.optim.SGD, fused=True)
        )
    x, y = normal(size), normal(size)
    if kind == "relu":
        return Kernel(8.0 * size, partial(functional.relu, x), partial(F.relu, x))
    return Kernel(8.0 * size, partial(functional.mse_loss, x, y), partial(F.mse_loss, x, y))


KERNELS = (
    "cross_entropy, 10",
    "cross_entropy, 1000",
    "cross_entropy, 4096",
    "SGD",
    "SGD, momentum",
    "relu",
    "mse_loss",
)
