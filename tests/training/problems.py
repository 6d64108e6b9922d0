"""Small problems for `fit`, torch's own loop beside it, and bytes of all that a refusal must not touch."""

from __future__ import annotations

import copy
import io
import signal
import threading
import warnings
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

import fastdl

# sums of other order, over a few steps of float64
FLOAT64 = {"rtol": 1e-10, "atol": 1e-10}


@dataclass
class Problem:
    """Everything that `fit` takes; a test edits it."""

    net: nn.Module
    loss: Any
    optimizer: Any
    X: Any
    y: Any
    settings: dict[str, Any] = field(default_factory=dict)

    def fit(self, **changes):
        arguments = {"epochs": 2, "batch_size": 8, "shuffle": False, "progress": False}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return fastdl.fit(
                self.net, self.loss, self.optimizer, self.X, self.y, **(arguments | self.settings | changes)
            )

    def loop(self, epochs=2, on_epoch=lambda _: None, batch_size=8):
        """Train as a user of torch would, in the order of the rows."""
        for epoch in range(epochs):
            for start in range(0, len(self.X), batch_size):
                X, y = self.X[start : start + batch_size], self.y[start : start + batch_size]
                y_hat = self.net(self.inputs(X))
                loss = self.loss(y_hat, y)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
            on_epoch([None] * (epoch + 1))

    def inputs(self, X):
        dtype = next(self.net.parameters()).dtype
        return X.to(dtype) / 255 if X.dtype == torch.uint8 else X

    def state(self):
        """Return the bytes of net, optimizer, gradients and modes, and the generator's state."""
        memory = io.BytesIO()
        torch.save([[*self.net.named_parameters()], [*self.net.named_buffers()]], memory)
        optimizer = (
            copy.deepcopy(vars(self.optimizer)["state"]),
            [
                {key: value for key, value in group.items() if key != "params"}
                for group in self.optimizer.param_groups
            ],
        )
        return (
            memory.getvalue(),
            repr(optimizer),
            [(p.requires_grad, repr(p.grad)) for p in self.net.parameters()],
            [module.training for module in self.net.modules()],
            [id(p) for group in self.optimizer.param_groups for p in group["params"]],
            getattr(self.optimizer, "_opt_called", None),
            torch.default_generator.get_state().tolist(),
        )


def classes(seed, dtype=torch.float64, widths=(6, 6, 3), rows=20, loss=None, **options):
    """Return a classifier's problem; the same for the same seed."""
    torch.manual_seed(seed)
    layers = []
    for sizes in pairwise(widths):
        layers += [nn.Linear(*sizes), nn.ReLU()]
    net = nn.Sequential(*layers[:-1]).to(dtype)
    optimizer = torch.optim.SGD(net.parameters(), **({"lr": 0.1, "momentum": 0.9} | options))
    X, y = torch.randn(rows, widths[0], dtype=dtype), torch.randint(widths[-1], (rows,))
    return Problem(net, loss or nn.CrossEntropyLoss(), optimizer, X, y)


def regression(seed, dtype=torch.float64, rows=20, **options):
    """Return a linear regression's problem; the same for the same seed."""
    torch.manual_seed(seed)
    net = nn.Linear(3, 1).to(dtype)
    optimizer = torch.optim.SGD(net.parameters(), **({"lr": 0.1, "momentum": 0.9} | options))
    X, y = torch.randn(rows, 3, dtype=dtype), torch.randn(rows, 1, dtype=dtype)
    return Problem(net, nn.MSELoss(), optimizer, X, y)


def assert_refused(problem, message, error=ValueError, **changes):
    """Fail unless `fit` raises the error in one sentence and leaves all as it was, in what it runs under."""
    before = problem.state()
    with pytest.raises(error, match=message) as raised:
        problem.fit(**changes)
    assert problem.state() == before
    text = str(raised.value)
    assert "\n" not in text
    assert not text.endswith(".")
    return text


def assert_trained_alike(ours, torchs, **tolerance):
    """Fail unless parameters and momentum buffers are torch's."""
    for mine, other in zip(ours.net.parameters(), torchs.net.parameters(), strict=True):
        torch.testing.assert_close(mine, other, **(tolerance or FLOAT64))
        for key, value in torchs.optimizer.state.get(other, {}).items():
            if value is not None:
                torch.testing.assert_close(ours.optimizer.state[mine][key], value, **(tolerance or FLOAT64))


class CtrlC:
    """Sends Ctrl-C to a run of `fit` soon after its second epoch, in the midst of another."""

    def __init__(self, net):
        self.net = net
        self.finished = []
        self.finished_before = None
        # held while the callback runs: an epoch can end sooner than the timer does
        self.calling_back = threading.Lock()

    def on_epoch(self, history):
        try:
            self.calling_back.acquire()
        finally:
            # the epoch has ended, also where Ctrl-C comes while this waits
            self.finished.append(copy.deepcopy(self.net.state_dict()))
        if len(history) == 2:
            threading.Timer(0.03, self._send).start()
        self.calling_back.release()

    def _send(self):
        with self.calling_back:
            self.finished_before = len(self.finished)
            signal.raise_signal(signal.SIGINT)

    def check(self):
        """Hold the run to its end soon after Ctrl-C, with the weights of the last finished epoch."""
        # counted in epochs, so that a busy machine passes: the one that was ending, of a thousand to come
        assert 2 <= self.finished_before <= len(self.finished) <= self.finished_before + 1
        state = self.net.state_dict().items()
        assert all(torch.equal(value, self.finished[-1][key]) for key, value in state)
