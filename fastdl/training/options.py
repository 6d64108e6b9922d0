"""What `fit` is told, and the options of a loss and of SGD, checked before the first step as torch's constructors do."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from numbers import Real
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from fastdl import nn as fastdl_nn
from fastdl.optim import SGD

LOSSES = (nn.CrossEntropyLoss, fastdl_nn.CrossEntropyLoss, nn.MSELoss, fastdl_nn.MSELoss)
OPTIMIZERS = (torch.optim.SGD, SGD)

_FLAG = (bool, np.bool_), "True or False"
# by argument of `fit`: the classes it may have, and how a message calls them
_ARGUMENTS: dict[str, tuple[Any, str]] = {
    "net": (nn.Module, "an nn.Module"),
    "loss": (Callable, "callable, such as nn.CrossEntropyLoss()"),
    "optimizer": (torch.optim.Optimizer, "a torch.optim.Optimizer"),
    "scheduler": ((LRScheduler, NoneType), "an LRScheduler of torch.optim.lr_scheduler"),
    "generator": ((torch.Generator, NoneType), "a torch.Generator, such as torch.Generator().manual_seed(0)"),
    "on_epoch": ((Callable, NoneType), "callable"),
    "shuffle": _FLAG,
    "drop_last": _FLAG,
    "compiled": _FLAG,
    "progress": _FLAG,
}
# by option of SGD: the least value that its constructor takes
_SGD = {"lr": 0.0, "momentum": 0.0, "weight_decay": 0.0, "dampening": -math.inf}


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, (int, float, str, NoneType)) else f"a {type(value).__name__}"


def check_arguments(**arguments: object) -> None:
    """Raise TypeError if an argument of `fit` is of another kind than it takes."""
    for name, value in arguments.items():
        kinds, text = _ARGUMENTS[name]
        if not isinstance(value, kinds):
            raise TypeError(f"{name} must be {text}, not {_shown(value)}")


def integer(name: str, value: Any, least: int, most: float = math.inf) -> int:
    """Return an option that is an integer, or raise TypeError or ValueError if it is none or out of range."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        whole = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {_shown(value)}") from None
    if not least <= whole <= most:
        above = f"{least} or more" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"{name} must be {above}, not {whole}")
    return whole


def number(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> float:
    """Return an option that is a real number, or raise TypeError or ValueError if it is none or out of range."""
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, not {_shown(value)}")
    result = float(value)
    if result < least or result > most:
        above = f"{least:g} or more" if most == math.inf else f"from {least:g} to {most:g}"
        raise ValueError(f"{name} must be {above}, not {value}")
    return result


def check_loss(loss: Any) -> None:
    """Raise TypeError or ValueError if a loss can't train, as it is a class or by an option."""
    if isinstance(loss, type):
        raise TypeError(f"loss must be an instance, such as {loss.__name__}(), not the class itself")
    reduction = getattr(loss, "reduction", None)
    if isinstance(reduction, str) and reduction == "none":
        raise ValueError(f"{loss} gives a loss for each row: training needs reduction='mean' or 'sum'")
    if type(loss) not in LOSSES:
        return
    if not isinstance(reduction, str) or reduction not in ("mean", "sum"):
        raise ValueError(f"the loss's reduction must be 'mean' or 'sum', not {_shown(reduction)}")
    if isinstance(loss, nn.CrossEntropyLoss):
        smoothing = number("label_smoothing", loss.label_smoothing, 0.0, 1.0)
        if math.isnan(smoothing):
            raise ValueError("label_smoothing must be from 0 to 1, not nan")
        integer("ignore_index", loss.ignore_index, -(1 << 63), (1 << 63) - 1)
        if not isinstance(loss.weight, (Tensor, NoneType)):
            raise TypeError(f"the loss's weight must be a tensor, not {_shown(loss.weight)}")


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise TypeError or ValueError if an option of SGD is one that its constructor wouldn't take."""
    if type(optimizer) not in OPTIMIZERS:
        return
    for index, group in enumerate(optimizer.param_groups):
        for option, least in _SGD.items():
            value = group.get(option)
            if type(value) is not float or not value >= least:
                _check_sgd(f"{option} of parameter group {index}", option, value, least)
        for option in ("nesterov", "maximize"):
            if not isinstance(group.get(option), (bool, np.bool_)):
                name = f"{option} of parameter group {index}"
                raise TypeError(f"{name} must be True or False, not {_shown(group.get(option))}")
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                f"nesterov of parameter group {index} needs a momentum and no dampening, not momentum "
                f"{group['momentum']} and dampening {group['dampening']}"
            )


def _check_sgd(name: str, option: str, value: Any, least: float) -> None:
    # torch computes 1 - dampening, which rounds otherwise in a tensor
    if isinstance(value, Tensor) and option != "dampening":
        if value.numel() != 1 or value.is_complex() or value.requires_grad or value.is_meta:
            raise ValueError(
                f"{name} must be a number, or a tensor of one without a gradient, not a tensor of shape "
                f"{tuple(value.shape)} and {value.dtype}{' with a gradient' * value.requires_grad}"
            )
        value = value.item()
    number(name, value, least)
