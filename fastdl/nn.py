"""Drop-in modules on the kernels, and :func:`accelerate`, which swaps them into a model that stands.

Each is a subclass of torch's module of the same name: the same constructor, parameters and state_dict.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from fastdl import functional

__all__ = [
    "Acceleration",
    "CrossEntropyLoss",
    "Linear",
    "LinearCrossEntropyLoss",
    "LinearReLU",
    "MSELoss",
    "ReLU",
    "accelerate",
]


class Linear(nn.Linear):
    """``torch.nn.Linear`` on the fused linear + bias kernel; see :func:`fastdl.functional.linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input @ weight.T + bias`` for an input (..., in_features)."""
        return functional.linear(input, self.weight, self.bias)


class LinearReLU(nn.Linear):
    """A linear layer and the ReLU after it as one op; parameters and state_dict are ``torch.nn.Linear``'s."""

    def forward(self, input: Tensor) -> Tensor:
        """Return ``relu(input @ weight.T + bias)`` for an input (..., in_features)."""
        return functional.linear_relu(input, self.weight, self.bias)


class ReLU(nn.ReLU):
    """``torch.nn.ReLU`` on the kernel; see :func:`fastdl.functional.relu`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return ``max(input, 0)``."""
        return functional.relu(input, inplace=self.inplace)


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss`` on the kernel; see :func:`fastdl.functional.cross_entropy`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits (N, C) and class indices (N,)."""
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class MSELoss(nn.MSELoss):
    """``torch.nn.MSELoss`` on the kernel; see :func:`fastdl.functional.mse_loss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the squared error, reduced."""
        return functional.mse_loss(input, target, reduction=self.reduction)


if TYPE_CHECKING:
    from torch.nn import Module as _TorchsLinearCrossEntropyLoss
else:
    _TorchsLinearCrossEntropyLoss = getattr(nn, "LinearCrossEntropyLoss", nn.Module)


class LinearCrossEntropyLoss(_TorchsLinearCrossEntropyLoss):
    """The last linear layer and the loss as one op; see :func:`fastdl.functional.linear_cross_entropy`.

    Signature, parameters and state_dict are those of ``torch.nn.LinearCrossEntropyLoss``. It is a subclass of
    it where torch has it, from 2.13 on, and is defined on older ones too.

    Parameters
    ----------
    in_features, num_classes : int
    out_features : tuple of int
        The further dimensions (d1, ...) of a K-dimensional loss.
    bias : bool
        Whether the linear layer has a bias.
    device, dtype
        Of the parameters.
    reduction : {"mean", "sum", "none"}
    weight : Tensor, (num_classes,), optional
        A weight for each class.
    ignore_index : int, optional
    label_smoothing : float
    options
        torch's options of its chunked algorithm, handed to it.

    Raises
    ------
    RuntimeError
        If weight has another shape or label_smoothing is not in [0, 1], as torch does.
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: object | None = None,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}")
        if not 0.0 <= label_smoothing <= 1.0:
            raise RuntimeError(f"expected label_smoothing to be in range [0, 1], got {label_smoothing}")
        # not torch's own, which makes the linear layer of torch.nn and isn't there in every version
        nn.Module.__init__(self)
        self.register_buffer("weight", weight)
        self.reduction = reduction
        self.num_classes = num_classes
        self.out_features = out_features
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.linear = Linear(
            in_features, math.prod(out_features, start=num_classes), bias=bias, device=device, dtype=dtype
        )
        self.options = options

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of input (N, in_features) and class indices (N,)."""
        linear_weight: Tensor = self.linear.weight
        linear_bias: Tensor | None = self.linear.bias
        if self.out_features:
            row_shape = (self.num_classes, *self.out_features)
            linear_weight = linear_weight.reshape(*row_shape, self.linear.in_features)
            linear_bias = None if linear_bias is None else linear_bias.reshape(row_shape)
        return functional.linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
        )

    def extra_repr(self) -> str:
        """Return the arguments, as torch shows them."""
        return (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes}, "
            f"out_features={self.out_features}, bias={self.linear.bias is not None}, "
            f"reduction={self.reduction}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}, options={self.options}"
        )


ModuleT = TypeVar("ModuleT", bound=nn.Module)

_SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: Linear,
    nn.ReLU: ReLU,
    nn.CrossEntropyLoss: CrossEntropyLoss,
    nn.MSELoss: MSELoss,
}
if hasattr(nn, "LinearCrossEntropyLoss"):
    _SWAPS[nn.LinearCrossEntropyLoss] = LinearCrossEntropyLoss
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@dataclass
class Acceleration:
    """What :func:`accelerate` did: pairs of a module's name and what became of it, or why it was left."""

    swapped: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        """Return a line for each module."""
        lines = [f"swapped {name or 'the module itself'}: {what}" for name, what in self.swapped]
        lines += [f"left {name or 'the module itself'}: {why}" for name, why in self.left]
        return "\n".join(lines) or "nothing to swap"


