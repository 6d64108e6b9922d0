"""The concise programs, and that those from scratch do the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastdl import data
from fastdl.reference import concise, scratch, textbook

MAKERS = ["linear_regression", "softmax_regression", "mlp"]


def clone(state):
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("make", "layers", "loss"),
    [
        (concise.linear_regression, [nn.Linear], nn.MSELoss),
        (concise.softmax_regression, [nn.Flatten, nn.Linear], nn.CrossEntropyLoss),
        (concise.mlp, [nn.Flatten, nn.Linear, nn.ReLU, nn.Linear], nn.CrossEntropyLoss),
    ],
)
def test_programs_are_built_of_torch_nn(make, layers, loss):
    program = make(generator=torch.Generator().manual_seed(0))
    assert [type(layer) for layer in program.net] == layers
    assert type(program.loss) is loss
    assert type(program.updater) is torch.optim.SGD
    for name, tensor in program.net.state_dict().items():
        assert program.state[name].data_ptr() == tensor.data_ptr()
        if name.endswith("bias"):
            assert not tensor.any()
        elif tensor.numel() > 1000:
            assert 0.0095 < tensor.std() < 0.0105


@pytest.mark.parametrize("name", MAKERS)
def test_scratch_takes_a_start_transposed_and_gives_the_same_outputs(name, seed):
    source = getattr(concise, name)(dtype=torch.float64)
    program = getattr(scratch, name)(dtype=torch.float64).load(source.state)
    X = torch.rand(7, 2 if name == "linear_regression" else 784, dtype=torch.float64)
    y_hat = source.net(X).softmax(dim=1) if name == "softmax_regression" else source.net(X)
    torch.testing.assert_close(program.net(X), y_hat, rtol=1e-12, atol=1e-14)
    for key, tensor in source.state.items():
        assert torch.equal(program.state[key], tensor)


def test_a_start_that_does_not_fit_is_refused_and_changes_nothing():
    program = scratch.linear_regression()
    before = clone(program.state)
    with pytest.raises(ValueError, match=r"'0.weight': \(1, 2\).*'0.weight': \(1, 3\)"):
        program.load(concise.linear_regression(3).state)
    assert all(torch.equal(program.state[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scratch_and_concise_train_alike(name, dtype, seed):
    linear = name == "linear_regression"
    if linear:
        points = data.regression(105, dtype=dtype)
        X, y = points.X, points.y
    else:
        X, y = torch.randint(0, 256, (105, 28, 28), dtype=torch.uint8), torch.randint(0, 10, (105,))
    source = getattr(concise, name)(dtype=dtype, lr=0.03)
    # half the squared error has half the gradient
    program = getattr(scratch, name)(dtype=dtype, lr=0.06 if linear else 0.03).load(source.state)
    histories = [
        textbook.train(
            each, textbook.Batches(X, y, 10, torch.Generator().manual_seed(seed), dtype=dtype), 2
        ).scaled(factor)
        for each, factor in ((source, 1), (program, 2 if linear else 1))
    ]
    # two epochs of rounding, amplified little by so few steps
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    for key, tensor in source.state.items():
        torch.testing.assert_close(program.state[key], tensor, **close)
    torch.testing.assert_close(histories[1].train_loss, histories[0].train_loss, **close)


def test_a_data_loader_and_batches_in_memory_give_bit_identical_training(seed):
    X, y = torch.randint(0, 256, (70, 28, 28), dtype=torch.uint8), torch.randint(0, 10, (70,))
    images = data.ImageData("made up", X, y, X, y, ("a",) * 10)
    programs = [concise.softmax_regression(generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    orders = [torch.Generator().manual_seed(seed) for _ in range(2)]
    loader = textbook.data_loader(images.dataset(train=True), 32, orders[0])
    histories = [
        textbook.train(programs[0], loader, 2),
        textbook.train(programs[1], textbook.Batches(X, y, 32, orders[1]), 2),
    ]
    assert histories[0].train_loss == histories[1].train_loss
    assert torch.equal(programs[0].state["1.weight"], programs[1].state["1.weight"])


def test_load_array_gives_every_row_once_an_epoch_in_a_new_order():
    rows = torch.arange(20).reshape(-1, 1)
    loader = concise.load_array(rows, batch_size=6, generator=torch.Generator().manual_seed(0))
    epochs = [torch.cat([batch for (batch,) in loader]).reshape(-1).tolist() for _ in range(2)]
    assert [len(batch) for (batch,) in loader] == [6, 6, 6, 2]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
    assert epochs[0] != epochs[1]


def test_momentum_and_weight_decay_reach_the_optimizer():
    program = concise.mlp(num_hiddens=4, momentum=0.9, weight_decay=0.01)
    group = program.updater.param_groups[0]
    assert (group["momentum"], group["weight_decay"]) == (0.9, 0.01)
