"""Each op of fastdl in plain, differentiable PyTorch: the ground truth that the kernels are held to.

Tests compare the kernels with these functions in float64, benchmarks race against them, and the backward
passes of :mod:`fastdl.ops` fall back on them when a gradient must itself be differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``input @ weight.T + bias`` for input (N, K), weight (M, K) and bias (M,)."""
    output = input @ weight.T
    return output if bias is None else output + bias


def relu(input: Tensor) -> Tensor:
    """Return the elementwise maximum of the input and 0; NaN stays NaN."""
    return torch.where(input <= 0, torch.zeros_like(input), input)


def linear_backward(
    grad_output: Tensor,
    output: Tensor | None,
    input: Tensor | None,
    weight: Tensor | None,
    needs_grad: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the wanted ones of grad_input, grad_weight and grad_bias, themselves differentiable.

    ``output`` is the forward's result where it had a ReLU. ``input`` is needed for grad_weight alone, and
    ``weight`` for grad_input.
    """
    if output is not None:
        grad_output = torch.where(output <= 0, torch.zeros_like(grad_output), grad_output)
    need_input, need_weight, need_bias = needs_grad
    return (
        grad_output @ weight if need_input and weight is not None else None,
        grad_output.T @ input if need_weight and input is not None else None,
        grad_output.sum(dim=0) if need_bias else None,
    )


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``relu(linear(input, weight, bias))``."""
    return relu(linear(input, weight, bias))


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the cross entropy of the logits (N, C) with class indices (N,), reduced over the rows.

    A row's loss is ``-weight[target] * log_softmax(logits)[target]``; label smoothing gives every class
    ``label_smoothing / C`` of the probability. ``"mean"`` divides by the sum of the rows' weights.
    """
    num_classes = logits.shape[1]
    counted = target != ignore_index
    label = torch.where(counted, target, 0)
    log_probabilities = torch.log_softmax(logits, dim=1)
    class_weight = logits.new_ones(num_classes) if weight is None else weight
    row_weight = torch.where(counted, class_weight[label], 0)
    losses = -class_weight[label] * log_probabilities.gather(1, label.unsqueeze(1)).squeeze(1)
    if label_smoothing > 0:
        smooth = -(log_probabilities * class_weight).sum(dim=1)
        losses = (1 - label_smoothing) * losses + label_smoothing / num_classes * smooth
    losses = torch.where(counted, losses, 0)
    if reduction == "none":
        return losses
    return losses.sum() / row_weight.sum() if reduction == "mean" else losses.sum()


def cross_entropy_grad(
    logits: Tensor, target: Tensor, weight: Tensor, ignore_index: int, reduction: str, label_smoothing: float
) -> Tensor:
    """Return the gradient of the cross entropy, or of each row's; what isn't finite in it is as torch's."""
    counted = target != ignore_index
    label = torch.where(counted, target, 0)
    total = weight[target[counted]].sum() if reduction == "mean" else weight.new_ones(())
    of_label = torch.where(counted, -weight[label] * ((1 - label_smoothing) / total), 0)
    grad = torch.zeros_like(logits).scatter(1, label.unsqueeze(1), of_label.unsqueeze(1))
    if label_smoothing > 0:
        of_all = torch.where(counted, -label_smoothing / len(weight) / total, 0)
        grad += of_all.unsqueeze(1) * weight
    return grad - torch.softmax(logits, dim=1) * grad.sum(dim=1, keepdim=True)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the cross entropy of ``linear(input, linear_weight, linear_bias)`` with class indices (N,)."""
    logits = linear(input, linear_weight, linear_bias)
    return cross_entropy(logits, target, weight, ignore_index, reduction, label_smoothing)


def mse_loss(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Return ``(input - target) ** 2``, elementwise or its mean or sum."""
    losses = (input - target) ** 2
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


@torch.no_grad()
def sgd(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor | None],
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> None:
    """Update the parameters in place; a momentum buffer that is None is made of the first gradient."""
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        step = -grad if maximize else grad
        if weight_decay != 0:
            step = step + weight_decay * param
        if momentum != 0:
            buffer = momentum_buffers[i]
            buffer = step.clone() if buffer is None else momentum * buffer + (1 - dampening) * step
            momentum_buffers[i] = buffer
            step = step + momentum * buffer if nesterov else buffer
        param -= lr * step
