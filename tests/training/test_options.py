"""Each option of `fit`, of the losses and of SGD: taken and right, or refused before the first step."""

from __future__ import annotations

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import fastdl
from tests.training.problems import FLOAT64, assert_refused, assert_trained_alike, classes, regression

RIGHT = None

# argument of fit, value, and the error with a part of its sentence, or RIGHT
ARGUMENTS = [
    ("batch_size", 8.0, TypeError, "batch_size must be an integer, not 8.0"),
    ("batch_size", "8", TypeError, "batch_size must be an integer, not '8'"),
    ("batch_size", True, TypeError, "batch_size must be an integer, not True"),
    ("batch_size", None, TypeError, "batch_size must be an integer, not None"),
    ("batch_size", [8], TypeError, "batch_size must be an integer, not a list"),
    ("batch_size", torch.tensor(8.0), TypeError, "batch_size must be an integer, not a Tensor"),
    ("batch_size", 0, ValueError, "batch_size must be 1 or more, not 0"),
    ("batch_size", -1, ValueError, "batch_size must be 1 or more, not -1"),
    ("batch_size", np.int64(8), RIGHT, ""),
    ("batch_size", torch.tensor(8), RIGHT, ""),
    ("batch_size", 20, RIGHT, ""),
    ("batch_size", 21, RIGHT, ""),
    ("batch_size", 1 << 70, RIGHT, ""),
    ("epochs", 2.5, TypeError, "epochs must be an integer, not 2.5"),
    ("epochs", 2.0, TypeError, "epochs must be an integer, not 2.0"),
    ("epochs", True, TypeError, "epochs must be an integer, not True"),
    ("epochs", "2", TypeError, "epochs must be an integer"),
    ("epochs", None, TypeError, "epochs must be an integer"),
    ("epochs", -1, ValueError, "epochs must be 0 or more, not -1"),
    ("epochs", 0, RIGHT, ""),
    ("epochs", np.int32(3), RIGHT, ""),
    ("scheduler", 3, TypeError, "scheduler must be an LRScheduler .*, not 3"),
    ("scheduler", "StepLR", TypeError, "scheduler must be an LRScheduler"),
    ("scheduler", torch.optim.lr_scheduler.StepLR, TypeError, "scheduler must be an LRScheduler"),
    ("scheduler", torch.optim.SGD([torch.zeros(1)], lr=1.0), TypeError, "scheduler must be an LRScheduler"),
    ("on_epoch", 3, TypeError, "on_epoch must be callable, not 3"),
    ("on_epoch", "print", TypeError, "on_epoch must be callable"),
    ("on_epoch", [print], TypeError, "on_epoch must be callable, not a list"),
    ("generator", 0, TypeError, "generator must be a torch.Generator.*, not 0"),
    ("generator", np.random.default_rng(0), TypeError, "generator must be a torch.Generator"),
    ("shuffle", "no", TypeError, "shuffle must be True or False, not 'no'"),
    ("shuffle", 1, TypeError, "shuffle must be True or False, not 1"),
    ("shuffle", None, TypeError, "shuffle must be True or False, not None"),
    ("shuffle", np.False_, RIGHT, ""),
    ("drop_last", "yes", TypeError, "drop_last must be True or False"),
    ("progress", None, TypeError, "progress must be True or False, not None"),
    ("progress", 0, TypeError, "progress must be True or False, not 0"),
    ("compiled", "auto", TypeError, "compiled must be True or False, not 'auto'"),
    ("net", 3, TypeError, "net must be an nn.Module, not 3"),
    ("loss", "mse", TypeError, "loss must be callable"),
    ("loss", None, TypeError, "loss must be callable"),
    (
        "loss",
        nn.CrossEntropyLoss,
        TypeError,
        "not the class CrossEntropyLoss",
    ),
    ("optimizer", 0.1, TypeError, "optimizer must be a torch.optim.Optimizer"),
    ("optimizer", torch.optim.SGD, TypeError, "optimizer must be a torch.optim.Optimizer"),
    ("X", [[1.0] * 6] * 20, TypeError, "X is a list: it must be a tensor"),
    ("X", "images", TypeError, "X is a str"),
    ("X", None, TypeError, "X is a NoneType"),
    ("y", [0] * 20, TypeError, "y is a list: it must be a tensor or an array"),
    ("y", None, TypeError, "y is missing"),
    ("y", 3, TypeError, "y is a int: it must be a tensor or an array"),
    ("test", 3, TypeError, "test X is a int"),
    ("test", (), ValueError, r"test must be a pair \(X, y\) or a dataset, not 0 things"),
    ("test", (torch.zeros(2, 6),), ValueError, "not 1 things"),
    ("test", (torch.zeros(2, 6), torch.zeros(2), None), ValueError, "not 3 things"),
    ("test", {"X": torch.zeros(2, 6)}, TypeError, "test X is a dict"),
    ("test", torch.zeros(2, 6), TypeError, "test y is missing"),
    ("test", (torch.zeros(0, 6).double(), torch.zeros(0).long()), ValueError, "at least one row"),
    ("test", (torch.zeros(2, 5).double(), torch.zeros(2).long()), ValueError, "an example of test X"),
    ("test", (torch.zeros(2, 6), torch.zeros(2).long()), TypeError, "test X is torch.float32"),
    ("test", [torch.zeros(2, 6).double(), torch.zeros(2).long()], RIGHT, ""),
    ("input_scale", "0.1", TypeError, "input_scale must be a number, not '0.1'"),
    ("input_scale", torch.tensor(0.1), TypeError, "input_scale must be a number, not a Tensor"),
    ("input_scale", np.array(0.1), TypeError, "input_scale must be a number, not a ndarray"),
    ("input_scale", float("nan"), ValueError, "input_scale must be a number, not nan"),
    ("input_scale", float("inf"), ValueError, "input_scale must be finite, not inf"),
    ("input_scale", float("-inf"), ValueError, "input_scale must be finite, not -inf"),
    ("input_scale", 0.1, ValueError, "input_scale is for uint8 examples, but X is torch.float64"),
]


