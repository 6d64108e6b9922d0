"""Squared error: ``(input - target) ** 2``, elementwise or its mean or sum."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastdl.arrays import cpu_kernels, like, num_threads
from fastdl.ops import _cuda
from fastdl.ops._autograd import apply_of, reference_grads, takes_kernels
from fastdl.ops._registration import register
from fastdl.reference import ops as reference


def _forward(loss: Tensor, input: Tensor, target: Tensor, reduction: str) -> None:
    kernels = cpu_kernels()
    addresses = input.data_ptr(), target.data_ptr(), loss.data_ptr()
    code = kernels.reduction.CODES[reduction]
    kernels.mse_loss_forward(addresses, input.numel(), code, num_threads(), like(input.dtype))


@register(_forward, _cuda.mse_loss_forward, "*, *")
def mse_loss_forward(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    """Return (input - target) ** 2, reduced."""
    return input.new_empty(input.shape if reduction == "none" else ())


def _backward(grad_input: Tensor, grad_loss: Tensor, input: Tensor, target: Tensor, reduction: str) -> None:
    kernels = cpu_kernels()
    addresses = grad_loss.data_ptr(), input.data_ptr(), target.data_ptr(), grad_input.data_ptr()
    sizes, code = (grad_loss.numel(), input.numel()), kernels.reduction.CODES[reduction]
    kernels.mse_loss_backward(addresses, sizes, code, num_threads(), like(input.dtype))


@register(_backward, _cuda.mse_loss_backward, "|*, *, *")
def mse_loss_backward(grad_loss: Tensor, input: Tensor, target: Tensor, reduction: str) -> Tensor:
    """Return 2 (input - target) grad_loss, over the number of elements for the mean."""
    return input.new_empty(input.shape)


class MSELossFunction(Function):
    """The op for autograd: input and target of one shape, contiguous."""

    forward = staticmethod(mse_loss_forward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep input and target."""
        input, target, ctx.reduction = inputs
        ctx.save_for_backward(input, target)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Return ``2 (input - target) grad_loss``, over the number of elements for the mean."""
        need_input, need_target, _ = ctx.needs_input_grad
        input, target = ctx.saved_tensors
        is_reduced = ctx.reduction != "none"
        fits = input.shape == target.shape and (
            grad_loss.dim() == 0 if is_reduced else grad_loss.shape == input.shape
        )
        if not fits or not takes_kernels(grad_loss, input, target):
            forward = partial(reference.mse_loss, reduction=ctx.reduction)
            return *reference_grads(forward, (input, target), (need_input, need_target), grad_loss), None
        grad_input = mse_loss_backward(grad_loss.contiguous(), input, target, ctx.reduction)
        # the target stands in the difference with a minus
        grad_target = torch.neg(grad_input) if need_target else None
        return grad_input if need_input else None, grad_target, None


apply_mse_loss = apply_of(MSELossFunction)
