"""An epoch of the Python loop that fails: net, loss and optimizer are as before it, the same objects."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastdl.training.undo import undone_by_errors
from tests.training.problems import Problem, classes


def _norm(seed):
    problem = classes(seed)
    problem.net = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    problem.optimizer = torch.optim.SGD(problem.net.parameters(), lr=0.1, momentum=0.9)
    return problem


class _Counting(nn.Sequential):
    """A net that makes a buffer in its first step, and keeps a count beside its tensors."""

    count = 0

    def forward(self, X):
        if not hasattr(self, "seen"):
            self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.seen += 1
        self.count += 1
        return super().forward(X)

    def get_extra_state(self):
        return {"count": self.count}

    def set_extra_state(self, state):
        self.count = state["count"]


def _counting(seed):
    problem = classes(seed)
    problem.net = _Counting(*problem.net)
    return problem


def _with(make):
    def build(seed):
        problem = classes(seed)
        problem.optimizer = make(problem.net.parameters())
        return problem

    return build


def _hooked(seed):
    problem = classes(seed)
    problem.net.register_load_state_dict_post_hook(lambda *_: pytest.fail("a state_dict was loaded"))
    problem.optimizer.register_load_state_dict_post_hook(lambda *_: pytest.fail("a state_dict was loaded"))
    return problem


def _half_buffers(seed):
    problem = classes(seed, torch.float32)
    for parameter in problem.net.parameters():
        # load_state_dict would cast it
        problem.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(
            parameter, dtype=torch.float64
        )
    return problem


def _learnt_loss(seed):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, y_hat, y):
            return self.scale * nn.functional.cross_entropy(y_hat, y)

    problem = classes(seed)
    problem.loss = Scaled()
    problem.optimizer.add_param_group({"params": problem.loss.parameters()})
    return problem


PROBLEMS = {
    "momentum": classes,
    "batch norm": _norm,
    "a new buffer": _counting,
    "Adam": _with(torch.optim.Adam),
    "Adam with a tensor": _with(lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1), capturable=False)),
    "Rprop": _with(torch.optim.Rprop),
    "hooks of load_state_dict": _hooked,
    "buffers of another dtype": _half_buffers,
    "a loss that learns": _learnt_loss,
}


def _deep(problem):
    net, optimizer = problem.net, problem.optimizer
    tensors = [*net.parameters(), *net.buffers(), *(p for g in optimizer.param_groups for p in g["params"])]
    state = {id(p): dict(values) for p, values in optimizer.state.items()}
    groups = [
        {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]
    objects = (
        [(id(tensor), tensor.data_ptr(), tensor.requires_grad) for tensor in tensors],
        {key: {name: id(value) for name, value in values.items()} for key, values in state.items()},
        [name for name, _ in net.named_buffers()],
        getattr(net, "count", None),
    )
    # repr of float64 to 17 digits is exact
    values = [[t.tolist(), None if t.grad is None else t.grad.tolist()] for t in tensors], state, groups
    return objects, repr(values)


def _fail_after(problem, change):
    with undone_by_errors(problem.net, problem.loss, problem.optimizer):
        change(problem)
        raise ZeroDivisionError


@pytest.mark.parametrize("first", [True, False], ids=["first epoch", "second epoch"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_failed_epoch_leaves_no_trace(name, first, seed):
    problem = PROBLEMS[name](seed)
    if name == "buffers of another dtype" and not first:
        return
    if not first:
        problem.fit(compiled=False, epochs=1)
    before = _deep(problem)
    original, steps = problem.loss, []

    def failing(y_hat, y):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return original(y_hat, y)

    with pytest.raises(KeyboardInterrupt), undone_by_errors(problem.net, original, problem.optimizer):
        Problem(problem.net, failing, problem.optimizer, problem.X, problem.y).loop(1)
    assert _deep(problem) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda p: setattr(p.net[0].weight, "data", torch.zeros(2, 2)),
        lambda p: setattr(p.net[0], "weight", nn.Parameter(torch.zeros(6, 6).double())),
        lambda p: p.net.append(nn.ReLU()),
        lambda p: p.net[0].weight.requires_grad_(False),
        lambda p: p.optimizer.param_groups[0].update(lr=3.0, params=[]),
        lambda p: p.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]}),
        lambda p: p.optimizer.state.clear(),
        lambda p: p.net[0].weight.grad.add_(1),
        lambda p: p.optimizer.zero_grad(),
    ],
)
def test_whatever_changed_meanwhile_is_brought_back(change, seed):
    problem = classes(seed)
    problem.loop(1)
    before, children = _deep(problem), list(problem.net.children())
    with pytest.raises(ZeroDivisionError):
        _fail_after(problem, change)
    assert _deep(problem) == before
    assert list(problem.net.children()) == children


def test_modules_without_tensors_of_their_own_are_left_alone(seed):
    problem = classes(seed)
    problem.net = torch.jit.script(problem.net)
    before = [parameter.detach().clone() for parameter in problem.net.parameters()]
    with pytest.raises(ZeroDivisionError):
        _fail_after(problem, lambda p: p.loop(1))
    for parameter, kept in zip(problem.net.parameters(), before, strict=True):
        assert torch.equal(parameter, kept)
    lazy = nn.LazyLinear(3)
    with undone_by_errors(lazy, problem.loss, problem.optimizer):
        lazy(torch.zeros(2, 4))