def _named(rows):
    return [pytest.param(*row, id=f"{row[0]}-{str(row[1])[:30]}".replace("\n", " ")) for row in rows]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(("name", "value", "error", "message"), _named(ARGUMENTS))
def test_arguments_are_right_or_refused(name, value, error, message, compiled, seed):
    problem, twin = classes(seed), classes(seed)
    changes = {"compiled": compiled, name: value}
    if name in ("net", "loss", "optimizer", "X", "y"):
        arguments = vars(problem) | {name: value}
        before = problem.state()
        with pytest.raises(error, match=message) as raised:
            fastdl.fit(
                *(arguments[key] for key in ("net", "loss", "optimizer", "X", "y")),
                epochs=1, batch_size=8, progress=False, compiled=compiled,
            )  # fmt: skip
        assert "\n" not in str(raised.value)
        assert problem.state() == before
    elif error is not RIGHT:
        assert_refused(problem, message, error, **changes)
    else:
        problem.fit(**changes)
        twin.loop(**{key: int(changes[key]) for key in ("epochs", "batch_size") if key in changes})
        assert_trained_alike(problem, twin)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_scheduler_of_another_optimizer_is_refused(compiled, seed):
    problem, other = classes(seed), classes(seed)
    scheduler = torch.optim.lr_scheduler.StepLR(other.optimizer, 1)
    assert_refused(
        problem, "the scheduler belongs to another optimizer", scheduler=scheduler, compiled=compiled
    )
    # where it was made is no matter, which it steps is
    chained = torch.optim.lr_scheduler.ChainedScheduler(
        [torch.optim.lr_scheduler.StepLR(problem.optimizer, 1)], problem.optimizer
    )
    problem.fit(scheduler=chained, compiled=compiled)


def test_a_generator_of_the_users_gives_the_order(seed):
    problem, twin = classes(seed), classes(seed)
    problem.fit(epochs=1, shuffle=True, generator=torch.Generator().manual_seed(5))
    rows = torch.randperm(20, generator=torch.Generator().manual_seed(5))
    twin.X, twin.y = twin.X[rows], twin.y[rows]
    twin.loop(1)
    assert_trained_alike(problem, twin)


