"""The three models by name, in their four implementations, with the textbook's hyperparameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastdl.reference import concise, scratch
from fastdl.reference.parity import Run
from fastdl.reference.textbook import Batches, Program, train
from fastdl.training.evaluation import EVALUATION_ROWS
from fastdl.training.fit import fit
from fastdl.training.history import History
from fastdl.training.progress import EpochProgress

Model = Literal["linear", "softmax", "mlp"]
Impl = Literal["scratch", "concise", "fused", "compiled"]


# those that `fit` trains
_FASTDLS = ("fused", "compiled")


@dataclass(frozen=True)
class Recipe:
    """How the textbook trains a model."""

    title: str
    num_epochs: int
    lr: float
    batch_size: int


RECIPES: Mapping[Model, Recipe] = {
    "linear": Recipe("Linear regression", num_epochs=3, lr=0.03, batch_size=10),
    "softmax": Recipe("Softmax regression", num_epochs=10, lr=0.1, batch_size=256),
    "mlp": Recipe("Multilayer perceptron", num_epochs=10, lr=0.1, batch_size=256),
}


def check_update(model: Model, impl: Impl, momentum: float, weight_decay: float) -> None:
    """Raise ValueError if momentum or weight decay is asked of a program whose update has none."""
    if _updates_plainly(model, impl) and (momentum or weight_decay):
        raise ValueError(
            f"{model} from scratch updates with param -= lr * grad / batch_size, which has no momentum and "
            "no weight decay: use another implementation"
        )


def _updates_plainly(model: Model, impl: Impl) -> bool:
    """Return whether the update is the textbook's own; its MLP from scratch has torch's."""
    return impl == "scratch" and model != "mlp"


def build(
    model: Model,
    impl: Impl,
    *,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    num_hiddens: int = 256,
    generator: torch.Generator | None = None,
    start: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Program:
    """Make a program that trains a model.

    Parameters
    ----------
    model : {'linear', 'softmax', 'mlp'}
    impl : {'scratch', 'concise', 'fused', 'compiled'}
        From the formulas; with torch.nn; with fastdl's ops in a Python loop; with fastdl's compiled engine.
    lr, momentum, weight_decay : float
        Of the update.
    num_hiddens : int
        Of the MLP.
    generator : torch.Generator, optional
        Where the starting weights come from. All implementations draw the concise program's.
    start : mapping of str to Tensor, optional
        The parameters to start from instead, by the names of the concise net's state_dict.
    dtype : torch.dtype
        Of the parameters.
    device : torch.device or str
        Where the parameters are. What is drawn is drawn on the CPU, so it is the same everywhere.

    Returns
    -------
    Program

    Raises
    ------
    ValueError
        If momentum or weight decay is asked of a program whose update has none.
    """
    sizes = {"num_hiddens": num_hiddens} if model == "mlp" else {}
    name = {"linear": "linear_regression", "softmax": "softmax_regression", "mlp": "mlp"}[model]
    options: dict[str, Any] = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    check_update(model, impl, momentum, weight_decay)
    if _updates_plainly(model, impl):
        options = {"lr": lr}
    if start is None:
        start = getattr(concise, name)(**sizes, lr=lr, generator=generator, dtype=dtype).state
    with torch.device(device):
        if impl in _FASTDLS:
            program = _fused(model, sizes, options, dtype)
        else:
            make: Callable[..., Program] = getattr(scratch if impl == "scratch" else concise, name)
            program = make(**sizes, **options, dtype=dtype)
    return program.load(start)


def _fused(model: Model, sizes: Mapping[str, int], options: Mapping[str, Any], dtype: torch.dtype) -> Program:
    from fastdl import models, nn, optim

    make = {"linear": models.LinearRegression, "softmax": models.SoftmaxRegression, "mlp": models.MLP}[model]
    net = make(**sizes).to(dtype)
    loss = nn.MSELoss() if model == "linear" else nn.CrossEntropyLoss()
    return Program(net, loss, optim.SGD(net.parameters(), **options), net.state_dict())


class _CompiledRun(Run):
    """A run of the compiled engine, one batch at a time, so that it shows itself after every step."""

    def step(self, X: Tensor, y: Tensor) -> float:
        """Train on one batch, in one epoch of one step, and return its mean loss."""
        X, y = (tensor.to(self.program.dtype) if tensor.is_floating_point() else tensor for tensor in (X, y))
        history = run(self.program, "compiled", X, y, num_epochs=1, batch_size=len(X))
        return history.train_loss[0]


def parity_run(program: Program, impl: Impl, loss_factor: float = 1.0) -> Run:
    """Return a program that `build` made for `impl` as the parity rule compares it."""
    return (_CompiledRun if impl == "compiled" else Run)(program, loss_factor)


def run(
    program: Program,
    impl: Impl,
    X: Tensor,
    y: Tensor,
    *,
    num_epochs: int,
    batch_size: int,
    test: tuple[Tensor, Tensor] | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    on_epoch: Callable[[History], None] | None = None,
) -> History:
    """Train a program on data in memory: ``fit`` trains fastdl's, the textbook's loop the others.

    Parameters
    ----------
    program : Program
        As `build` made it for `impl`.
    impl : {'scratch', 'concise', 'fused', 'compiled'}
    X, y : Tensor
        Examples and labels.
    num_epochs, batch_size : int
    test : (Tensor, Tensor), optional
        What the program is evaluated on after each epoch.
    generator : torch.Generator, optional
        Where each epoch's order comes from.
    progress : bool
        Whether to show progress on stderr.
    on_epoch : callable, optional
        Called after each epoch with the History so far, always the same object.

    Returns
    -------
    History
    """
    if impl in _FASTDLS:
        assert isinstance(program.net, nn.Module)
        assert isinstance(program.updater, torch.optim.Optimizer)
        return fit(
            program.net,
            program.loss,
            program.updater,
            X,
            y,
            epochs=num_epochs,
            batch_size=batch_size,
            test=test,
            generator=generator,
            progress=progress,
            on_epoch=on_epoch,
            compiled=impl == "compiled",
        )
    device = next(iter(program.state.values())).device
    X, y = X.to(device), y.to(device)
    test = None if test is None else (test[0].to(device), test[1].to(device))
    train_iter = Batches(X, y, batch_size, generator, dtype=program.dtype)
    test_iter = None if test is None else Batches(*test, EVALUATION_ROWS, dtype=program.dtype, shuffle=False)
    with EpochProgress(num_epochs, len(train_iter), show=progress) as bar:

        def epoch_done(history: History) -> None:
            if on_epoch is not None:
                on_epoch(history)
            bar.epoch_done(history)

        return train(program, bar.tracked(train_iter), num_epochs, test_iter, epoch_done)
