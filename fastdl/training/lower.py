"""From a net, a loss and an optimizer to what the compiled engine trains, or an error that names why not."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdl import models
from fastdl import nn as fastdl_nn
from fastdl.cuda_arrays import missing_link
from fastdl.overrides import global_hooks, overridden
from fastdl.torch_private import children, has_step_hooks, has_tensor_hooks, replaced_method
from fastdl.training.memory import overlap, unfit
from fastdl.training.options import LOSSES, OPTIMIZERS, check_loss, check_optimizer
from fastdl.training.parameters import WAY_OUT, Parameter

_CONTAINERS = (nn.Sequential, models.LinearRegression, models.SoftmaxRegression, models.MLP)
_LINEAR = (nn.Linear, fastdl_nn.Linear, fastdl_nn.LinearReLU)
_RELU = (nn.ReLU, fastdl_nn.ReLU)


class UnsupportedError(ValueError):
    """The compiled engine can't train this; the message names what, and the way out."""


@dataclass
class Layer:
    """One linear layer of a net, by its name there."""

    name: str
    module: nn.Linear
    has_relu: bool


@dataclass
class Lowered:
    """A net, a loss and an optimizer that the compiled engine can train.

    The parameters are in order, a layer's weight before its bias. The loss is cross entropy or, where it is
    no classifier's, the squared error; a mean or else a sum.
    """

    layers: list[Layer]
    parameters: list[Parameter]
    optimizer: torch.optim.SGD
    is_classifier: bool
    is_mean: bool
    class_weight: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0

    def identity(self) -> tuple[object, ...]:
        """Return what is equal for two that one program serves: objects and sizes, no values of tensors."""
        return (
            *(self.is_classifier, self.is_mean, self.ignore_index, self.label_smoothing),
            *(layer.has_relu for layer in self.layers),
            *((id(parameter.tensor), parameter[3:]) for parameter in self.parameters),
        )

    def is_small(self, most_inputs: int) -> bool:
        """Return whether it is one layer of few inputs and one output, with the squared error."""
        num_outputs, num_inputs = self.parameters[0].shape
        is_one = len(self.layers) == 1 and not (self.is_classifier or self.layers[0].has_relu)
        return is_one and num_outputs == 1 and num_inputs <= most_inputs

    def check_shapes(self, X: Tensor, y: Tensor) -> None:
        """Raise RuntimeError unless examples (N, K) and their labels or targets have the net's sizes."""
        num_inputs, num_outputs = self.parameters[0].shape[1], self.layers[-1].module.out_features
        outputs = () if self.is_classifier else (num_outputs,)
        if (X.shape[1:], y.shape) != ((num_inputs,), (X.shape[0], *outputs)):
            shapes = f"X has shape {tuple(X.shape)} and y {tuple(y.shape)}"
            raise RuntimeError(
                f"the net takes {num_inputs} features, gives {num_outputs} outputs, but {shapes}"
            )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of every parameter."""
        return self.parameters[0].dtype


def refusal(what: str) -> UnsupportedError:
    """Return the error for what the compiled engine can't train."""
    return UnsupportedError(f"the compiled engine can't train {what}: {WAY_OUT}")


