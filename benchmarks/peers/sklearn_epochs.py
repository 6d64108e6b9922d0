"""scikit-learn's incremental estimators on the same batches. Needs scikit-learn."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import SGDClassifier
from sklearn.neural_network import MLPClassifier
from torch import Tensor

from benchmarks.peers.problem import Problem
from fastdl import data


class _Partial:
    """Calls ``partial_fit`` with each batch of an epoch."""

    estimator: Any

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        self.X, self.y = problem.rows(dtype).numpy(), problem.y.numpy()
        self.batch_size = problem.batch_size
        self.order = problem.order()

    def _loss(self) -> float:
        return float("nan")

    def train(self, num_epochs: int) -> list[float]:
        """Train on; return each epoch's mean loss, NaN where the estimator doesn't tell it."""
        means = []
        for _ in range(num_epochs):
            total = 0.0
            for index in data.order(len(self.X), self.order).split(self.batch_size):
                rows = index.numpy()
                self.estimator.partial_fit(self.X[rows], self.y[rows])
                total += self._loss() * len(rows)
            means.append(total / len(self.X))
        return means


class MLPClassifierTrainer(_Partial):
    """``MLPClassifier`` with plain SGD: the same net, loss and update as the problem's.

    Parameters
    ----------
    problem : Problem
        A classifier; without a hidden layer it is softmax regression.
    dtype : torch.dtype
    """

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        super().__init__(problem, dtype)
        self.estimator = MLPClassifier(
            hidden_layer_sizes=problem.widths[1:-1],
            solver="sgd",
            alpha=0.0,
            batch_size=problem.batch_size,
            learning_rate_init=problem.lr,
            momentum=0.0,
            nesterovs_momentum=False,
            shuffle=False,
        )
        self._start(problem, dtype)

    def _start(self, problem: Problem, dtype: torch.dtype) -> None:
        # the estimator has parameters once it has seen a batch
        first = slice(problem.batch_size)
        self.estimator.partial_fit(self.X[first], self.y[first], classes=np.arange(problem.widths[-1]))
        start = [tensor.to(dtype).numpy() for tensor in problem.start.values()]
        for layer, (weight, bias) in enumerate(zip(start[::2], start[1::2], strict=True)):
            self.estimator.coefs_[layer][...] = weight.T
            self.estimator.intercepts_[layer][...] = bias

    def _loss(self) -> float:
        return float(self.estimator.loss_)

    def train(self, num_epochs: int) -> list[float]:
        """Train on; return each epoch's mean loss."""
        with warnings.catch_warnings():
            # the last batch is smaller than batch_size, and no call is meant to converge
            warnings.simplefilter("ignore", UserWarning)
            return super().train(num_epochs)

    def parameters(self) -> Tensor:
        """Return all parameters in one float64 vector."""
        pairs = zip(self.estimator.coefs_, self.estimator.intercepts_, strict=True)
        arrays = [array for weight, bias in pairs for array in (weight.T, bias)]
        return torch.cat([torch.tensor(array).reshape(-1).double() for array in arrays])


class SGDClassifierTrainer(_Partial):
    """``SGDClassifier``: ten logistic regressions, one class against the rest, an update for each example.

    It is another algorithm, so it has no parity.

    Parameters
    ----------
    problem : Problem
        Softmax regression.
    dtype : torch.dtype
    """

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        super().__init__(problem, dtype)
        self.estimator = SGDClassifier(
            loss="log_loss", alpha=0.0, learning_rate="constant", eta0=problem.lr / problem.batch_size
        )
        first = slice(problem.batch_size)
        self.estimator.partial_fit(self.X[first], self.y[first], classes=np.arange(problem.widths[-1]))

    def parameters(self) -> Tensor:
        """Return all parameters in one float64 vector."""
        return torch.from_numpy(np.column_stack([self.estimator.coef_, self.estimator.intercept_])).flatten()
