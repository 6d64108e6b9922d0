"""What an update and a loss are told besides their arrays: one record each, on the CPU and on CUDA alike."""

from __future__ import annotations

from typing import NamedTuple


class SGDOptions(NamedTuple):
    """The options of ``torch.optim.SGD``."""

    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool


class CrossEntropyOptions(NamedTuple):
    """The options of ``torch.nn.CrossEntropyLoss``; the reduction is one of ``reduction.CODES``."""

    ignore_index: int
    label_smoothing: float
    reduction: int
