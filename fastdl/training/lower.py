"""From a net, a loss and an optimizer to what the compiled engine trains, or an error that names why not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdl import models
from fastdl import nn as fastdl_nn
from fastdl.cuda_arrays import missing_link
from fastdl.optim import SGD

WAY_OUT = "pass compiled=False to train with the Python loop"

_CONTAINERS = (nn.Sequential, models.LinearRegression, models.SoftmaxRegression, models.MLP)
_LINEAR = (nn.Linear, fastdl_nn.Linear, fastdl_nn.LinearReLU)
_RELU = (nn.ReLU, fastdl_nn.ReLU)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class UnsupportedError(ValueError):
    """The compiled engine can't train this; the message names what, and the way out."""


@dataclass
class Layer:
    """One linear layer of a net.

    Attributes
    ----------
    name : str
        In the net's own names.
    module : nn.Linear
    has_relu : bool
        Whether a ReLU follows.
    weight_group, bias_group : int or None
        Which of the optimizer's parameter groups each is in; None for a frozen or missing one.
    """

    name: str
    module: nn.Linear
    has_relu: bool
    weight_group: int | None = None
    bias_group: int | None = None


@dataclass
class Lowered:
    """A net, a loss and an optimizer that the compiled engine can train.

    Attributes
    ----------
    layers : list of Layer
    optimizer : torch.optim.SGD
    is_classifier : bool
        Whether the loss is cross entropy; else it is the squared error.
    is_mean : bool
        Whether the loss is a mean; else it is a sum.
    class_weight : Tensor or None
    ignore_index : int
    label_smoothing : float
    """

    layers: list[Layer]
    optimizer: torch.optim.SGD
    is_classifier: bool
    is_mean: bool
    class_weight: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of every parameter."""
        return self.layers[0].module.weight.dtype


def _refuse(what: str) -> UnsupportedError:
    return UnsupportedError(f"the compiled engine can't train {what}: {WAY_OUT}")


def _modules(net: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Walk through a chain of modules, in the order in which they run."""
    for hooks in _HOOKS:
        if getattr(net, hooks):
            raise _refuse(f"{name or 'the net'} ({type(net).__name__}), which has a hook")
    if type(net) in _CONTAINERS:
        for child, module in net._modules.items():
            assert module is not None
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
                raise _refuse(f"{called} with start_dim={module.start_dim}, end_dim={module.end_dim}")
            if not is_flat:
                is_flat, num_features = True, int(torch.Size(example_shape).numel())
        elif type(module) in _LINEAR:
            assert isinstance(module, nn.Linear)
            if not is_flat:
                raise _refuse(
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
            raise _refuse(called)
    if not layers:
        raise _refuse("a net without a Linear layer")
    for layer in layers:
        if min(layer.module.in_features, layer.module.out_features) < 1:
            raise _refuse(f"layer {layer.name} ({layer.module}), which has no weights")
    return layers


def _check_parameters(layers: list[Layer]) -> None:
    seen: dict[int, str] = {}
    first = layers[0].module.weight
    reason = missing_link(first.get_device()) if first.is_cuda else None
    if reason is not None:
        raise _refuse(f"a net on {first.device} ({reason})")
    for layer in layers:
        for key, parameter in layer.module.named_parameters(recurse=False):
            name = f"{layer.name}.{key}" if layer.name else key
            if id(parameter) in seen:
                raise _refuse(f"{name}, which is the same parameter as {seen[id(parameter)]}")
            seen[id(parameter)] = name
            if parameter.device.type not in ("cpu", "cuda"):
                raise _refuse(f"{name} on {parameter.device}")
            if parameter.device != first.device:
                raise _refuse(f"{name} on {parameter.device} in a net on {first.device}")
            if parameter.dtype not in (torch.float32, torch.float64):
                raise _refuse(f"{name} of {parameter.dtype}; it takes float32 and float64")
            if parameter.dtype != first.dtype:
                raise _refuse(f"{name} of {parameter.dtype} in a net of {first.dtype}")
            if type(parameter) is not nn.Parameter or parameter.layout is not torch.strided:
                raise _refuse(f"{name}, which is a {type(parameter).__name__} of {parameter.layout}")
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                raise _refuse(f"{name}, which has a hook")


def _assign_groups(layers: list[Layer], optimizer: torch.optim.Optimizer) -> None:
    groups = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    for layer in layers:
        module = layer.module
        for key in ("weight", "bias"):
            parameter = getattr(module, key)
            if parameter is None or not parameter.requires_grad:
                continue
            group = groups.pop(id(parameter), None)
            if group is None:
                raise _refuse(f"{layer.name}.{key}, which requires a gradient but isn't in the optimizer")
            setattr(layer, f"{key}_group", group)
    for options in optimizer.param_groups:
        for parameter in options["params"]:
            if id(parameter) in groups and parameter.grad is not None:
                raise _refuse(
                    f"an optimizer that also updates a parameter of shape {tuple(parameter.shape)} "
                    "from outside of the net"
                )


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    if type(optimizer) not in (torch.optim.SGD, SGD):
        raise _refuse(f"with {type(optimizer).__name__}; it takes torch.optim.SGD and fastdl.optim.SGD")
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise _refuse("with an optimizer that has a hook")
    if any(group["differentiable"] for group in optimizer.param_groups):
        raise _refuse("with differentiable=True")


def lower(
    net: nn.Module, loss: Any, optimizer: torch.optim.Optimizer, example_shape: tuple[int, ...]
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

    Returns
    -------
    Lowered

    Raises
    ------
    UnsupportedError
        If it can't train something; the message names it.
    ValueError
        If sizes don't fit together.
    """
    layers = _layers(net, example_shape)
    _check_parameters(layers)
    _check_optimizer(optimizer)
    assert isinstance(optimizer, torch.optim.SGD)
    _assign_groups(layers, optimizer)
    if type(loss) not in (nn.CrossEntropyLoss, fastdl_nn.CrossEntropyLoss, nn.MSELoss, fastdl_nn.MSELoss):
        raise _refuse(f"with the loss {loss}; it takes nn.CrossEntropyLoss and nn.MSELoss")
    for hooks in _HOOKS:
        if getattr(loss, hooks):
            raise _refuse(f"with the loss {loss}, which has a hook")
    if loss.reduction not in ("mean", "sum"):
        raise _refuse(f"with the reduction {loss.reduction!r}; it takes 'mean' and 'sum'")
    lowered = Lowered(layers, optimizer, isinstance(loss, nn.CrossEntropyLoss), loss.reduction == "mean")
    if lowered.is_classifier:
        lowered.class_weight = loss.weight
        lowered.ignore_index = loss.ignore_index
        lowered.label_smoothing = loss.label_smoothing
        num_classes = layers[-1].module.out_features
        if loss.weight is not None and (tuple(loss.weight.shape), loss.weight.dtype) != (
            (num_classes,),
            lowered.dtype,
        ):
            raise _refuse(
                f"with class weights of shape {tuple(loss.weight.shape)} and {loss.weight.dtype}; "
                f"the net has {num_classes} classes and {lowered.dtype}"
            )
    return lowered
