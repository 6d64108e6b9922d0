"""Softmax-cross-entropy with class indices, alone and fused with the linear layer before it."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd import Function

from fastdl.arrays import address, cpu_kernels, like, num_threads
from fastdl.ops import _cuda
from fastdl.ops._autograd import apply_of, must_be_differentiable, reference_grads
from fastdl.ops._registration import register
from fastdl.ops.linear import linear_backward, linear_forward
from fastdl.reference import ops as reference


def _forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    loss, grad_logits = _forward_fake(
        logits, target, weight, ignore_index, label_smoothing, reduction, need_grad
    )
    kernels = cpu_kernels()
    invalid_row = kernels.addressed.cross_entropy_forward(
        address(logits),
        address(target),
        address(weight),
        address(loss),
        address(grad_logits),
        *logits.shape,
        ignore_index,
        label_smoothing,
        kernels.reduction.CODES[reduction],
        num_threads(),
        like(logits.dtype),
    )
    if invalid_row >= 0:
        raise IndexError(
            f"Target {target[invalid_row].item()} is out of bounds: row {invalid_row} of target must be a "
            f"class from 0 to {logits.shape[1] - 1} or the ignore_index {ignore_index}"
        )
    return loss, grad_logits


def _forward_fake(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty((logits.shape[0],) if reduction == "none" else ())
    return loss, logits.new_empty(logits.shape if need_grad else (0, 0))


def _backward(grad_loss: Tensor, grad_logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    scaled = _backward_fake(grad_loss, grad_logits, target, ignore_index)
    cpu_kernels().addressed.cross_entropy_backward(
        address(grad_loss),
        address(grad_logits),
        address(target),
        address(scaled),
        grad_loss.numel(),
        *grad_logits.shape,
        ignore_index,
        num_threads(),
        like(grad_logits.dtype),
    )
    return scaled


def _backward_fake(grad_loss: Tensor, grad_logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    return grad_logits.new_empty(grad_logits.shape)


cross_entropy_forward = register(
    "cross_entropy_forward(Tensor logits, Tensor target, Tensor? weight, int ignore_index,"
    " float label_smoothing, str reduction, bool need_grad) -> (Tensor loss, Tensor grad_logits)",
    _forward,
    _cuda.cross_entropy_forward,
    _forward_fake,
)
cross_entropy_backward = register(
    "cross_entropy_backward(Tensor grad_loss, Tensor grad_logits, Tensor target, int ignore_index) -> Tensor",
    _backward,
    _cuda.cross_entropy_backward,
    _backward_fake,
)


def _keep_grad_logits(ctx: Any, output: tuple[Tensor, Tensor], *inputs: Tensor | None) -> None:
    _, grad_logits = output
    ctx.save_for_backward(*inputs, grad_logits)
    # an output only so that it can be saved: no gradient flows into it, not even zeros
    ctx.mark_non_differentiable(grad_logits)
    ctx.set_materialize_grads(False)


class CrossEntropyFunction(Function):
    """The op for autograd: logits (N, C), target (N,), all contiguous."""

    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        reduction: str,
        need_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return the loss, and its gradient with respect to the logits, empty where it isn't wanted."""
        loss, grad_logits = cross_entropy_forward(
            logits, target, weight, ignore_index, label_smoothing, reduction, need_grad
        )
        return loss, grad_logits

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
        if must_be_differentiable(grad_loss):
            forward = partial(
                reference.cross_entropy,
                target=target,
                weight=weight,
                ignore_index=ignore_index,
                reduction=reduction,
                label_smoothing=label_smoothing,
            )
            return *reference_grads(forward, (logits,), (True,), grad_loss), *(None,) * 6
        grad_logits = cross_entropy_backward(grad_loss.contiguous(), grad_logits, target, ignore_index)
        return grad_logits, *(None,) * 6


class LinearCrossEntropyFunction(Function):
    """Linear layer and loss as one op for autograd: input (N, K), linear_weight (C, K), target (N,).

    All are contiguous. One op in place of two saves autograd's own time, and the logits are gone after the
    forward.
    """

    @staticmethod
    def forward(
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        reduction: str,
        need_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return the loss, and its gradient with respect to the logits, empty where none is wanted."""
        logits = linear_forward(input, linear_weight, linear_bias, False)
        loss, grad_logits = cross_entropy_forward(
            logits, target, weight, ignore_index, label_smoothing, reduction, need_grad
        )
        return loss, grad_logits

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
        if must_be_differentiable(grad_loss):

            def forward(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
                return reference.linear_cross_entropy(
                    input,
                    linear_weight,
                    target,
                    linear_bias,
                    weight,
                    ignore_index,
                    reduction,
                    label_smoothing,
                )

            inputs = (input, linear_weight, linear_bias)
            return *reference_grads(forward, inputs, needs_grad, grad_loss), *(None,) * 6
        grad_logits = cross_entropy_backward(grad_loss.contiguous(), grad_logits, target, ignore_index)
        return *linear_backward(grad_logits, None, input, linear_weight, needs_grad), *(None,) * 6


apply_cross_entropy = apply_of(CrossEntropyFunction)
apply_linear_cross_entropy = apply_of(LinearCrossEntropyFunction)
