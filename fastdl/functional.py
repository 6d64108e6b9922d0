"""The ops as functions, with the signatures, results and errors of ``torch.nn.functional``.

A call goes to the kernels where all its floating-point tensors are plain, dense and of one dtype: float32 or
float64 on the CPU, float16 and bfloat16 too on an NVIDIA GPU. Everything else is handed to torch's function
of the same name: other dtypes and devices, autocast, ``torch.func`` transforms, forward-mode differentiation,
tensor subclasses, tracing, and the rarer forms that each docstring names. So the result is always torch's.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdl.arrays import accepts, are_labels
from fastdl.ops.cross_entropy import apply_cross_entropy, apply_linear_cross_entropy
from fastdl.ops.linear import apply_linear
from fastdl.ops.mse_loss import apply_mse_loss
from fastdl.ops.relu import apply_relu
from fastdl.torch_private import in_shape

__all__ = ["cross_entropy", "linear", "linear_cross_entropy", "linear_relu", "mse_loss", "relu"]

_REDUCTIONS = ("none", "mean", "sum")


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor | None:
    """Return the kernel's result, or None for a form that is torch's."""
    if weight is None or not accepts(input, weight, bias):
        return None
    shape, weight_shape = input.shape, weight.shape
    if len(weight_shape) != 2 or not shape or (bias is not None and bias.shape != weight_shape[:1]):
        return None
    num_outputs, num_inputs = weight_shape
    if shape[-1] != num_inputs:
        raise RuntimeError(
            f"linear: input of shape {tuple(shape)} has {shape[-1]} features, but weight of "
            f"shape {tuple(weight_shape)} takes {num_inputs}: the last dimension of both must be the same"
        )
    rows = input if len(shape) == 2 else input.reshape(math.prod(shape[:-1]), num_inputs)
    output: Tensor = apply_linear(
        rows.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous(), relu
    )
    return output if len(shape) == 2 else in_shape(output, (*shape[:-1], num_outputs))


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear layer: ``input @ weight.T + bias``.

    Parameters
    ----------
    input : Tensor, (..., K)
        Any number of leading dimensions, none and empty ones included.
    weight : Tensor, (M, K)
        A 1-D weight is handed to torch.
    bias : Tensor, (M,), optional

    Returns
    -------
    Tensor, (..., M)

    Raises
    ------
    RuntimeError
        If the shapes don't fit or the dtypes differ, as torch does.

    Examples
    --------
    >>> linear(torch.ones(2, 3), torch.ones(1, 3), torch.ones(1))
    tensor([[4.],
            [4.]])
    """
    output = _linear(input, weight, bias, relu=False)
    return F.linear(input, weight, bias) if output is None else output


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear layer and ReLU in one pass: ``relu(linear(input, weight, bias))``.

    Arguments, result and errors are those of :func:`linear`.

    Examples
    --------
    >>> linear_relu(torch.ones(1, 3), torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]]))
    tensor([[3., 0.]])
    """
    output = _linear(input, weight, bias, relu=True)
    return F.relu(F.linear(input, weight, bias)) if output is None else output


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """Return the elementwise ``max(input, 0)``; NaN stays NaN.

    Parameters
    ----------
    input : Tensor, any shape
        One that isn't contiguous is handed to torch, which keeps its memory format.
    inplace : bool
        Writing over the input is torch's.

    Examples
    --------
    >>> relu(torch.tensor([-1.0, 2.0]))
    tensor([0., 2.])
    """
    if inplace or not accepts(input) or not input.is_contiguous():
        return F.relu(input, inplace)
    output: Tensor = apply_relu(input)
    return output


def _takes_class_indices(
    logits_shape: tuple[int, ...],
    device: torch.device,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> bool:
    """Return whether the loss is of the form the kernel knows; torch has the rest, and the errors."""
    if not logits_shape:
        return False
    class_dimension = 0 if len(logits_shape) == 1 else 1
    num_classes = logits_shape[class_dimension]
    return (
        num_classes > 0
        and are_labels(target, logits_shape[:class_dimension] + logits_shape[class_dimension + 1 :], device)
        and (weight is None or (weight.shape == (num_classes,) and not weight.requires_grad))
        and reduction in _REDUCTIONS
        and type(ignore_index) is int
        and -(2**63) <= ignore_index < 2**63
        and type(label_smoothing) in (float, int)
        and 0.0 <= label_smoothing <= 1.0
    )


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the cross entropy between logits and class labels, numerically stable.

    Parameters
    ----------
    input : Tensor, (C,), (N, C) or (N, C, d1, ...)
        Logits. They are saved for backward, so changing them in place before it is an error.
    target : Tensor, (), (N,) or (N, d1, ...), int64
        Class indices. Class probabilities, and other dtypes, are handed to torch.
    weight : Tensor, (C,), optional
        A weight for each class; handed to torch if it requires a gradient.
    size_average, reduce : bool, optional
        Deprecated in torch, and handed to it.
    ignore_index : int
        Rows with this label count for nothing.
    reduction : {"mean", "sum", "none"}
        The mean is over the rows' weights.
    label_smoothing : float
        The part of each row's probability that is spread over all classes, from 0 to 1.

    Returns
    -------
    Tensor
        A scalar, or of the target's shape for ``"none"``.

    Raises
    ------
    IndexError
        If a label is no class and not ignore_index. On a GPU, where raising would cost a wait, the row's loss
        is NaN and its gradient 0.
    ValueError, RuntimeError
        If shapes, dtypes, reduction or label_smoothing don't fit, as torch does.

    Examples
    --------
    >>> cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]))
    tensor(1.3863)
    """
    if (
        size_average is not None
        or reduce is not None
        or not accepts(input, weight)
        or not _takes_class_indices(
            tuple(input.shape), input.device, target, weight, ignore_index, reduction, label_smoothing
        )
    ):
        return F.cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    num_classes = input.shape[0 if input.dim() == 1 else 1]
    logits = (
        input if input.dim() == 2 else input.movedim(min(1, input.dim() - 1), -1).reshape(-1, num_classes)
    )
    loss: Tensor
    loss, _ = apply_cross_entropy(
        logits.contiguous(),
        (target if target.dim() == 1 else target.reshape(-1)).contiguous(),
        None if weight is None else weight.contiguous(),
        ignore_index,
        float(label_smoothing),
        reduction,
        _wants_grad(input),
    )
    return in_shape(loss, target.shape) if reduction == "none" and target.dim() != 1 else loss


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: object | None = None,
) -> Tensor:
    """Return ``cross_entropy(linear(input, linear_weight, linear_bias), target)`` as one op.

    The signature is that of the newest torch; it works the same on the older ones.

    Parameters
    ----------
    input : Tensor, (K,) or (N, K)
        Input, linear_weight and linear_bias are saved for backward, so changing them in place before it is an
        error.
    linear_weight : Tensor, (C, K) or (C, d1, ..., K)
        With more than two dimensions the linear layer and the loss run as two ops.
    target : Tensor, () or (N,), int64; (N, d1, ...) for the K-dimensional loss
        Class indices. Class probabilities run as two ops, the loss by torch.
    linear_bias : Tensor, (C,) or (C, d1, ...), optional
    weight, reduction, label_smoothing
        As in :func:`cross_entropy`.
    ignore_index : int, optional
        None means -100 for class indices.
    options
        torch's ``LinearCrossEntropyOptions``, the chunked algorithm for great numbers of classes: handed
        to torch.

    Returns
    -------
    Tensor
        A scalar, or of the target's shape for ``"none"``.

    Raises
    ------
    IndexError
        If a label is no class and not ignore_index; on a GPU as for :func:`cross_entropy`.
    ValueError, RuntimeError
        If shapes, dtypes, reduction or label_smoothing don't fit, as torch does.

    Examples
    --------
    >>> linear_cross_entropy(torch.ones(2, 3), torch.zeros(4, 3), torch.tensor([0, 3]))
    tensor(1.3863)
    """
    has_torchs = hasattr(F, "linear_cross_entropy")
    if options is not None and not has_torchs:
        raise RuntimeError(
            f"options {options} ask for torch's chunked linear_cross_entropy, which torch "
            f"{torch.__version__} doesn't have: leave them out, or install torch 2.13 or newer"
        )
    is_accepted = (
        linear_weight is not None
        and isinstance(target, Tensor)
        and accepts(input, linear_weight, linear_bias, weight)
    )
    if options is not None or (has_torchs and not is_accepted):
        return F.linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,  # type: ignore[arg-type]
        )
    num_classes, *out_features = _check_linear_cross_entropy(input, linear_weight, linear_bias)
    logits_shape = (*input.shape[:-1], num_classes, *out_features)
    if ignore_index is not None and tuple(target.shape) == logits_shape:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    ignore_index = -100 if ignore_index is None else ignore_index
    if (
        input.dim() == 2
        and not out_features
        and is_accepted
        and _takes_class_indices(
            logits_shape, input.device, target, weight, ignore_index, reduction, label_smoothing
        )
    ):
        loss: Tensor
        loss, _ = apply_linear_cross_entropy(
            input.contiguous(),
            linear_weight.contiguous(),
            None if linear_bias is None else linear_bias.contiguous(),
            target.contiguous(),
            None if weight is None else weight.contiguous(),
            ignore_index,
            float(label_smoothing),
            reduction,
            _wants_grad(input, linear_weight, linear_bias),
        )
        return loss
    flat_weight = linear_weight.reshape(-1, linear_weight.shape[-1]) if out_features else linear_weight
    flat_bias = linear_bias.reshape(-1) if linear_bias is not None and out_features else linear_bias
    logits = linear(input, flat_weight, flat_bias).reshape(logits_shape)
    return cross_entropy(
        logits,
        target,
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def _check_linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None
) -> tuple[int, ...]:
    """Return the shape of one row's logits, or raise what torch raises."""
    if input.dim() not in (1, 2):
        raise RuntimeError(
            f"expected input with dimensionality 1 or 2, got {input.dim()} for shape {tuple(input.shape)}"
        )
    if linear_weight.dim() < 2:
        raise RuntimeError(
            f"expected linear_weight with dimensionality at least 2, got shape {tuple(linear_weight.shape)}"
        )
    if input.shape[-1] != linear_weight.shape[-1]:
        raise RuntimeError(
            "expected equal input and linear_weight last dimensions (in_features), got shapes "
            f"{tuple(input.shape)} and {tuple(linear_weight.shape)}"
        )
    row_shape = tuple(linear_weight.shape[:-1])
    if linear_bias is not None and tuple(linear_bias.shape) != row_shape:
        raise RuntimeError(f"expected linear_bias shape {row_shape}, got {tuple(linear_bias.shape)}")
    if input.dim() == 1 and len(row_shape) > 1:
        raise RuntimeError(
            f"K-dimensional loss defined by linear_weight shape {tuple(linear_weight.shape)} requires "
            f"batched input, (N, {input.shape[-1]}), got shape {tuple(input.shape)}"
        )
    return row_shape


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """Return the squared error ``(input - target) ** 2``.

    Parameters
    ----------
    input, target : Tensor, of one shape
        Shapes that have to be broadcast are handed to torch, with its warning.
    size_average, reduce : bool, optional
        Deprecated in torch, and handed to it.
    reduction : {"mean", "sum", "none"}
        ``"none"`` of tensors that aren't contiguous is handed to torch, which keeps their memory format.
    weight : Tensor, optional
        A weight for each element: handed to torch.

    Returns
    -------
    Tensor
        A scalar, or of the input's shape for ``"none"``.

    Raises
    ------
    ValueError, RuntimeError
        If shapes or reduction don't fit, as torch does.

    Examples
    --------
    >>> mse_loss(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0]))
    tensor(5.)
    """
    if (
        size_average is not None
        or reduce is not None
        or weight is not None
        or reduction not in _REDUCTIONS
        or not accepts(input, target)
        or input.shape != target.shape
        or (reduction == "none" and not (input.is_contiguous() and target.is_contiguous()))
    ):
        # the type stubs of torch 2.14 and older know no weight
        options = {} if weight is None else {"weight": weight}
        return F.mse_loss(input, target, size_average, reduce, reduction, **options)
    loss: Tensor = apply_mse_loss(input.contiguous(), target.contiguous(), reduction)
    return loss
