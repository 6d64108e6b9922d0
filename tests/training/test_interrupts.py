"""Ctrl-C at any moment: net, optimizer and generator stand at the end of the same epoch."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from itertools import pairwise

import pytest
import torch
from torch import nn

import fastdl
from fastdl.arrays import cpu_kernels
from fastdl.training import engines
from fastdl.training.history import History

EPOCHS = 5
SIZES = {"small": (2, 1), "one thread": (20, 16, 1), "threads": (300, 400, 1)}
PLACES = [
    "before the order",
    "before the kernel",
    "behind the kernel",
    "behind the epoch",
    "before the history",
    "in the history",
]


class Run:
    """A run of `fit` with momentum, and what the same run leaves after each number of epochs."""

    def __init__(self, size: str, momentum: float, watched: bool) -> None:
        widths = SIZES[size]
        self.X, self.y = torch.randn(200, widths[0]), torch.randn(200, 1)
        layers = [nn.Linear(*pair) for pair in pairwise(widths)]
        self.net = nn.Sequential(*layers[:1], *(each for layer in layers[1:] for each in (nn.ReLU(), layer)))
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-3, momentum=momentum)
        self.generator = torch.Generator().manual_seed(1)
        self.lengths: list[int] = []
        self.watched = watched
        self.start = {name: value.clone() for name, value in self.net.state_dict().items()}

    def reset(self) -> None:
        self.net.load_state_dict(self.start)
        self.optimizer.state.clear()
        self.generator.manual_seed(1)
        self.lengths.clear()

    def fit(self, epochs: int = EPOCHS) -> None:
        on_epoch = (lambda history: self.lengths.append(len(history))) if self.watched else None
        fastdl.fit(
            self.net, nn.MSELoss(), self.optimizer, self.X, self.y, epochs=epochs, batch_size=50,
            generator=self.generator, on_epoch=on_epoch, progress=False,
        )  # fmt: skip

    def state(self) -> list[list[float]]:
        buffers = [each.get("momentum_buffer") for each in self.optimizer.state.values()]
        tensors = [*self.net.state_dict().values(), *(each for each in buffers if each is not None)]
        return [tensor.flatten().tolist() for tensor in (*tensors, self.generator.get_state())]

    def expected(self) -> list[list[list[float]]]:
        """Return the state after 0, 1, ... epochs, of the same kernels."""
        states = []
        for epochs in range(EPOCHS + 1):
            self.reset()
            self.fit(epochs)
            states.append(self.state())
        self.reset()
        return states


def interrupt(monkeypatch, place, kth):
    """Raise KeyboardInterrupt at the kth time that a place is passed."""
    count = 0

    def then(raises_before, function):
        def call(*arguments, **keywords):
            nonlocal count
            count += 1
            if raises_before and count == kth:
                raise KeyboardInterrupt
            result = function(*arguments, **keywords)
            if not raises_before and count == kth:
                raise KeyboardInterrupt
            return result

        return call

    def patch(owner, name, *, before=False):
        monkeypatch.setattr(owner, name, then(before, getattr(owner, name)))

    if "kernel" in place:
        patch(cpu_kernels().small, "run_small_epoch", before=place.startswith("before"))
        patch(cpu_kernels().team.Team, "run", before=place.startswith("before"))
    elif place == "before the order":
        patch(engines.Orders, "next", before=True)
    elif place == "behind the epoch":
        patch(engines, "note_step")
    elif place == "before the history":
        patch(engines.CompiledEngine, "epoch")
    else:
        patch(History, "append", before=False)


@pytest.mark.parametrize("watched", [False, True], ids=["alone", "with a callback"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("size", SIZES)
def test_an_interrupt_anywhere_leaves_a_finished_epoch(size, place, momentum, watched, monkeypatch, seed):
    run = Run(size, momentum, watched)
    expected = run.expected()
    for kth in (1, 2, EPOCHS):
        with monkeypatch.context() as patches:
            interrupt(patches, place, kth)
            with pytest.raises(KeyboardInterrupt):
                run.fit()
        # the history counts an epoch when it has all figures
        finished = kth if place == "in the history" else kth - 1
        assert run.state() == expected[finished]
        run.reset()


@pytest.mark.parametrize("watched", [False, True], ids=["alone", "with a callback"])
@pytest.mark.parametrize("size", SIZES)
def test_ctrl_c_at_random_moments_leaves_a_finished_epoch(size, watched, seed):
    run = Run(size, 0.9, watched)
    expected = run.expected()
    started = time.perf_counter()
    run.fit()
    seconds = time.perf_counter() - started
    moments = random.Random(seed)
    for _ in range(100):
        run.reset()
        timer = threading.Timer(moments.random() * seconds, os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            run.fit()
            # the signal is still to come
            while True:
                time.sleep(1e-3)
        except KeyboardInterrupt:
            pass
        state = run.state()
        assert state in expected
        # the callback notes an epoch a little after it counts
        if watched:
            assert expected.index(state) - len(run.lengths) in (0, 1)
