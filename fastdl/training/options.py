"""What `fit` is told, and the options of losses and of SGD, checked before the first step."""

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

_INT64 = 1 << 63
FLAGS = bool, np.bool_
_FLAG = FLAGS, "True or False"
# by argument of `fit`: the classes it may have, and how a message calls them
_ARGUMENTS: dict[str, tuple[Any, str]] = {
    "net": (nn.Module, "an nn.Module"),
    "loss": (Callable, "callable, such as nn.CrossEntropyLoss()"),
    "optimizer": (torch.optim.Optimizer, "a torch.optim.Optimizer"),
    "scheduler": ((NoneType, LRScheduler), "an LRScheduler of torch.optim.lr_scheduler"),
    "generator": ((torch.Generator, NoneType), "a torch.Generator, such as torch.Generator().manual_seed(0)"),
    "on_epoch": ((NoneType, Callable), "callable"),
    "shuffle": _FLAG,
    "drop_last": _FLAG,
    "compiled": _FLAG,
    "progress": _FLAG,
    "nesterov": _FLAG,
    "maximize": _FLAG,
    "weight": ((Tensor, NoneType), "a tensor"),
}
# the least value that SGD's constructor takes
_SGD = {"lr": 0, "momentum": 0, "weight_decay": 0, "dampening": -math.inf}


def _shown(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return repr(value) if isinstance(value, (int, float, str, NoneType)) else f"a {type(value).__name__}"


def check_kinds(where: str = "", **arguments: object) -> None:
    """Raise TypeError if an argument is of another kind than it may be."""
    for name, value in arguments.items():
        kinds, text = _ARGUMENTS[name]
        if not isinstance(value, kinds) or (name == "loss" and isinstance(value, type)):
            raise TypeError(f"{name}{where} must be {text}, not {_shown(value)}")


def integer(name: str, value: Any, least: float, most: float = math.inf) -> int:
    """Return an integer, or raise TypeError or ValueError if it is none or out of range."""
    try:
        if isinstance(value, FLAGS):
            raise TypeError
        return int(number(name, operator.index(value), least, most))
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {_shown(value)}") from None


def number(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> Any:
    """Return a real number, or raise TypeError or ValueError if it is none or out of range."""
    # the question for an abstract class takes as long as all others
    if type(value) not in (int, float) and not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, not {_shown(value)}")
    if not least <= value <= most:
        bounds = f"{least} or more" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"{name} must be {'a number' if least == -math.inf else bounds}, not {value}")
    return value


def check_loss(loss: Any) -> None:
    """Raise TypeError or ValueError if a loss can't train by an option."""
    reduction = getattr(loss, "reduction", None)
    if (isinstance(reduction, str) and reduction == "none") or (
        type(loss) in LOSSES and reduction not in ("mean", "sum")
    ):
        raise ValueError(f"{loss} has the reduction {_shown(reduction)}: training needs 'mean' or 'sum'")
    if type(loss) in LOSSES and isinstance(loss, nn.CrossEntropyLoss):
        number("label_smoothing", loss.label_smoothing, 0, 1)
        integer("ignore_index", loss.ignore_index, -_INT64, _INT64 - 1)
        check_kinds(" of the loss", weight=loss.weight)


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise TypeError or ValueError if an option of SGD is one that its constructor wouldn't take."""
    if type(optimizer) not in OPTIMIZERS:
        return
    for index, group in enumerate(optimizer.param_groups):
        where = f" of parameter group {index}"
        for option, least in _SGD.items():
            value = group.get(option)
            if type(value) is float and value >= least:
                continue
            # torch computes 1 - dampening, which rounds otherwise in a tensor
            if isinstance(value, Tensor) and option != "dampening":
                if value.numel() != 1:
                    shape = tuple(value.shape)
                    raise ValueError(f"{option}{where} must be one number, not a tensor of shape {shape}")
                value = value if value.requires_grad or value.is_meta else value.item()
            number(option + where, value, least)
        check_kinds(where, nesterov=group.get("nesterov"), maximize=group.get("maximize"))
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                f"nesterov{where} needs a momentum and no dampening, not momentum {group['momentum']} and "
                f"dampening {group['dampening']}"
            )
