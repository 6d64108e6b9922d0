"""The ops on CUDA tensors: the same names and arguments as the ops on the CPU, and the same results.

Nothing here waits for the GPU, and all memory comes from torch, so each op can be captured in a graph. A
label that is no class can't raise without waiting; its row's loss is NaN and its gradient 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

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


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def relu_forward(input: Tensor) -> Tensor:
    """Return max(input, 0)."""
    output = torch.empty_like(input, memory_format=torch.contiguous_format)
    run(input, cuda_kernels().relu_forward, input.contiguous(), output)
    return output


def relu_backward(grad_output: Tensor, output: Tensor) -> Tensor:
    """Return grad_output where not output <= 0, else 0."""
    grad_input = torch.empty_like(grad_output, memory_format=torch.contiguous_format)
    run(output, cuda_kernels().relu_backward, grad_output.contiguous(), output.contiguous(), grad_input)
    return grad_input


def linear_forward(input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """Return relu(input @ weight.T + bias)."""
    (num_rows, num_inputs), num_outputs = input.shape, weight.shape[0]
    if _is_torchs_product(num_rows, num_inputs, num_outputs, input.dtype):
        product = input @ weight.t() if bias is None else torch.addmm(bias, input, weight.t())
        if relu:
            run(product, cuda_kernels().relu_forward, product, product)
        return product
    output = input.new_empty((num_rows, num_outputs))
    arguments = (input.contiguous(), weight.contiguous(), _contiguous(bias), relu, output)
    run(input, cuda_kernels().linear_forward, *arguments)
    return output


def linear_grad_input(grad_output: Tensor, output: Tensor | None, weight: Tensor) -> Tensor:
    """Return the masked grad_output @ weight."""
    (num_rows, num_outputs), num_inputs = grad_output.shape, weight.shape[1]
    if _is_torchs_product(num_rows, num_outputs, num_inputs, weight.dtype):
        return (grad_output if output is None else relu_backward(grad_output, output)) @ weight
    grad_input = grad_output.new_empty((num_rows, num_inputs))
    arguments = (grad_output.contiguous(), _contiguous(output), weight.contiguous(), grad_input)
    run(weight, cuda_kernels().linear_grad_input, *arguments)
    return grad_input


def linear_grad_weight(
    grad_output: Tensor, output: Tensor | None, input: Tensor, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor]:
    """Return the masked grad_output.T @ input and grad_output's column sums, empty where not wanted."""
    (num_rows, num_outputs), num_inputs = grad_output.shape, input.shape[1]
    if need_weight and _is_torchs_product(num_outputs, num_rows, num_inputs, input.dtype):
        masked = grad_output if output is None else relu_backward(grad_output, output)
        return masked.t() @ input, masked.sum(0) if need_bias else input.new_empty(0)
    grad_weight = input.new_empty((num_outputs, num_inputs) if need_weight else (0, 0))
    grad_bias = input.new_empty((num_outputs,) if need_bias else (0,))
    run(
        input,
        cuda_kernels().linear_grad_weight,
        grad_output.contiguous(),
        _contiguous(output),
        input.contiguous(),
        grad_weight if need_weight else None,
        grad_bias if need_bias else None,
    )
    return grad_weight, grad_bias


def cross_entropy_forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Return the loss and its gradient with respect to the logits, empty where not wanted."""
    kernels = cuda_kernels()
    num_rows, num_classes = logits.shape
    loss = logits.new_empty((num_rows,) if reduction == "none" else ())
    grad_logits = logits.new_empty((num_rows, num_classes) if need_grad else (0, 0))
    num_sums = 0 if reduction == "none" else kernels.cross_entropy_partial_sums(num_rows, num_classes)
    run(
        logits,
        kernels.cross_entropy_forward,
        logits.contiguous(),
        target.contiguous(),
        _contiguous(weight),
        CrossEntropyOptions(ignore_index, label_smoothing, kernels.reduction.CODES[reduction]),
        loss,
        grad_logits if need_grad else None,
        _scratch(logits, num_sums),
    )
    return loss, grad_logits


def cross_entropy_backward(
    grad_loss: Tensor, grad_logits: Tensor, target: Tensor, ignore_index: int
) -> Tensor:
    """Return grad_loss * grad_logits, row by row."""
    scaled = torch.empty_like(grad_logits)
    run(
        grad_logits,
        cuda_kernels().cross_entropy_backward,
        grad_loss.contiguous(),
        grad_logits,
        target.contiguous(),
        ignore_index,
        scaled,
    )
    return scaled


def mse_loss_forward(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    """Return (input - target) ** 2, reduced."""
    kernels = cuda_kernels()
    loss = input.new_empty(input.shape if reduction == "none" else ())
    num_sums = 0 if reduction == "none" else kernels.mse_loss_partial_sums(input.numel())
    run(
        input,
        kernels.mse_loss_forward,
        input.contiguous(),
        target.contiguous(),
        kernels.reduction.CODES[reduction],
        loss,
        _scratch(input, num_sums),
    )
    return loss


def mse_loss_backward(grad_loss: Tensor, input: Tensor, target: Tensor, reduction: str) -> Tensor:
    """Return 2 (input - target) grad_loss, over the number of elements for the mean."""
    kernels = cuda_kernels()
    grad_input = input.new_empty(input.shape)
    run(
        input,
        kernels.mse_loss_backward,
        grad_loss.contiguous(),
        input.contiguous(),
        target.contiguous(),
        kernels.reduction.CODES[reduction],
        grad_input,
    )
    return grad_input


def sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    first_step: Sequence[bool],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    """Update all parameters, which lie on one GPU, and their momentum buffers in place."""
    buffers: Sequence[Tensor | None] = momentum_buffers or [None] * len(params)
    # a contiguous copy of a gradient has to live until the kernel is launched
    grads = [grad.contiguous() for grad in grads]
    table = [
        (
            param.data_ptr(),
            grad.data_ptr(),
            0 if buffer is None else buffer.data_ptr(),
            param.numel(),
            int(first),
        )
        for param, grad, buffer, first in zip(params, grads, buffers, first_step, strict=True)
    ]
    run(
        params[0],
        cuda_kernels().sgd,
        table,
        params[0],
        SGDOptions(lr, momentum, dampening, weight_decay, nesterov, maximize),
    )
    # the kernel writes where torch can't see it; a graph that saved a parameter must notice
    increment_version([*params, *momentum_buffers])
