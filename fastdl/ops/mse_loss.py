"""Squared error: ``(input - target) ** 2``, elementwise or its mean or sum."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastdl.arrays import address, cpu_kernels, like, num_threads
from fastdl.ops import _cuda
from fastdl.ops._autograd import apply_of, must_be_differentiable, reference_grads
from fastdl.ops._registration import register
from fastdl.reference import ops as reference


def _forward(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    loss = _forward_fake(input, target, reduction)
    kernels = cpu_kernels()
    kernels.addressed.mse_loss_forward(
        address(input),
        address(target),
        address(loss),
        input.numel(),
        kernels.reduction.CODES[reduction],
        num_threads(),
        like(input.dtype),
    )
    return loss


def _forward_fake(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    return input.new_empty(input.shape if reduction == "none" else ())


def _backward(grad_loss: Tensor, input: Tensor, target: Tensor, reduction: str) -> Tensor:
    grad_input = _backward_fake(grad_loss, input, target, reduction)
    kernels = cpu_kernels()
    kernels.addressed.mse_loss_backward(
        address(grad_loss),
        address(input),
        address(target),
        address(grad_input),
        input.numel(),
        kernels.reduction.CODES[reduction],
        num_threads(),
        like(input.dtype),
    )
    return grad_input


def _backward_fake(grad_loss: Tensor, input: Tensor, target: Tensor, reduction: str) -> Tensor:
    return input.new_empty(input.shape)


mse_loss_forward = register(
    "mse_loss_forward(Tensor input, Tensor target, str reduction) -> Tensor",
    _forward,
    _cuda.mse_loss_forward,
    _forward_fake,
)
mse_loss_backward = register(
    "mse_loss_backward(Tensor grad_loss, Tensor input, Tensor target, str reduction) -> Tensor",
    _backward,
    _cuda.mse_loss_backward,
    _backward_fake,
)


class MSELossFunction(Function):
    """The op for autograd: input and target of one shape, contiguous."""

    @staticmethod
    def forward(input: Tensor, target: Tensor, reduction: str) -> Tensor:
        """Return (input - target) ** 2, reduced."""
        loss: Tensor = mse_loss_forward(input, target, reduction)
        return loss

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep input and target."""
        input, target, ctx.reduction = inputs
        ctx.save_for_backward(input, target)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Return ``2 (input - target) grad_loss``, over the number of elements for the mean."""
        input, target = ctx.saved_tensors
        need_input, need_target, _ = ctx.needs_input_grad
        if must_be_differentiable(grad_loss):
            forward = partial(reference.mse_loss, reduction=ctx.reduction)
            return *reference_grads(forward, (input, target), (need_input, need_target), grad_loss), None
        grad_input = mse_loss_backward(grad_loss.contiguous(), input, target, ctx.reduction)
        # the target stands in the difference with a minus
        grad_target = torch.neg(grad_input) if need_target else None
        return grad_input if need_input else None, grad_target, None


apply_mse_loss = apply_of(MSELossFunction)