def _modules(net: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Walk through a chain of modules, in the order in which they run."""
    change = overridden(net)
    if change is not None:
        raise refusal(f"{name or 'the net'} ({type(net).__name__}), which {change}")
    if type(net) in _CONTAINERS:
        for child, module in children(net).items():
            if not isinstance(module, nn.Module):
                raise refusal(f"{type(net).__name__} with {module} in it")
            yield from _modules(module, f"{name}.{child}" if name else child)
    else:
        yield name, net


def _layers(net: nn.Module, example_shape: tuple[int, ...]) -> list[Layer]:
    layers: list[Layer] = []
    is_flat = len(example_shape) == 1
    num_features = example_shape[0] if is_flat else 0
    for name, module in _modules(net, ""):
        called = f"layer {name} ({type(module).__name__})" if name else type(module).__name__
        if type(module) is nn.Identity:
            continue
        if type(module) is nn.Flatten:
            if (module.start_dim, module.end_dim) != (1, -1):
                raise refusal(f"{called} with start_dim={module.start_dim}, end_dim={module.end_dim}")
            if not example_shape:
                raise refusal(f"{called} on examples that are single numbers")
            if not is_flat:
                is_flat, num_features = True, int(torch.Size(example_shape).numel())
        elif type(module) in _LINEAR:
            assert isinstance(module, nn.Linear)
            if not is_flat:
                raise refusal(
                    f"{called} on examples of shape {example_shape} without an nn.Flatten before it"
                )
            if module.in_features != num_features:
                raise ValueError(
                    f"{called} takes {module.in_features} features, but gets {num_features}: "
                    "the sizes of the net and of X don't fit together"
                )
            layers.append(Layer(name, module, type(module) is fastdl_nn.LinearReLU))
            num_features = module.out_features
        elif type(module) in _RELU and layers:
            layers[-1].has_relu = True
        else:
            raise refusal(called)
    if not layers:
        raise refusal("a net without a Linear layer")
    for layer in layers:
        if min(layer.module.in_features, layer.module.out_features) < 1:
            raise refusal(f"layer {layer.name} ({layer.module}), which has no weights")
    return layers


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    if type(optimizer) not in OPTIMIZERS:
        raise refusal(f"with {type(optimizer).__name__}; it takes torch.optim.SGD and fastdl.optim.SGD")
    if has_step_hooks(optimizer):
        raise refusal("with an optimizer that has a hook")
    method = replaced_method(optimizer)
    if method is not None:
        raise refusal(f"with an optimizer whose {method} was replaced")
    check_optimizer(optimizer)
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise refusal("with differentiable=True")


def _parameters(layers: list[Layer], optimizer: torch.optim.SGD) -> list[Parameter]:
    """Return the parameters in order; each is plain memory of the size that its layer has."""
    groups: dict[int, int] = {}
    for index, options in enumerate(optimizer.param_groups):
        for tensor in options["params"]:
            if id(tensor) in groups:
                raise refusal(
                    f"with an optimizer that holds a parameter of shape {tuple(tensor.shape)} twice"
                )
            groups[id(tensor)] = index
    found: list[Parameter] = []
    names: dict[int, str] = {}
    first = layers[0].module.weight
    reason = missing_link(first.get_device()) if isinstance(first, Tensor) and first.is_cuda else None
    if reason is not None:
        raise refusal(f"a net on {first.device} ({reason})")
    for number, layer in enumerate(layers):
        module = layer.module
        sizes = module.out_features, module.in_features
        for is_bias, tensor in enumerate((module.weight, module.bias)):
            if tensor is None and is_bias:
                continue
            key = "bias" if is_bias else "weight"
            name = f"{layer.name}.{key}" if layer.name else key
            if id(tensor) in names:
                raise refusal(f"{name}, which is the same parameter as {names[id(tensor)]}")
            names[id(tensor)] = name
            why = unfit(tensor, sizes[:1] if is_bias else sizes, first)
            if why is None and type(tensor) is not nn.Parameter:
                why = "is no nn.Parameter"
            if why is None and has_tensor_hooks(tensor):
                why = "has a hook"
            if why is None and tensor.dtype not in (torch.float32, torch.float64):
                why = f"is {tensor.dtype}; it takes float32 and float64"
            if why is None and tensor.requires_grad and id(tensor) not in groups:
                why = "requires a gradient but isn't in the optimizer"
            if why is not None:
                raise refusal(f"{name}, which {why}")
            group = groups[id(tensor)] if tensor.requires_grad else None
            place = name, tensor, module, number, bool(is_bias), group
            found.append(Parameter(*place, tensor.shape, tensor.dtype, tensor.device))
    return found


def _memory(
    parameters: list[Parameter], optimizer: torch.optim.SGD
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what an epoch writes, parameters and momentum buffers, and which parameters it only reads."""
    written: dict[str, Tensor] = {}
    read: dict[str, Tensor] = {}
    for parameter in parameters:
        if parameter.group is None:
            read[parameter.name] = parameter.tensor
            continue
        written[parameter.name] = parameter.tensor
        if optimizer.param_groups[parameter.group]["momentum"] != 0:
            buffer = optimizer.state.get(parameter.tensor, {}).get("momentum_buffer")
            if buffer is not None:
                name = f"the momentum buffer of {parameter.name}"
                why = unfit(buffer, parameter.shape, parameter.tensor)
                if why is not None:
                    raise refusal(f"{name}, which {why}")
                written[name] = buffer
    return written, read


def lower(
    net: nn.Module,
    loss: Any,
    optimizer: torch.optim.Optimizer,
    example_shape: tuple[int, ...],
    data: Mapping[str, Tensor] | None = None,
) -> Lowered:
    """Find the linear layers of a net, and check that the compiled engine can train all of it.

    Parameters
    ----------
    net : nn.Module
        ``nn.Sequential``, nested too, of Flatten, Linear, ReLU and Identity; a bare Linear; `fastdl.models`.
    loss : nn.CrossEntropyLoss or nn.MSELoss
        torch's or fastdl's, with reduction ``"mean"`` or ``"sum"``.
    optimizer : torch.optim.SGD
        Or fastdl's.
    example_shape : tuple of int
        The shape of one example.
    data : mapping of str to Tensor, optional
        What else training reads, by name: plain tensors, which may share no memory with what it writes.

    Returns
    -------
    Lowered

    Raises
    ------
    UnsupportedError
        If it can't train something; the message names it.
    ValueError, TypeError
        If sizes don't fit together, or an option of the loss or the optimizer makes no sense.
    """
    hooks = global_hooks()
    if hooks is not None:
        raise refusal(f"under {hooks}")
    layers = _layers(net, example_shape)
    _check_optimizer(optimizer)
    assert isinstance(optimizer, torch.optim.SGD)
    parameters = _parameters(layers, optimizer)
    written, read = _memory(parameters, optimizer)
    if all(parameter.group is None for parameter in parameters):
        raise refusal("a net none of whose parameters requires a gradient")
    check_loss(loss)
    if type(loss) not in LOSSES:
        raise refusal(f"with the loss {loss}; it takes nn.CrossEntropyLoss and nn.MSELoss")
    change = overridden(loss)
    if change is not None:
        raise refusal(f"with the loss {loss}, which {change}")
    is_classifier = isinstance(loss, nn.CrossEntropyLoss)
    lowered = Lowered(layers, parameters, optimizer, is_classifier, loss.reduction == "mean")
    read |= data or {}
    if lowered.is_classifier:
        lowered.class_weight = loss.weight
        lowered.ignore_index = operator.index(loss.ignore_index)
        lowered.label_smoothing = float(loss.label_smoothing)
        if loss.weight is not None:
            last = layers[-1].module
            why = unfit(loss.weight, (last.out_features,), last.weight)
            if loss.weight.requires_grad:
                why = "requires a gradient"
            if why is None and not loss.weight.isfinite().all():
                why = "has values that aren't finite"
            if why is None and lowered.is_mean and loss.weight.min() < 0 < loss.weight.max():
                why = "has values of both signs, whose sum over a batch may be 0"
            if why is not None:
                raise refusal(f"with a class weight that {why}")
            read["the class weight"] = loss.weight
    shared = overlap(written, read)
    if shared is not None:
        raise refusal(f"{shared[0]} and {shared[1]}, which share memory")
    return lowered
