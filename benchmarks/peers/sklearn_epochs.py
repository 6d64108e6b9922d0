"""scikit-learn's incremental estimators, by one ``partial_fit`` an epoch. Needs scikit-learn."""

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


class _Trainer:
    """Calls ``partial_fit`` with the examples of an epoch in its order."""

    estimator: Any
    # a regressor's squared error is halved, and so is the gradient
    factor = 1.0

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        labels = problem.labels(dtype)
        self.X, self.y = (
            problem.rows(dtype).numpy(),
            labels.numpy() if problem.classifies else labels.reshape(-1).numpy(),
        )
        self.order = problem.order()
        self.factor = 1.0 if problem.classifies else 2.0
        # an estimator has parameters once it has seen a batch
        self.classes = {"classes": np.arange(problem.widths[-1])} if problem.classifies else {}

    def train(self, num_epochs: int) -> list[float]:
        """Train on; return each epoch's mean loss, NaN where the estimator doesn't tell it."""
        means = []
        with warnings.catch_warnings():
            # no call is meant to converge
            warnings.simplefilter("ignore", UserWarning)
            for _ in range(num_epochs):
                rows = data.order(len(self.X), self.order).numpy()
                self.estimator.partial_fit(self.X[rows], self.y[rows])
                means.append(float(getattr(self.estimator, "loss_", float("nan"))) * self.factor)
        return means


class MLPTrainer(_Trainer):
    """``MLPClassifier`` or ``MLPRegressor`` with plain SGD: the same net, loss and update as the problem's.

    It cuts the epoch's examples into batches itself, to the same numbers as a ``partial_fit`` of each batch.
    """

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        super().__init__(problem, dtype)
        estimator: Any = MLPClassifier if problem.classifies else MLPRegressor
        options = {
            "hidden_layer_sizes": problem.widths[1:-1],
            "batch_size": problem.batch_size,
            "solver": "sgd",
        }
        options |= {
            "learning_rate_init": problem.lr * self.factor,
            "momentum": 0.0,
            "nesterovs_momentum": False,
        }
        self.estimator = estimator(alpha=0.0, shuffle=False, **options)
        first = slice(problem.batch_size)
        self.estimator.partial_fit(self.X[first], self.y[first], **self.classes)
        start = [tensor.to(dtype).numpy() for tensor in problem.start.values()]
        for layer, (weight, bias) in enumerate(zip(start[::2], start[1::2], strict=True)):
            self.estimator.coefs_[layer][...] = weight.T
            self.estimator.intercepts_[layer][...] = bias

    def parameters(self) -> Tensor:
        """Return all parameters in one float64 vector."""
        pairs = zip(self.estimator.coefs_, self.estimator.intercepts_, strict=True)
        arrays = [array for weight, bias in pairs for array in (weight.T, bias)]
        return torch.cat([torch.tensor(array).reshape(-1).double() for array in arrays])


class SGDClassifierTrainer(_Trainer):
    """``SGDClassifier``: ten logistic regressions, one class against the rest, an update for each example.

    It is another algorithm, so it has no parity.
    """

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        super().__init__(problem, dtype)
        options = {"learning_rate": "constant", "eta0": problem.lr / problem.batch_size, "shuffle": False}
        self.estimator = SGDClassifier(loss="log_loss", alpha=0.0, **options)
        first = slice(problem.batch_size)
        self.estimator.partial_fit(self.X[first], self.y[first], **self.classes)

    def parameters(self) -> Tensor:
        """Return all parameters in one float64 vector."""
        return torch.from_numpy(np.column_stack([self.estimator.coef_, self.estimator.intercept_])).flatten()
