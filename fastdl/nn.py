"""Drop-in modules on the kernels, and :func:`accelerate`, which lends their forward to an existing model.

Each is a subclass of torch's module of the same name: the same constructor, parameters and state_dict.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar

import torch

# torch.jit.script compiles the forward that a bound one wraps, with the names of this file
import torch.nn.functional as F  # noqa: F401
from torch import Tensor, nn

from fastdl import functional, torch_private
from fastdl.overrides import BOUND, global_hooks, is_accelerated, is_bound, is_untouched, overridden, replaced

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

    Arguments, errors, parameters and state_dict are those of ``torch.nn.LinearCrossEntropyLoss``. It is a
    subclass of it where torch has it, from 2.13 on, and is defined on older ones too.
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
        linear_weight, linear_bias = self.linear.weight, self.linear.bias
        if self.out_features:
            linear_weight = linear_weight.unflatten(0, (self.num_classes, *self.out_features))
            if linear_bias is not None:
                linear_bias = linear_bias.unflatten(0, (self.num_classes, *self.out_features))
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


# the classes of a pair that is fused, with their forward
_PAIR: dict[type[nn.Module], Callable[..., Any]] = {nn.Linear: nn.Linear.forward, nn.ReLU: nn.ReLU.forward}


def _run_in_turn(self: nn.Sequential, input: Any) -> Any:
    """Run the children in turn; a plain Linear and the plain ReLU behind it are one op.

    Each call asks anew what is plain, so that every edit of the net holds.
    """
    if torch_private.is_tracing() or not torch_private.calls_are_torchs(_PAIR) or global_hooks():
        return nn.Sequential.forward(self, input)  # type: ignore[no-untyped-call]
    linear: Any = None
    for module in self:
        if linear is not None:
            if type(module) is nn.ReLU and is_untouched(module):
                input, linear = functional.linear_relu(input, linear.weight, linear.bias), None
                continue
            input, linear = linear(input), None
        if type(module) is nn.Linear and is_untouched(module):
            linear = module
        else:
            input = module(input)
    return input if linear is None else linear(input)


# what runs in place of the forward of a class of torch's
_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    nn.Linear: Linear.forward,
    nn.ReLU: ReLU.forward,
    nn.CrossEntropyLoss: CrossEntropyLoss.forward,
    nn.MSELoss: MSELoss.forward,
    nn.Sequential: _run_in_turn,
}
if hasattr(nn, "LinearCrossEntropyLoss"):
    _FORWARDS[nn.LinearCrossEntropyLoss] = LinearCrossEntropyLoss.forward
_OURS = (Linear, LinearReLU, ReLU, CrossEntropyLoss, MSELoss, LinearCrossEntropyLoss)


def _forward_for(kind: type[nn.Module], run: Callable[..., Any]) -> Callable[..., Any]:
    """Return what to bind as the forward of a module whose class has the forward of `kind`."""
    torchs = kind.forward

    @functools.wraps(torchs)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # the class may be another by then: adapters and parametrizations assign to __class__
        own = type(self).forward
        is_ours = own is torchs and not torch_private.has_node_hooks(self)
        return (run if is_ours else own)(self, *args, **kwargs)

    return forward


def _getstate(self: nn.Module) -> Any:
    """Leave out what is bound to this one object: in a pickle or a shallow copy torch's forward runs."""
    state = type(self).__getstate__(self)
    return {k: v for k, v in state.items() if not is_bound(v)} if isinstance(state, dict) else state


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> Any:
    """Copy what is bound too; Python binds the copy of a method to the copy of its object."""
    own = getattr(type(self), "__deepcopy__", None)
    if own is not None:
        return own(self, memo)
    if type(self).__reduce_ex__ is not object.__reduce_ex__ or type(self).__reduce__ is not object.__reduce__:
        # as the class says, by a state without what is bound: the copy runs torch's forward
        bound = vars(self).pop("__deepcopy__")
        try:
            return copy.deepcopy(self, memo)
        finally:
            vars(self)["__deepcopy__"] = bound
    twin = memo[id(self)] = type(self).__new__(type(self))
    twin.__setstate__(copy.deepcopy(type(self).__getstate__(self), memo))
    return twin


def _replicate(self: nn.Module) -> Any:
    """Leave out what is bound to this one object: a replica on another GPU has its own parameters."""
    replica = getattr(type(self), torch_private.REPLICATE)(self)
    _unbind(replica)
    return replica


_COPYING: dict[str, Callable[..., Any]] = {
    "__getstate__": _getstate,
    "__deepcopy__": _deepcopy,
    torch_private.REPLICATE: _replicate,
}
_BOUND_FORWARDS = {kind: _forward_for(kind, run) for kind, run in _FORWARDS.items()}
BOUND.update(_BOUND_FORWARDS.values(), _COPYING.values())


