"""The ops on CUDA tensors: each writes an op's outputs, which come first, from the op's arguments.

Nothing here waits for the GPU, and all memory comes from torch, so each op can be captured in a graph. A
label that is no class can't raise without waiting; its row's loss is NaN and its gradient 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdl.cuda_arrays import cuda_kernels, run
from fastdl.kernels.options import CrossEntropyOptions, SGDOptions

# Products of more multiply-adds than this are torch's, with the kernels' epilogue: cuBLAS keeps a whole GPU
# busy. Where torch may use tensor cores it is ahead sooner. Both are estimates: no GPU has measured them yet.
MOST_PRODUCTS = 1 << 27
MOST_PRODUCTS_BESIDE_TENSOR_CORES = 1 << 24


def _is_torchs_product(num_rows: int, num_steps: int, num_cols: int, dtype: torch.dtype) -> bool:
    products = num_rows * num_steps * num_cols
    if products <= MOST_PRODUCTS_BESIDE_TENSOR_CORES:
        return False
    if dtype in (torch.float16, torch.bfloat16):
        return True
    uses_tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return uses_tf32 or products > MOST_PRODUCTS


def _scratch(like: Tensor, count: int) -> Tensor | None:
    """Return memory for sums, in the type that they are computed in, or None for no sums."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return like.new_empty(count, dtype=dtype) if count else None


def relu_forward(output: Tensor, input: Tensor) -> None:
    """Write max(input, 0)."""
    run(input, cuda_kernels().relu_forward, input, output)


def relu_backward(grad_input: Tensor, grad_output: Tensor, output: Tensor) -> None:
    """Write grad_output where not output <= 0, else 0."""
    run(output, cuda_kernels().relu_backward, grad_output, output, grad_input)


def _masked(grad_output: Tensor, output: Tensor | None) -> Tensor:
    if output is None:
        return grad_output
    grad_input = torch.empty_like(grad_output)
    relu_backward(grad_input, grad_output, output)
    return grad_input


def linear_forward(output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> None:
    """Write relu(input @ weight.T + bias)."""
    if not _is_torchs_product(len(input), input.shape[1], len(weight), input.dtype):
        run(input, cuda_kernels().linear_forward, input, weight, bias, relu, output)
        return
    if bias is None:
        torch.mm(input, weight.t(), out=output)
    else:
        torch.addmm(bias, input, weight.t(), out=output)
    if relu:
        relu_forward(output, output)


def linear_grad_input(grad_input: Tensor, grad_output: Tensor, output: Tensor | None, weight: Tensor) -> None:
    """Write the masked grad_output @ weight."""
    if _is_torchs_product(len(grad_output), len(weight), weight.shape[1], weight.dtype):
        torch.mm(_masked(grad_output, output), weight, out=grad_input)
    else:
        run(weight, cuda_kernels().linear_grad_input, grad_output, output, weight, grad_input)


def linear_grad_weight(
    grads: tuple[Tensor, Tensor], grad_output: Tensor, output: Tensor | None, input: Tensor, *needs_grad: bool
) -> None:
    """Write the masked grad_output.T @ input and grad_output's column sums, where they are wanted."""
    weight, bias = (grad if need else None for grad, need in zip(grads, needs_grad, strict=True))
    (num_rows, num_outputs), num_inputs = grad_output.shape, input.shape[1]
    if weight is None or not _is_torchs_product(num_outputs, num_rows, num_inputs, input.dtype):
        run(input, cuda_kernels().linear_grad_weight, grad_output, output, input, weight, bias)
        return
    masked = _masked(grad_output, output)
    torch.mm(masked.t(), input, out=weight)
    if bias is not None:
        torch.sum(masked, 0, out=bias)


def cross_entropy_forward(
    outputs: tuple[Tensor, Tensor], logits: Tensor, target: Tensor, weight: Tensor | None, *options: Any
) -> None:
    """Write the loss and, where it is wanted, its gradient with respect to the logits."""
    ignore_index, label_smoothing, reduction, need_grad = options
    kernels = cuda_kernels()
    record = CrossEntropyOptions(ignore_index, label_smoothing, kernels.reduction.CODES[reduction])
    num_sums = 0 if reduction == "none" else kernels.cross_entropy_partial_sums(*logits.shape)
    written = outputs[0], outputs[1] if need_grad else None, _scratch(logits, num_sums)
    run(logits, kernels.cross_entropy_forward, logits, target, weight, record, *written)


def cross_entropy_backward(
    scaled: Tensor, grad_loss: Tensor, grad_logits: Tensor, target: Tensor, ignore_index: int
) -> None:
    """Write grad_loss * grad_logits, row by row."""
    arguments = grad_loss, grad_logits, target, ignore_index, scaled
    run(grad_logits, cuda_kernels().cross_entropy_backward, *arguments)


def mse_loss_forward(loss: Tensor, input: Tensor, target: Tensor, reduction: str) -> None:
    """Write (input - target) ** 2, reduced."""
    kernels = cuda_kernels()
    num_sums = 0 if reduction == "none" else kernels.mse_loss_partial_sums(input.numel())
    code, sums = kernels.reduction.CODES[reduction], _scratch(input, num_sums)
    run(input, kernels.mse_loss_forward, input, target, code, loss, sums)


def mse_loss_backward(
    grad_input: Tensor, grad_loss: Tensor, input: Tensor, target: Tensor, reduction: str
) -> None:
    """Write 2 (input - target) grad_loss, over the number of elements for the mean."""
    code = cuda_kernels().reduction.CODES[reduction]
    run(input, cuda_kernels().mse_loss_backward, grad_loss, input, target, code, grad_input)


def sgd(table: Sequence[Sequence[int]], like: Tensor, options: SGDOptions) -> None:
    """Update all parameters of a table, which lie on one GPU, and their momentum buffers in place."""
    run(like, cuda_kernels().sgd, table, like, options)
