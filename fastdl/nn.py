"""Drop-in modules on the kernels, and :func:`accelerate`, which lends their forward to an existing model.

Each is a subclass of torch's module of the same name: the same constructor, parameters and state_dict.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
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


# the classes of a pair that is fused, with their forward
_PAIR: dict[type[nn.Module], Callable[..., Any]] = {nn.Linear: nn.Linear.forward, nn.ReLU: nn.ReLU.forward}


def _run_in_turn(self: nn.Sequential, input: Any) -> Any:
    """Run the children in turn; an untouched Linear and the untouched ReLU behind it are one op.

    Each call asks anew what is untouched, so that every edit of the net holds.
    """
    if torch_private.is_tracing() or not torch_private.calls_are_torchs(_PAIR) or global_hooks():
        return nn.Sequential.forward(self, input)  # type: ignore[no-untyped-call]
    linear: nn.Linear | None = None
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
    if not isinstance(state, dict):
        return state
    return {key: value for key, value in state.items() if not is_bound(value)}


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Copy what is bound too; Python binds the copy of a method to the copy of its object."""
    own = getattr(type(self), "__deepcopy__", None)
    if own is not None:
        return own(self, memo)  # type: ignore[no-any-return]
    twin = memo[id(self)] = type(self).__new__(type(self))
    twin.__setstate__(copy.deepcopy(type(self).__getstate__(self), memo))
    return twin


def _replicate(self: nn.Module) -> nn.Module:
    """Leave out what is bound to this one object, as a replica on another GPU has its own parameters."""
    replica: nn.Module = getattr(type(self), torch_private.REPLICATE)(self)
    _unbind(replica)
    return replica


def _bind(module: nn.Module, forward: Callable[..., Any]) -> None:
    functions: dict[str, Callable[..., Any]] = {
        "forward": forward,
        "__getstate__": _getstate,
        "__deepcopy__": _deepcopy,
        torch_private.REPLICATE: _replicate,
    }
    for name, function in functions.items():
        BOUND.add(function)
        vars(module).setdefault(name, MethodType(function, module))


def _unbind(module: nn.Module) -> bool:
    bound = [name for name, value in vars(module).items() if is_bound(value)]
    for name in bound:
        del vars(module)[name]
    return "forward" in bound


_BOUND_FORWARDS = {kind: _forward_for(kind, run) for kind, run in _FORWARDS.items()}


@dataclass(frozen=True)
class Acceleration:
    """What :func:`accelerate` did; modules go by their names in the net, "" is the net itself.

    Attributes
    ----------
    on_kernels : tuple of (name, class)
        What runs on the kernels.
    fused : tuple of (name, name)
        Each Linear and the ReLU behind it that run as one op, as long as neither is touched.
    left : tuple of (name, reason)
        What runs as torch's, though it might have run on the kernels; and pairs that aren't fused.
    undone : tuple of (name, class)
        What ran on the kernels and runs as torch's again.
    """

    on_kernels: tuple[tuple[str, str], ...] = ()
    fused: tuple[tuple[str, str], ...] = ()
    left: tuple[tuple[str, str], ...] = ()
    undone: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        """Return a line for each module and each pair."""
        followers = dict(self.fused)
        lines = [
            f"{_called(name)}: {kind} on the kernels"
            + (f", fused with the ReLU {followers[name]}" if name in followers else "")
            for name, kind in self.on_kernels
        ]
        lines += [f"{_called(name)}: {kind} as torch's again" for name, kind in self.undone]
        lines += [f"{_called(name)}: left, {reason}" for name, reason in self.left]
        return "\n".join(lines) or "nothing to accelerate"


def _called(name: str) -> str:
    return name or "the module itself"


def _why_not(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Return why a module has to keep its forward, or None."""
    if type(module).forward is not kind.forward:
        return f"{type(module).__name__} is a subclass of {kind.__name__} with a forward of its own"
    reason = replaced(module)
    if reason is None and "forward" in vars(module):
        reason = "has a forward of its own"
    return reason and f"it {reason}"


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
    1: Linear on the kernels, fused with the ReLU 2
    2: ReLU on the kernels
    3: Linear on the kernels
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"accelerate takes an nn.Module, not a {type(module).__name__}: {module!r}")
    named = [(name, found) for name, found in module.named_modules() if not isinstance(found, _OURS)]
    undone = [(name, type(found).__name__) for name, found in named if _unbind(found)]
    acceleration = Acceleration(undone=tuple(undone)) if undo else _accelerate(named)
    if report is not None:
        report(acceleration)
    return module


def _accelerate(named: list[tuple[str, nn.Module]]) -> Acceleration:
    """Bind the layers and losses, and then each Sequential with a pair to fuse."""
    on_kernels, fused, left = [], [], []
    # what a Sequential does depends on its children, which come after it
    for name, module in sorted(named, key=lambda item: isinstance(item[1], nn.Sequential)):
        kind = next((kind for kind in _BOUND_FORWARDS if isinstance(module, kind)), None)
        pairs = _pairs(module)
        if kind is None or (kind is nn.Sequential and not pairs):
            continue
        why_not = _why_not(module, kind)
        if why_not is not None:
            left.append((name, why_not))
            continue
        _bind(module, _BOUND_FORWARDS[kind])
        if kind is not nn.Sequential:
            on_kernels.append((name, type(module).__name__))
        for pair in pairs:
            names = [f"{name}.{child}" if name else child for child, _ in pair]
            reasons = [overridden(child) for _, child in pair]
            reason = next((f"{a} {b}" for a, b in zip(names, reasons, strict=True) if b), None)
            if reason is None:
                fused.append((names[0], names[1]))
            else:
                left.append((names[0], f"not fused with the ReLU {names[1]}: {reason}"))
    return Acceleration(tuple(on_kernels), tuple(fused), tuple(left))


def _pairs(module: nn.Module) -> list[tuple[tuple[str, nn.Module], tuple[str, nn.Module]]]:
    """Return each Linear with the ReLU behind it, both on the kernels, of a Sequential; by name."""
    if not isinstance(module, nn.Sequential):
        return []
    children = [(name, child) for name, child in torch_private.children(module).items() if child is not None]
    return [
        (first, second)
        for first, second in pairwise(children)
        if isinstance(first[1], nn.Linear)
        and isinstance(second[1], nn.ReLU)
        and is_accelerated(first[1])
        and is_accelerated(second[1])
    ]