def _unbind(module: nn.Module) -> None:
    for name in [name for name, value in vars(module).items() if is_bound(value)]:
        del vars(module)[name]


@dataclass(frozen=True)
class Acceleration:
    """What runs on the kernels after :func:`accelerate`; modules go by their names, "" is the net itself.

    Attributes
    ----------
    on_kernels : dict of str to str
        The class of each module that runs on a kernel.
    fused : list of (str, str)
        Each Linear and the ReLU behind it that run as one op.
    left : dict of str to str
        Why a module runs as torch's that might have run on a kernel.
    """

    on_kernels: dict[str, str] = field(default_factory=dict)
    fused: list[tuple[str, str]] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return a line for each module and each pair."""
        lines = [
            f"{name or 'the module itself'}: {kind} on a kernel" for name, kind in self.on_kernels.items()
        ]
        lines += [f"{linear} and {relu}: fused" for linear, relu in self.fused]
        lines += [f"{name or 'the module itself'}: left, as {reason}" for name, reason in self.left.items()]
        return "\n".join(lines) or "nothing is accelerated"


def accelerate(
    module: ModuleT, *, report: Callable[[Acceleration], object] | None = print, undo: bool = False
) -> ModuleT:
    """Run an existing model on the kernels; its modules keep their types, places, names and parameters.

    Each ``nn.Linear``, ``nn.ReLU``, ``nn.MSELoss``, ``nn.CrossEntropyLoss`` and ``nn.LinearCrossEntropyLoss``
    gets the forward of its counterpart here as an attribute of the instance. So does an ``nn.Sequential``
    with a ReLU right behind a Linear: it runs the two as one op where nobody can tell. Hooks, adapters,
    parametrizations and every later edit of the net mean what they mean in torch. A deep copy runs on the
    kernels too; after unpickling torch's forward runs, until `accelerate` is called again.

    Parameters
    ----------
    module : nn.Module
        The model, or a single layer or loss.
    report : callable, optional
        Takes the :class:`Acceleration` that says what runs on the kernels; None for silence.
    undo : bool
        Whether to take everything back instead.

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
    1: Linear on a kernel
    2: ReLU on a kernel
    3: Linear on a kernel
    1 and 2: fused
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"accelerate takes an nn.Module, not a {type(module).__name__}: {module!r}")
    before = {found: {k: v for k, v in vars(found).items() if is_bound(v)} for found in module.modules()}
    try:
        acceleration = _bind(module, undo)
        if report is not None:
            report(acceleration)
    except BaseException:
        for found, bound in before.items():
            _unbind(found)
            vars(found).update(bound)
        raise
    return module


def _bind(module: nn.Module, undo: bool) -> Acceleration:
    """Take off what is bound to the modules and, but for undo, bind anew."""
    acceleration = Acceleration()
    for name, found in module.named_modules():
        _unbind(found)
        kind = _kind(found)
        if undo or kind is None:
            continue
        reason = replaced(found)
        if type(found).forward is not kind.forward:
            reason = f"is a subclass of {kind.__name__} with a forward of its own"
        if reason is not None:
            acceleration.left[name] = f"it {reason}"
            continue
        for attribute, function in {"forward": _BOUND_FORWARDS[kind], **_COPYING}.items():
            vars(found).setdefault(attribute, MethodType(function, found))
        if kind is not nn.Sequential:
            acceleration.on_kernels[name] = type(found).__name__
    for name, found in module.named_modules():
        for pair in _pairs(found) if is_accelerated(found) else ():
            linear, relu = (f"{name}.{child}" if name else child for child in pair)
            if all(type(child) in _PAIR and is_untouched(child) for child in pair.values()):
                acceleration.fused.append((linear, relu))
            elif all(map(is_accelerated, pair.values())):
                reason = next(filter(None, map(overridden, pair.values())), "is of a subclass")
                acceleration.left[f"{linear} and {relu}"] = f"one of them {reason}"
    return acceleration


def _kind(module: nn.Module) -> type[nn.Module] | None:
    """Return the class whose forward the module would have from here; a Sequential needs a pair for it."""
    if isinstance(module, _OURS) or (isinstance(module, nn.Sequential) and not _pairs(module)):
        return None
    return next((kind for kind in _FORWARDS if isinstance(module, kind)), None)


def _pairs(module: nn.Module) -> list[dict[str, nn.Module]]:
    """Return each Linear and the ReLU behind it in a Sequential, by name."""
    if not isinstance(module, nn.Sequential):
        return []
    neighbours = pairwise(torch_private.children(module).items())
    return [
        dict(pair)
        for pair in neighbours
        if all(map(isinstance, (pair[0][1], pair[1][1]), (nn.Linear, nn.ReLU)))
    ]
