"""JAX: one compiled program for an epoch, a ``lax.scan`` over its batches. Needs jax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch import Tensor

from benchmarks.peers.problem import Problem, Trainer


class JaxTrainer(Trainer):
    """``jit`` of a ``scan`` over the epoch, the parameters donated, products in full float32.

    The program returns the mean of the steps' losses and counts no accuracy. The order is ``data.order``'s,
    drawn by torch: JAX's own permutation sorts, which takes longer. The epoch is gathered before the scan, or
    each batch within it; images are floats, or uint8 pixels that each batch converts.
    """

    def __init__(
        self, problem: Problem, dtype: torch.dtype, *, gather_first: bool, pixels: bool, unroll: int
    ) -> None:
        super().__init__(problem, {})
        self.x64 = dtype == torch.float64
        with jax.enable_x64(self.x64):
            X = problem.X.flatten(1) if pixels else problem.rows(dtype)
            labels = problem.labels(dtype)
            self.X = jnp.asarray(X.cpu().numpy())
            self.y = jnp.asarray((labels.to(torch.int32) if problem.classifies else labels).cpu().numpy())
            start = [jnp.asarray(tensor.to(dtype).numpy()) for tensor in problem.start.values()]
            # a copy, as donated memory must not be torch's
            self.params = [(jnp.array(w), jnp.array(b)) for w, b in zip(start[::2], start[1::2], strict=True)]
            self.scan = jax.jit(_epoch(problem, gather_first, unroll), donate_argnums=0)

    def epoch(self, order: Tensor) -> Any:
        """Train on the batches of an order, and return the mean loss."""
        with jax.enable_x64(self.x64):
            self.params, mean = self.scan(self.params, self.X, self.y, order.int().numpy())
            return mean

    def parameters(self) -> Tensor:
        """Return all parameters in one float64 vector."""
        arrays = [torch.from_numpy(jax.device_get(array).copy()) for pair in self.params for array in pair]
        return torch.cat([array.reshape(-1).double() for array in arrays])


def _epoch(problem: Problem, gather_first: bool, unroll: int) -> Callable[..., Any]:
    num_examples, batch_size, lr = len(problem.X), problem.batch_size, problem.lr
    num_layers = len(problem.widths) - 1
    whole = num_examples // batch_size * batch_size

    def loss(params: Any, X: Any, y: Any) -> Any:
        for layer, (weight, bias) in enumerate(params):
            X = jnp.dot(X, weight.T, precision="highest") + bias
            if layer < num_layers - 1:
                X = jax.nn.relu(X)
        if not problem.classifies:
            return jnp.mean((X - y) ** 2)
        log_probabilities = jax.nn.log_softmax(X) * jax.nn.one_hot(y, problem.widths[-1], dtype=X.dtype)
        return -jnp.mean(jnp.sum(log_probabilities, axis=1))

    def step(params: Any, batch: Any) -> Any:
        X, y = batch
        if X.dtype == jnp.uint8:
            X = X.astype(params[0][0].dtype) / 255
        value, grads = jax.value_and_grad(loss)(params, X, y)
        return jax.tree.map(lambda param, grad: param - lr * grad, params, grads), value

    def epoch(params: Any, X: Any, y: Any, order: Any) -> Any:
        index = order[:whole].reshape(-1, batch_size)

        def gathered(params: Any, rows: Any) -> Any:
            return step(params, (X[rows], y[rows]))

        work, batches = (step, (X[index], y[index])) if gather_first else (gathered, index)
        params, losses = jax.lax.scan(work, params, batches, unroll=unroll)
        total = jnp.sum(losses) * batch_size
        if whole < num_examples:
            params, last = gathered(params, order[whole:])
            total += last * (num_examples - whole)
        return params, total / num_examples

    return epoch
