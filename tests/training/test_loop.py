"""The Python loop: one epoch of any net, loss and optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastdl.training.loop import evaluate_epoch, train_epoch


def test_an_epoch_takes_the_steps_of_a_loop_written_out(seed):
    net, twin = nn.Linear(3, 2), nn.Linear(3, 2)
    twin.load_state_dict(net.state_dict())
    batches = [(torch.rand(4, 3), torch.tensor([0, 1, 1, 0])), (torch.rand(1, 3), torch.tensor([1]))]
    loss, optimizer = nn.CrossEntropyLoss(), torch.optim.Adam(twin.parameters())
    loss_sum = 0.0
    for X, y in batches:
        batch_loss = loss(twin(X), y)
        loss_sum += batch_loss.item() * len(y)
        optimizer.zero_grad()
        batch_loss.backward()
        optimizer.step()
    scores = train_epoch(net, loss, torch.optim.Adam(net.parameters()), batches)
    assert scores.loss == loss_sum / 5
    assert torch.equal(net.weight, twin.weight)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_is_the_mean_over_rows_whatever_the_reduction(reduction, seed):
    net, X, y = nn.Linear(3, 2), torch.rand(5, 3), torch.tensor([0, 1, 1, 0, 1])
    scores = evaluate_epoch(net, nn.CrossEntropyLoss(reduction=reduction), [(X[:3], y[:3]), (X[3:], y[3:])])
    # a mean of two batches in float32
    assert scores.loss == pytest.approx(nn.CrossEntropyLoss()(net(X), y).item(), rel=1e-6)
    assert scores.accuracy == (net(X).argmax(1) == y).double().mean().item()


def test_accuracy_counts_every_label_of_an_image():
    logits = torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]]]).reshape(1, 2, 2)
    scores = evaluate_epoch(
        lambda X: logits, nn.CrossEntropyLoss(), [(torch.zeros(1), torch.tensor([[1, 1]]))]
    )
    assert scores.accuracy == 0.5


def test_evaluation_builds_no_graph():
    net = nn.Linear(3, 2)
    seen = []

    def loss(y_hat, y):
        seen.append(y_hat.requires_grad)
        return y_hat.sum()

    evaluate_epoch(net, loss, [(torch.rand(2, 3), torch.zeros(2))])
    assert seen == [False]
