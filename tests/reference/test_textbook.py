"""The textbook's loop: what it measures and when it reports."""

from __future__ import annotations

import torch
from torch import nn

from fastdl.reference import concise, textbook


def test_figures_on_the_way_are_those_before_each_update(seed):
    X, y = torch.rand(10, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
    program = concise.softmax_regression(4, 3, lr=1.0)
    twin = concise.softmax_regression(4, 3, lr=1.0).load(program.state)
    loss_sum, num_correct = 0.0, 0
    for rows in (slice(0, 8), slice(8, 10)):
        y_hat = twin.net(X[rows])
        loss = nn.CrossEntropyLoss()(y_hat, y[rows])
        loss_sum += loss.item() * len(y_hat)
        num_correct += int((y_hat.argmax(1) == y[rows]).sum())
        textbook.train_step(twin, X[rows], y[rows])
    scores = textbook.train_epoch(program, textbook.Batches(X, y, 8, shuffle=False))
    assert scores == (loss_sum / 10, num_correct / 10)


def test_train_evaluates_after_each_epoch_and_reports_the_same_history():
    X, y = torch.rand(10, 4), torch.arange(10) % 3
    program = concise.softmax_regression(4, 3)
    seen = []
    history = textbook.train(
        program,
        textbook.Batches(X, y, 4),
        3,
        textbook.Batches(X, y, 10, shuffle=False),
        lambda history: seen.append((history, len(history), program.state["1.bias"].clone())),
    )
    assert [epochs for _, epochs, _ in seen] == [1, 2, 3]
    assert all(each is history for each, _, _ in seen)
    final = nn.CrossEntropyLoss()(program.net(X), y).item()
    assert history.test_loss[-1] == final
    assert len(history.test_accuracy) == 3


def test_a_regression_has_no_accuracy():
    X = torch.rand(10, 2)
    history = textbook.train(concise.linear_regression(), textbook.Batches(X, X[:, :1], 4), 1)
    assert history.train_accuracy == []
    assert len(history.train_loss) == 1