def _why_left(module: nn.Module, num_places: int) -> str | None:
    """Return why a module that could be swapped has to stay as it is, or None."""
    if type(module) not in _SWAPS:
        base = next(base for base in _SWAPS if isinstance(module, base))
        return f"{type(module).__name__} is a subclass of {base.__name__}"
    if any(getattr(module, hooks, None) for hooks in _HOOKS):
        return "it has hooks"
    if "forward" in vars(module):
        return "its forward is replaced on the instance"
    if num_places > 1:
        return f"it is shared: it stands in {num_places} places"
    return None


def accelerate(module: ModuleT, *, report: Callable[[Acceleration], object] | None = print) -> ModuleT:
    """Swap the kernels into a model that stands, in place.

    ``nn.Linear``, ``nn.ReLU``, ``nn.MSELoss``, ``nn.CrossEntropyLoss`` and ``nn.LinearCrossEntropyLoss``
    become their counterparts here. They stay the same objects with the same parameters, so optimizers and
    state_dict keys stay valid. A Linear with a ReLU right behind it in an ``nn.Sequential`` becomes a
    :class:`LinearReLU`, and an ``nn.Identity`` takes the ReLU's place; whoever runs such layers one by one
    meets the ReLU's result behind the Linear already. What is hooked, shared (it stands in more than one
    place) or of a subclass is left as it is.

    Parameters
    ----------
    module : nn.Module
        The model, or a single layer or loss.
    report : callable, optional
        Takes the :class:`Acceleration` that says what was swapped and what was left; None for silence.

    Returns
    -------
    nn.Module
        The same module.

    Raises
    ------
    TypeError
        If `module` is no nn.Module.

    Examples
    --------
    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
    >>> net = accelerate(net)
    swapped 1: Linear -> LinearReLU, with the ReLU at 2
    swapped 2: ReLU -> Identity, merged into 1
    swapped 3: Linear -> Linear of fastdl
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"accelerate takes an nn.Module, not a {type(module).__name__}: {module!r}")
    acceleration = Acceleration()
    places: dict[nn.Module, int] = {}
    for _, found in module.named_modules(remove_duplicate=False):
        places[found] = places.get(found, 0) + 1
    reasons = {
        found: _why_left(found, count)
        for found, count in places.items()
        if isinstance(found, tuple(_SWAPS)) and not type(found).__module__.startswith("fastdl")
    }
    for name, found in list(module.named_modules()):
        # a subclass may run its children in another order
        if type(found) is nn.Sequential and places[found] == 1:
            _merge_pairs(name, found, reasons, acceleration)
        if found not in reasons:
            continue
        why_left = reasons.pop(found)
        if why_left is not None:
            acceleration.left.append((name, why_left))
        else:
            swap = _SWAPS[type(found)]
            found.__class__ = swap
            acceleration.swapped.append((name, f"{swap.__name__} -> {swap.__name__} of fastdl"))
    if report is not None:
        report(acceleration)
    return module


def _merge_pairs(
    name: str, sequential: nn.Sequential, reasons: dict[nn.Module, str | None], acceleration: Acceleration
) -> None:
    """Merge each Linear with the ReLU right behind it; both must be free to swap."""
    children = list(sequential.named_children())
    prefix = f"{name}." if name else ""
    for (linear_name, linear), (relu_name, relu) in pairwise(children):
        is_pair = type(linear) is nn.Linear and type(relu) is nn.ReLU
        if not is_pair or reasons.get(linear, "") is not None or reasons.get(relu, "") is not None:
            continue
        linear.__class__ = LinearReLU
        sequential._modules[relu_name] = nn.Identity().train(relu.training)
        del reasons[linear], reasons[relu]
        acceleration.swapped += [
            (prefix + linear_name, f"Linear -> LinearReLU, with the ReLU at {prefix + relu_name}"),
            (prefix + relu_name, f"ReLU -> Identity, merged into {prefix + linear_name}"),
        ]
