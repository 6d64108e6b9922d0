"""Softmax-cross-entropy with class indices, alone and fused with the linear layer before it."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fastdl.arrays import address, are_labels, cpu_kernels, like, num_threads
from fastdl.ops import _cuda
from fastdl.ops._autograd import apply_of, reference_grads, takes_kernels
from fastdl.ops._registration import register
from fastdl.ops.linear import fits, linear_backward, linear_forward
from fastdl.reference import ops as reference


def _forward(outputs: tuple[Tensor, Tensor], logits: Tensor, target: Tensor, *arguments: Any) -> None:
    weight, ignore_index, label_smoothing, reduction, _ = arguments
    loss, grad_logits = outputs
    kernels = cpu_kernels()
    inputs = logits.data_ptr(), target.data_ptr(), address(weight)
    invalid_row = kernels.cross_entropy_forward(
        (*inputs, loss.data_ptr(), grad_logits.data_ptr()),
        (*logits.shape,),
        (ignore_index, label_smoothing, kernels.reduction.CODES[reduction]),
        num_threads(),
        like(logits.dtype),
    )
    if invalid_row >= 0:
        raise IndexError(
            f"Target {target[invalid_row].item()} is out of bounds: row {invalid_row} of target must be a "
            f"class from 0 to {logits.shape[1] - 1} or the ignore_index {ignore_index}"
        )
    # where weights aren't finite, or those of a batch sum to 0, torch meets inf - inf and 0 * inf elsewhere
    if weight is not None and not math.isfinite(loss.sum().item()):
        options = ignore_index, reduction, label_smoothing
        loss.copy_(F.cross_entropy(logits, target, weight, None, ignore_index, None, *options[1:]))
        if grad_logits.numel():
            grad_logits.copy_(reference.cross_entropy_grad(logits, target, weight, *options))


@register(_forward, _cuda.cross_entropy_forward, "N C, int64 N, C")
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
    loss = logits.new_empty((logits.shape[0],) if reduction == "none" else ())
    return loss, logits.new_empty(logits.shape if need_grad else (0, 0))


def _backward(
    scaled: Tensor, grad_loss: Tensor, grad_logits: Tensor, target: Tensor, ignore_index: int
) -> None:
    addresses = grad_loss.data_ptr(), grad_logits.data_ptr(), target.data_ptr(), scaled.data_ptr()
    sizes, threads = (grad_loss.numel(), *grad_logits.shape), num_threads()
    kernel = cpu_kernels().cross_entropy_backward
    kernel(addresses, sizes, ignore_index, threads, like(grad_logits.dtype))


@register(_backward, _cuda.cross_entropy_backward, "|N, N C, int64 N")
def cross_entropy_backward(
    grad_loss: Tensor, grad_logits: Tensor, target: Tensor, ignore_index: int
) -> Tensor:
    """Return grad_loss * grad_logits, row by row."""
    return grad_logits.new_empty(grad_logits.shape)


def _grad_logits(grad_loss: Tensor, grad_logits: Tensor, target: Tensor, ignore_index: int) -> Tensor | None:
    """Return ``grad_loss * grad_logits``, or None where it has to be made of differentiable torch ops."""
    if (
        not takes_kernels(grad_loss, grad_logits)
        or grad_logits.dim() != 2
        or not are_labels(target, grad_logits.shape[:1], grad_logits.device)
        or (grad_loss.dim() != 0 and grad_loss.shape != target.shape)
    ):
        return None
    return cross_entropy_backward(grad_loss.contiguous(), grad_logits, target.contiguous(), ignore_index)


def _keep_grad_logits(ctx: Any, output: tuple[Tensor, Tensor], *inputs: Tensor | None) -> None:
    _, grad_logits = output
    ctx.save_for_backward(*inputs, grad_logits)
    # an output only so that it can be saved: no gradient flows into it, not even zeros
    ctx.mark_non_differentiable(grad_logits)
    ctx.set_materialize_grads(False)


class CrossEntropyFunction(Function):
    """The op for autograd: logits (N, C), target (N,), all contiguous."""

    forward = staticmethod(cross_entropy_forward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep grad_logits, and the inputs for a gradient of the gradient."""
        logits, target, weight, *ctx.options, _ = inputs
        _keep_grad_logits(ctx, output, logits, target, weight)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        """Return ``grad_loss * grad_logits``."""
        if grad_loss is None:
            return (None,) * 7
        logits, target, weight, grad_logits = ctx.saved_tensors
        ignore_index, label_smoothing, reduction = ctx.options
        scaled = _grad_logits(grad_loss, grad_logits, target, ignore_index)
        if scaled is None:

            def forward(logits: Tensor) -> Tensor:
                options = (weight, ignore_index, reduction, label_smoothing)
                return reference.cross_entropy(logits, target, *options)

            return *reference_grads(forward, (logits,), (True,), grad_loss), *(None,) * 6
        return scaled, *(None,) * 6


class LinearCrossEntropyFunction(Function):
    """Linear layer and loss as one op for autograd: input (N, K), linear_weight (C, K), target (N,).

    All are contiguous. One op in place of two saves autograd's own time, and the logits are gone after the
    forward.
    """

    @staticmethod
    def forward(
        input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, *options: Any
    ) -> tuple[Tensor, Tensor]:
        """Return what :func:`cross_entropy_forward` does, with its other arguments as options."""
        return cross_entropy_forward(
            linear_forward(input, linear_weight, linear_bias, False), target, *options
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep grad_logits and the inputs."""
        input, linear_weight, linear_bias, target, weight, *ctx.options, _ = inputs
        _keep_grad_logits(ctx, output, input, linear_weight, linear_bias, target, weight)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        """Return the gradients that are wanted of input, linear_weight and linear_bias."""
        if grad_loss is None:
            return (None,) * 9
        input, linear_weight, linear_bias, target, weight, grad_logits = ctx.saved_tensors
        ignore_index, label_smoothing, reduction = ctx.options
        needs_grad = ctx.needs_input_grad[:3]
        scaled = _grad_logits(grad_loss, grad_logits, target, ignore_index)
        if (
            scaled is None
            or not takes_kernels(scaled, input, linear_weight)
            or not fits(scaled, None, input, linear_weight)
        ):

            def forward(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
                options = (linear_bias, weight, ignore_index, reduction, label_smoothing)
                return reference.linear_cross_entropy(input, linear_weight, target, *options)

            inputs = (input, linear_weight, linear_bias)
            return *reference_grads(forward, inputs, needs_grad, grad_loss), *(None,) * 6
        return *linear_backward(scaled, None, input, linear_weight, needs_grad), *(None,) * 6


apply_cross_entropy = apply_of(CrossEntropyFunction)
apply_linear_cross_entropy = apply_of(LinearCrossEntropyFunction)
