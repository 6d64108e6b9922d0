"""The readable Python loop: any net, any loss, any optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Scores(NamedTuple):
    """A loss, and where the labels are classes the share of them that have the largest output, or None."""

    loss: float
    accuracy: float | None = None


class _Meter:
    """Sums losses and right answers over batches."""

    def __init__(self, loss: object) -> None:
        self._loss_is_summed = getattr(loss, "reduction", None) == "sum"
        self._loss_sum = 0.0
        self._num_rows = 0
        self._num_correct = 0
        self._num_labels = 0

    def add(self, loss: Tensor, y_hat: Tensor, y: Tensor) -> None:
        self._loss_sum += loss.item() if self._loss_is_summed else loss.item() * len(y)
        self._num_rows += len(y)
        if not y.is_floating_point() and y_hat.dim() == y.dim() + 1:
            self._num_correct += int((y_hat.argmax(dim=1) == y).sum())
            self._num_labels += y.numel()

    def scores(self) -> Scores:
        accuracy = self._num_correct / self._num_labels if self._num_labels else None
        return Scores(self._loss_sum / self._num_rows, accuracy)


def train_epoch(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
) -> Scores:
    """Train for one epoch, and return the scores that are met on the way, before each update.

    The net is in the mode that it is to train in, and takes each batch's X as it is. The loss is a scalar, a
    mean unless its attribute ``reduction`` says ``"sum"``.
    """
    meter = _Meter(loss)
    for X, y in batches:
        y_hat = net(X)
        batch_loss = loss(y_hat, y)
        optimizer.zero_grad()
        batch_loss.backward()
        optimizer.step()
        meter.add(batch_loss.detach(), y_hat.detach(), y)
    return meter.scores()


@torch.no_grad()
def evaluate_epoch(
    net: Callable[[Tensor], Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
) -> Scores:
    """Return the mean loss and accuracy over batches, without a gradient.

    The net is in the mode that it is to be evaluated in; the loss is a scalar, as for `train_epoch`, or one
    for each row.
    """
    meter = _Meter(loss)
    for X, y in batches:
        y_hat = net(X)
        losses = loss(y_hat, y)
        meter.add(losses.mean() if losses.dim() else losses, y_hat, y)
    return meter.scores()