# option of SGD, value set in the group after construction, error, message
SGD = [
    ("lr", "0.1", TypeError, "lr of parameter group 0 must be a number, not '0.1'"),
    ("lr", None, TypeError, "lr of parameter group 0 must be a number, not None"),
    ("lr", [0.1], TypeError, "lr of parameter group 0 must be a number, not a list"),
    ("lr", 0.1j, TypeError, "lr of parameter group 0 must be a number"),
    ("lr", np.array([0.1]), TypeError, "lr of parameter group 0 must be a number"),
    ("lr", -0.1, ValueError, "lr of parameter group 0 must be 0 or more, not -0.1"),
    ("lr", float("-inf"), ValueError, "lr of parameter group 0 must be 0 or more"),
    ("lr", torch.tensor(-0.1), ValueError, "lr of parameter group 0 must be 0 or more"),
    (
        "lr",
        torch.tensor([0.1, 0.2]),
        ValueError,
        r"lr of parameter group 0 must be one number, not a tensor of shape \(2,\)",
    ),
    ("lr", torch.tensor(0.1, requires_grad=True), TypeError, "lr of parameter group 0 must be a number"),
    ("lr", torch.tensor(0.1j), TypeError, "lr of parameter group 0 must be a number"),
    ("lr", torch.tensor(0.1, device="meta"), TypeError, "lr of parameter group 0 must be a number"),
    ("lr", torch.tensor(0.05), RIGHT, ""),
    ("lr", torch.tensor([0.05]), RIGHT, ""),
    ("lr", torch.tensor([[0.05]], dtype=torch.float64), RIGHT, ""),
    ("lr", np.float32(0.05), RIGHT, ""),
    ("lr", np.float64(0.05), RIGHT, ""),
    ("lr", 0, RIGHT, ""),
    ("lr", 1, RIGHT, ""),
    ("lr", True, RIGHT, ""),
    ("lr", float("inf"), RIGHT, ""),
    ("lr", float("nan"), ValueError, "lr of parameter group 0 must be 0 or more, not nan"),
    ("dampening", float("nan"), ValueError, "dampening of parameter group 0 must be a number, not nan"),
    ("momentum", "0.9", TypeError, "momentum of parameter group 0 must be a number"),
    ("momentum", float("nan"), ValueError, "momentum of parameter group 0 must be 0 or more, not nan"),
    (
        "weight_decay",
        float("nan"),
        ValueError,
        "weight_decay of parameter group 0 must be 0 or more, not nan",
    ),
    ("momentum", -0.1, ValueError, "momentum of parameter group 0 must be 0 or more"),
    ("momentum", torch.tensor([0.9, 0.8]), ValueError, "momentum of parameter group 0"),
    ("momentum", torch.tensor(0.9, dtype=torch.float64), RIGHT, ""),
    ("momentum", 1.5, RIGHT, ""),
    ("momentum", 0, RIGHT, ""),
    ("dampening", "0", TypeError, "dampening of parameter group 0 must be a number"),
    (
        "dampening",
        torch.tensor(0.5),
        TypeError,
        "dampening of parameter group 0 must be a number, not a Tensor",
    ),
    ("dampening", -1.0, RIGHT, ""),
    ("dampening", 2, RIGHT, ""),
    ("weight_decay", "x", TypeError, "weight_decay of parameter group 0 must be a number"),
    ("weight_decay", -1e-9, ValueError, "weight_decay of parameter group 0 must be 0 or more"),
    ("weight_decay", torch.tensor(0.1, dtype=torch.float64), RIGHT, ""),
    ("weight_decay", 0.1, RIGHT, ""),
    ("nesterov", "yes", TypeError, "nesterov of parameter group 0 must be True or False, not 'yes'"),
    ("nesterov", 2, TypeError, "nesterov of parameter group 0 must be True or False"),
    ("nesterov", torch.tensor(True), TypeError, "nesterov of parameter group 0 must be True or False"),
    ("nesterov", True, RIGHT, ""),
    ("nesterov", np.True_, RIGHT, ""),
    ("maximize", None, TypeError, "maximize of parameter group 0 must be True or False, not None"),
    ("maximize", True, RIGHT, ""),
    ("foreach", True, RIGHT, ""),
    ("fused", True, RIGHT, ""),
]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(("option", "value", "error", "message"), _named(SGD))
def test_options_of_sgd_are_right_or_refused(option, value, error, message, compiled, seed):
    problem, twin = classes(seed), classes(seed)
    for each in (problem, twin):
        each.optimizer.param_groups[0][option] = copy.deepcopy(value)
    if error is not RIGHT:
        assert_refused(problem, message, error, compiled=compiled)
        return
    problem.fit(compiled=compiled)
    twin.loop()
    assert_trained_alike(problem, twin, **FLOAT64, equal_nan=True)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    "options", [{"nesterov": True, "momentum": 0.0}, {"nesterov": True, "dampening": 0.5}], ids=str
)
def test_nesterov_needs_what_its_constructor_asks_for(options, compiled, seed):
    problem = classes(seed)
    problem.optimizer.param_groups[0].update(options)
    assert_refused(problem, "nesterov of parameter group 0 needs a momentum", compiled=compiled)


