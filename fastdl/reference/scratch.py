"""The three models from their formulas: tensors that require a gradient, and no layer or module.

Only the MLP borrows its loss and its optimizer from torch, as in the textbook.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastdl.reference.textbook import Program


def linreg(X: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Return the linear regression model's ``Xw + b`` for X (N, K), w (K, 1), b (1,)."""
    return torch.matmul(X, w) + b


def softmax(X: Tensor) -> Tensor:
    """Return ``exp(X) / sum(exp(X))`` of each row; overflows where exp(X) does."""
    X_exp = torch.exp(X)
    partition = X_exp.sum(1, keepdim=True)
    return X_exp / partition


def relu(X: Tensor) -> Tensor:
    """Return ``max(X, 0)``, elementwise."""
    return torch.max(X, torch.zeros_like(X))


def squared_loss(y_hat: Tensor, y: Tensor) -> Tensor:
    """Return ``(y_hat - y)^2 / 2``, elementwise."""
    return (y_hat - y.reshape(y_hat.shape)) ** 2 / 2


def cross_entropy(y_hat: Tensor, y: Tensor) -> Tensor:
    """Return ``-log y_hat[y]`` of each row for probabilities y_hat (N, C) and classes y (N,)."""
    return -torch.log(y_hat[range(len(y_hat)), y])


@torch.no_grad()
def sgd(params: Sequence[Tensor], lr: float, batch_size: int) -> None:
    """Take a step of minibatch stochastic gradient descent, for gradients summed over batch_size rows."""
    for param in params:
        assert param.grad is not None
        param -= lr * param.grad / batch_size
        param.grad.zero_()


def linear_regression(
    num_inputs: int = 2,
    *,
    lr: float = 0.03,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Program:
    """Return linear regression: `linreg`, `squared_loss`, `sgd`.

    Parameters
    ----------
    num_inputs : int
        Features of an example.
    lr : float
        Learning rate, for half the squared error: twice that of the concise program for the same steps.
    generator : torch.Generator, optional
        Where the weights come from: normal with standard deviation 0.01. The bias starts at 0.
    dtype : torch.dtype
        Of the parameters.

    Returns
    -------
    Program
    """
    w = torch.normal(0, 0.01, size=(num_inputs, 1), generator=generator, dtype=dtype, requires_grad=True)
    b = torch.zeros(1, dtype=dtype, requires_grad=True)

    def net(X: Tensor) -> Tensor:
        return linreg(X, w, b)

    def updater(batch_size: int) -> None:
        sgd([w, b], lr, batch_size)

    return Program(net, squared_loss, updater, {"0.weight": w.detach().T, "0.bias": b.detach()})


def softmax_regression(
    num_inputs: int = 784,
    num_outputs: int = 10,
    *,
    lr: float = 0.1,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Program:
    """Return softmax regression: ``softmax(XW + b)``, `cross_entropy`, `sgd`.

    Parameters
    ----------
    num_inputs, num_outputs : int
        Pixels of an image, and classes.
    lr : float
        Learning rate.
    generator, dtype
        As for `linear_regression`.

    Returns
    -------
    Program
        Its net gives probabilities.
    """
    size = (num_inputs, num_outputs)
    W = torch.normal(0, 0.01, size=size, generator=generator, dtype=dtype, requires_grad=True)
    b = torch.zeros(num_outputs, dtype=dtype, requires_grad=True)

    def net(X: Tensor) -> Tensor:
        return softmax(torch.matmul(X.reshape((-1, W.shape[0])), W) + b)

    def updater(batch_size: int) -> None:
        sgd([W, b], lr, batch_size)

    return Program(net, cross_entropy, updater, {"1.weight": W.detach().T, "1.bias": b.detach()})


def mlp(
    num_inputs: int = 784,
    num_outputs: int = 10,
    num_hiddens: int = 256,
    *,
    lr: float = 0.1,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Program:
    """Return the multilayer perceptron: ``relu(XW1 + b1)W2 + b2`` with torch's cross entropy and SGD.

    Parameters
    ----------
    num_inputs, num_outputs, num_hiddens : int
        Pixels of an image, classes, and hidden units.
    lr, momentum, weight_decay : float
        Of ``torch.optim.SGD``.
    generator, dtype
        As for `linear_regression`.

    Returns
    -------
    Program
    """

    def weights(*size: int) -> Tensor:
        return (torch.randn(*size, generator=generator, dtype=dtype) * 0.01).requires_grad_()

    W1 = weights(num_inputs, num_hiddens)
    b1 = torch.zeros(num_hiddens, dtype=dtype, requires_grad=True)
    W2 = weights(num_hiddens, num_outputs)
    b2 = torch.zeros(num_outputs, dtype=dtype, requires_grad=True)

    def net(X: Tensor) -> Tensor:
        X = X.reshape((-1, num_inputs))
        H = relu(X @ W1 + b1)
        return H @ W2 + b2

    updater = torch.optim.SGD([W1, b1, W2, b2], lr=lr, momentum=momentum, weight_decay=weight_decay)
    state = {"1.weight": W1.T, "1.bias": b1, "3.weight": W2.T, "3.bias": b2}
    state = {name: tensor.detach() for name, tensor in state.items()}
    return Program(net, nn.CrossEntropyLoss(), updater, state)
