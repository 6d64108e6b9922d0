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

WAY_OUT = "pass compiled=False to train with the Python loop"

_CONTAINERS = (nn.Sequential, models.LinearRegression, models.SoftmaxRegression, models.MLP)
_LINEAR = (nn.Linear, fastdl_nn.Linear, fastdl_nn.LinearReLU)
_RELU = (nn.ReLU, fastdl_nn.ReLU)


class UnsupportedError(ValueError):
    """The compiled engine can't train this; the message names what, and the way out."""


@dataclass
class Layer:
    """One linear layer of a net, by its name there.

    The groups are those of the optimizer that its parameters are in; None for a frozen or missing one.
    """

    name: str
    module: nn.Linear
    has_relu: bool
    weight_group: int | None = None
    bias_group: int | None = None


@dataclass
class Lowered:
    """A net, a loss and an optimizer that the compiled engine can train.

    The loss is cross entropy or, where it is no classifier's, the squared error; a mean or else a sum.
    """

    layers: list[Layer]
    optimizer: torch.optim.SGD
    is_classifier: bool
    is_mean: bool
    class_weight: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0

    def identity(self) -> tuple[object, ...]:
        """Return what is equal for two that one program serves: objects and sizes, no values of tensors."""
        modules = [layer.module for layer in self.layers]
        parameters = [parameter for module in modules for parameter in (module.weight, module.bias)]
        return (
            *(self.is_classifier, self.is_mean, self.ignore_index, self.label_smoothing),
            *(self.dtype, parameters[0].device),
            *((layer.has_relu, layer.weight_group, layer.bias_group) for layer in self.layers),
            *((id(parameter), parameter is not None and parameter.shape) for parameter in parameters),
        )

    def is_small(self, most_inputs: int) -> bool:
        """Return whether it is one layer of few inputs and one output, with the squared error."""
        first, *others = self.layers
        num_outputs, num_inputs = first.module.weight.shape
        is_one = not (others or self.is_classifier or first.has_relu)
        return is_one and num_outputs == 1 and num_inputs <= most_inputs

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of every parameter."""
        return self.layers[0].module.weight.dtype


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


def _parameters(layers: list[Layer]) -> dict[str, nn.Parameter]:
    """Return the parameters by name, in order; each is plain memory of the size that its layer has."""
    found: dict[str, nn.Parameter] = {}
    names: dict[int, str] = {}
    first = layers[0].module.weight
    reason = missing_link(first.get_device()) if isinstance(first, Tensor) and first.is_cuda else None
    if reason is not None:
        raise refusal(f"a net on {first.device} ({reason})")
    for layer in layers:
        sizes = layer.module.out_features, layer.module.in_features
        for key, shape in (("weight", sizes), ("bias", sizes[:1])):
            name = f"{layer.name}.{key}" if layer.name else key
            parameter = getattr(layer.module, key)
            if parameter is None and key == "bias":
                continue
            if id(parameter) in names:
                raise refusal(f"{name}, which is the same parameter as {names[id(parameter)]}")
            why = unfit(parameter, shape, first)
            if why is None and type(parameter) is not nn.Parameter:
                why = "is no nn.Parameter"
            if why is None and has_tensor_hooks(parameter):
                why = "has a hook"
            if why is None and parameter.dtype not in (torch.float32, torch.float64):
                why = f"is {parameter.dtype}; it takes float32 and float64"
            if why is not None:
                raise refusal(f"{name}, which {why}")
            found[name] = parameter
            names[id(parameter)] = name
    return found


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


def _assign_groups(layers: list[Layer], optimizer: torch.optim.Optimizer) -> None:
    groups: dict[int, int] = {}
    for index, options in enumerate(optimizer.param_groups):
        for parameter in options["params"]:
            if id(parameter) in groups:
                raise refusal(
                    f"with an optimizer that holds a parameter of shape {tuple(parameter.shape)} twice"
                )
            groups[id(parameter)] = index
    for layer in layers:
        for key in ("weight", "bias"):
            parameter = getattr(layer.module, key)
            if parameter is None or not parameter.requires_grad:
                continue
            if id(parameter) not in groups:
                raise refusal(f"{layer.name}.{key}, which requires a gradient but isn't in the optimizer")
            setattr(layer, f"{key}_group", groups[id(parameter)])


def _momentum_buffers(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Return the momentum buffers that an epoch reads and writes; each is plain memory, as its parameter."""
    found: dict[str, Tensor] = {}
    names = {id(parameter): name for name, parameter in parameters.items() if parameter.requires_grad}
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] != 0 else ():
            buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
            if buffer is None or id(parameter) not in names:
                continue
            name = f"the momentum buffer of {names[id(parameter)]}"
            why = unfit(buffer, tuple(parameter.shape), parameter)
            if why is not None:
                raise refusal(f"{name}, which {why}")
            found[name] = buffer
    return found


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
    parameters = _parameters(layers)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise refusal("a net none of whose parameters requires a gradient")
    _check_optimizer(optimizer)
    assert isinstance(optimizer, torch.optim.SGD)
    _assign_groups(layers, optimizer)
    check_loss(loss)
    if type(loss) not in LOSSES:
        raise refusal(f"with the loss {loss}; it takes nn.CrossEntropyLoss and nn.MSELoss")
    change = overridden(loss)
    if change is not None:
        raise refusal(f"with the loss {loss}, which {change}")
    lowered = Lowered(layers, optimizer, isinstance(loss, nn.CrossEntropyLoss), loss.reduction == "mean")
    read = dict(data or {})
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
            if why is not None:
                raise refusal(f"with a class weight that {why}")
            read["the class weight"] = loss.weight
    written = _momentum_buffers(parameters, optimizer)
    for name, parameter in parameters.items():
        (written if parameter.requires_grad else read)[name] = parameter
    shared = overlap(written, read)
    if shared is not None:
        raise refusal(f"{shared[0]} and {shared[1]}, which share memory")
    return lowered