def test_an_option_that_is_gone_is_named(seed):
    problem = classes(seed)
    del problem.optimizer.param_groups[0]["momentum"]
    assert_refused(problem, "momentum of parameter group 0 must be a number, not None", TypeError)


# option of cross entropy, value set after construction, error, message
LOSS = [
    ("label_smoothing", 1.5, ValueError, "label_smoothing must be from 0 to 1, not 1.5"),
    ("label_smoothing", -0.1, ValueError, "label_smoothing must be from 0 to 1"),
    ("label_smoothing", float("nan"), ValueError, "label_smoothing must be from 0 to 1, not nan"),
    ("label_smoothing", "0.1", TypeError, "label_smoothing must be a number, not '0.1'"),
    ("label_smoothing", None, TypeError, "label_smoothing must be a number, not None"),
    ("label_smoothing", torch.tensor(0.1), TypeError, "label_smoothing must be a number, not a Tensor"),
    ("label_smoothing", 1, RIGHT, ""),
    ("label_smoothing", np.float64(0.1), RIGHT, ""),
    ("label_smoothing", 0.3, RIGHT, ""),
    ("ignore_index", None, TypeError, "ignore_index must be an integer, not None"),
    ("ignore_index", 1 << 70, ValueError, "ignore_index must be from"),
    ("ignore_index", -(1 << 63) - 1, ValueError, "ignore_index must be from"),
    ("ignore_index", True, TypeError, "ignore_index must be an integer, not True"),
    ("ignore_index", 1.0, TypeError, "ignore_index must be an integer, not 1.0"),
    ("ignore_index", "1", TypeError, "ignore_index must be an integer, not '1'"),
    ("ignore_index", np.int64(1), RIGHT, ""),
    ("ignore_index", torch.tensor(1), RIGHT, ""),
    ("ignore_index", 1, RIGHT, ""),
    ("ignore_index", (1 << 63) - 1, RIGHT, ""),
    ("reduction", "foo", ValueError, "reduction 'foo': training needs"),
    ("reduction", "none", ValueError, "reduction 'none': training needs 'mean' or 'sum'"),
    ("reduction", None, ValueError, "reduction None: training needs"),
    ("reduction", "sum", RIGHT, ""),
]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(("option", "value", "error", "message"), _named(LOSS))
def test_options_of_cross_entropy_are_right_or_refused(option, value, error, message, compiled, seed):
    problem, twin = classes(seed), classes(seed)
    for each in (problem, twin):
        setattr(each.loss, option, value)
    if error is not RIGHT:
        assert_refused(problem, message, error, compiled=compiled)
        return
    problem.fit(compiled=compiled)
    twin.loop()
    assert_trained_alike(problem, twin)


CLASS_WEIGHTS = {
    "another dtype": (torch.ones(3), "torch.float32"),
    "too many": (torch.ones(4).double(), r"shape \(4,\)"),
    "one": (torch.ones(1).double(), r"shape \(1,\)"),
    "two dimensions": (torch.ones(1, 3).double(), r"shape \(1, 3\)"),
    "on meta": (torch.ones(3, device="meta").double(), "meta"),
    "with a gradient": (torch.ones(3, requires_grad=True, dtype=torch.float64), "gradient"),
    "sparse": (torch.ones(3).double().to_sparse(), "layout"),
    "zeros alone": (torch.zeros(3).double(), None),
    "zeros among them": (torch.tensor([0.0, 1.0, 2.0]).double(), None),
    "every second of six": (torch.tensor([0.1, 9.0, 1.0, 9.0, 2.0, 9.0]).double()[::2], None),
}


@pytest.mark.parametrize("name", CLASS_WEIGHTS)
def test_class_weights_are_right_or_refused(name, seed):
    weight, message = CLASS_WEIGHTS[name]
    problem, twin = (classes(seed, loss=nn.CrossEntropyLoss(weight=weight)) for _ in range(2))
    if message is not None:
        assert_refused(problem, f"class weight.*{message}.*compiled=False")
        return
    problem.fit()
    twin.loop()
    assert_trained_alike(problem, twin, **FLOAT64, equal_nan=True)


