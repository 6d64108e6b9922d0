"""scikit-learn's incremental estimators, by one ``partial_fit`` an epoch. Needs scikit-learn."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from sklearn.neural_network import MLPClassifier, MLPRegressor
from torch import Tensor

from benchmarks.peers.problem import Problem, Trainer


class MLPTrainer(Trainer):
    """``MLPClassifier`` or ``MLPRegressor`` with plain SGD: the same net, loss and update as the problem's.

    It cuts the epoch's examples into batches itself, to the same numbers as a ``partial_fit`` of each batch.
    """

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        super().__init__(problem, {})
        self.X, self.y = problem.rows(dtype).numpy(), problem.labels(dtype).squeeze(-1).numpy()
        # a regressor's squared error is halved, and so is the gradient
        self.factor, kind, classes = 2.0, MLPRegressor, {}
        if problem.classifies:
            self.factor, kind, classes = 1.0, MLPClassifier, {"classes": np.arange(problem.widths[-1])}
        options: dict[str, Any] = {"learning_rate_init": problem.lr * self.factor, "shuffle": False}
        options |= {"alpha": 0.0, "momentum": 0.0, "nesterovs_momentum": False, "batch_size": self.batch_size}
        self.estimator: Any = kind(solver="sgd", hidden_layer_sizes=problem.widths[1:-1], **options)
        # an estimator has parameters once it has seen a batch
        self.estimator.partial_fit(self.X[: self.batch_size], self.y[: self.batch_size], **classes)
        start = [tensor.to(dtype).numpy() for tensor in problem.start.values()]
        for layer, (weight, bias) in enumerate(zip(start[::2], start[1::2], strict=True)):
            self.estimator.coefs_[layer][...] = weight.T
            self.estimator.intercepts_[layer][...] = bias

    def epoch(self, order: Tensor) -> float:
        """Train on the batches of an order, and return the mean loss."""
        rows = order.numpy()
        with warnings.catch_warnings():
            # no call is meant to converge
            warnings.simplefilter("ignore", UserWarning)
            self.estimator.partial_fit(self.X[rows], self.y[rows])
        return float(self.estimator.loss_) * self.factor

    def parameters(self) -> Tensor:
        """Return all parameters in one float64 vector."""
        pairs = zip(self.estimator.coefs_, self.estimator.intercepts_, strict=True)
        arrays = [array for weight, bias in pairs for array in (weight.T, bias)]
        return torch.cat([torch.tensor(array).reshape(-1).double() for array in arrays])
