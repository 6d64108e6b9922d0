"""scikit-learn's incremental estimators on the same batches, by one ``partial_fit`` an epoch. Needs scikit-learn."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import SGDClassifier
from sklearn.neural_network import MLPClassifier, MLPRegressor
from torch import Tensor

from benchmarks.peers.problem import Problem
from fastdl import data

# its squared error is halved, and so is the gradient
_REGRESSION_FACTOR = 2.0


class MLPTrainer:
    """``MLPClassifier`` or ``MLPRegressor`` with plain SGD: the same net, loss and update as the problem's.

    It cuts the epoch's examples into batches itself, to the same numbers as a ``partial_fit`` of each batch.

    Parameters
    ----------
    problem : Problem
        Without a hidden layer it is softmax regression, or linear regression.
    dtype : torch.dtype
    """

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        self.X, labels = problem.rows(dtype).numpy(), problem.labels(dtype)
        self.y = labels.numpy() if problem.classifies else labels.reshape(-1).numpy()
        self.order = problem.order()
        self.factor = 1.0 if problem.classifies else _REGRESSION_FACTOR
        estimator: Any = MLPClassifier if problem.classifies else MLPRegressor
        self.estimator = estimator(
            hidden_layer_sizes=problem.widths[1:-1],
            solver="sgd",
            alpha=0.0,
            batch_size=problem.batch_size,
            learning_rate_init=problem.lr * self.factor,
            momentum=0.0,
            nesterovs_momentum=False,
            shuffle=False,
        )
        # the estimator has parameters once it has seen a batch
        first = slice(problem.batch_size)
        classes = {"classes": np.arange(problem.widths[-1])} if problem.classifies else {}
        self.estimator.partial_fit(self.X[first], self.y[first], **classes)
        start = [tensor.to(dtype).numpy() for tensor in problem.start.values()]
        for layer, (weight, bias) in enumerate(zip(start[::2], start[1::2], strict=True)):
            self.estimator.coefs_[layer][...] = weight.T
            self.estimator.intercepts_[layer][...] = bias

    def train(self, num_epochs: int) -> list[float]:
        """Train on; return each epoch's mean loss."""
        means = []
        with warnings.catch_warnings():
            # no call is meant to converge
            warnings.simplefilter("ignore", UserWarning)
            for _ in range(num_epochs):
                rows = data.order(len(self.X), self.order).numpy()
                self.estimator.partial_fit(self.X[rows], self.y[rows])
                means.append(float(self.estimator.loss_) * self.factor)
        return means

    def parameters(self) -> Tensor:
        """Return all parameters in one float64 vector."""
        pairs = zip(self.estimator.coefs_, self.estimator.intercepts_, strict=True)
        arrays = [array for weight, bias in pairs for array in (weight.T, bias)]
        return torch.cat([torch.tensor(array).reshape(-1).double() for array in arrays])


class SGDClassifierTrainer:
    """``SGDClassifier``: ten logistic regressions, one class against the rest, an update for each example.

    It is another algorithm, so it has no parity.

    Parameters
    ----------
    problem : Problem
        Softmax regression.
    dtype : torch.dtype
    """

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        self.X, self.y = problem.rows(dtype).numpy(), problem.y.numpy()
        self.order = problem.order()
        self.classes = np.arange(problem.widths[-1])
        self.estimator = SGDClassifier(
            loss="log_loss",
            alpha=0.0,
            learning_rate="constant",
            eta0=problem.lr / problem.batch_size,
            shuffle=False,
        )

    def train(self, num_epochs: int) -> list[float]:
        """Train on; it doesn't tell an epoch's loss."""
        for _ in range(num_epochs):
            rows = data.order(len(self.X), self.order).numpy()
            self.estimator.partial_fit(self.X[rows], self.y[rows], classes=self.classes)
        return [float("nan")] * num_epochs

    def parameters(self) -> Tensor:
        """Return all parameters in one float64 vector."""
        return torch.from_numpy(np.column_stack([self.estimator.coef_, self.estimator.intercept_])).flatten()