@pytest.mark.parametrize("reduction", ["foo", "none", None, 3])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_squared_error_that_is_not_reduced_is_refused(reduction, compiled, seed):
    problem = regression(seed)
    problem.loss.reduction = reduction
    assert_refused(problem, "reduction", compiled=compiled)


@pytest.mark.parametrize("scale", [0.01, 1, 0, -0.5, np.float32(0.25), Fraction(1, 4)], ids=str)
@pytest.mark.parametrize("compiled", [True, False])
def test_an_input_scale_is_any_finite_number(scale, compiled, seed):
    problem, twin = classes(seed), classes(seed)
    problem.X = (problem.X.abs() * 40).to(torch.uint8)
    twin.X = problem.X.double() * float(scale)
    problem.fit(input_scale=scale, compiled=compiled)
    twin.loop()
    assert_trained_alike(problem, twin)


# few steps of float32, each a sum of some ten terms of size 1: a few dozen roundings of 6e-8
FLOAT32 = {"rtol": 2e-5, "atol": 2e-6}
VARIANTS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.5},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "weight decay": {"weight_decay": 0.1},
    "maximize": {"maximize": True},
    "all": {"momentum": 0.5, "nesterov": True, "weight_decay": 0.05, "maximize": True},
    "lr of a tensor": {"lr": torch.tensor(0.05)},
    "groups": {},
    "class weights": {},
    "smoothing": {},
    "ignored": {},
    "sum": {"lr": 0.005},
    "scheduler": {"momentum": 0.9},
}
# what each is like without the option: what an engine that ignores it would compute
WITHOUT = {"dampening": "momentum", "nesterov": "momentum", "scheduler": "momentum"}


def _variant(name, seed, dtype, widths):
    options = {"momentum": 0.0} | VARIANTS[name]
    problem = classes(seed, dtype, widths, 40, **copy.deepcopy(options))
    first, *others = problem.net.parameters()
    if name == "groups":
        problem.optimizer = torch.optim.SGD(
            [{"params": [first], "lr": 0.02, "momentum": 0.5}, {"params": others, "weight_decay": 0.1}],
            lr=0.1,
        )
    weight = torch.tensor([0.2, 1.0, 3.0], dtype=dtype)
    losses = {
        "class weights": {"weight": weight},
        "smoothing": {"label_smoothing": 0.2},
        "ignored": {"ignore_index": 1},
        "sum": {"reduction": "sum"},
    }
    problem.loss = nn.CrossEntropyLoss(**losses.get(name, {}))
    return problem


def _steps(problem, name):
    if name != "scheduler":
        return {}
    return {"scheduler": torch.optim.lr_scheduler.StepLR(problem.optimizer, 1, 0.5)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("widths", [(6, 3), (6, 20, 3)], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_each_option_trains_as_in_torchs_loop_in_both_dtypes(name, widths, dtype, seed):
    ours, torchs = (_variant(name, seed, dtype, widths) for _ in range(2))
    tolerance = FLOAT32 if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-13}
    ours.fit(**_steps(ours, name))
    scheduler = _steps(torchs, name).get("scheduler")
    torchs.loop(2, lambda _: scheduler and scheduler.step())
    assert_trained_alike(ours, torchs, **tolerance)
    if name == "plain":
        return
    # an engine that ignores the option is a hundred times beyond the tolerance
    other = _variant(WITHOUT.get(name, "plain"), seed, dtype, widths)
    other.loop()
    errors = [
        ((a - b).abs() / (tolerance["atol"] + tolerance["rtol"] * b.abs())).max()
        for a, b in zip(other.net.parameters(), torchs.net.parameters(), strict=True)
    ]
    assert max(errors) > 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9, "dampening": 0.5}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}],
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_regression_has_every_option_in_both_dtypes(options, reduction, dtype, seed):
    ours, torchs = (regression(seed, dtype, **({"lr": 0.01, "momentum": 0.0} | options)) for _ in range(2))
    for each in (ours, torchs):
        each.loss.reduction = reduction
        each.fit() if each is ours else each.loop()
    tolerance = FLOAT32 if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-13}
    assert_trained_alike(ours, torchs, **tolerance)
