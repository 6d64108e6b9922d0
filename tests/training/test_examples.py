"""What `fit`, `evaluate` and `predict` take as data: every kind of array and tensor, right or refused."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import fastdl
from fastdl.training.examples import checked
from tests.training.problems import Problem, assert_refused, assert_trained_alike, classes, regression


class _Tensor(torch.Tensor):
    pass


def _read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def _misaligned(array):
    memory = np.zeros(array.nbytes + 1, np.uint8)
    view = memory[1:].view(array.dtype).reshape(array.shape)
    view[:] = array
    assert not view.flags.aligned
    return view


def _negative(tensor):
    view = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert view.is_neg()
    return view


# how X is handed over, from a float64 tensor; what the compiled engine says, and the loop; None trains right
X_KINDS = {
    "array": (lambda X: X.numpy(), None, None),
    "read-only": (lambda X: _read_only(X.numpy()), None, None),
    "other byte order": (lambda X: X.numpy().astype(">f8"), None, None),
    "backwards": (lambda X: X.numpy()[::-1].copy()[::-1], None, None),
    "every second": (lambda X: X.numpy().repeat(2, 0)[::2], None, None),
    "columns first": (lambda X: np.asfortranarray(X.numpy()), None, None),
    "misaligned": (lambda X: _misaligned(X.numpy()), None, None),
    "a matrix": (lambda X: X.numpy().view(np.matrix), None, None),
    "transposed": (lambda X: X.T.contiguous().T, None, None),
    "negative view": (_negative, None, None),
    "a Parameter": (lambda X: nn.Parameter(X, requires_grad=False), None, None),
    "in inference mode": (lambda X: _in_inference(X), None, None),
    "with a gradient": (lambda X: X.requires_grad_(), r"X.*requires a gradient, unlike X\.detach\(\)", None),
    "a subclass": (lambda X: X.as_subclass(_Tensor), "X.*_Tensor", None),
    "masked": (lambda X: np.ma.masked_greater(X.numpy(), 0.5), "masked array", "masked array"),
    "float32": (lambda X: X.float(), "X is torch.float32", "X is torch.float32"),
    "float16": (lambda X: X.numpy().astype(np.float16), "X is torch.float16", "X is torch.float16"),
    "uint16": (lambda X: X.numpy().astype(np.uint16), "torch.uint16", "UInt16|dtype|not implemented"),
    "bool": (lambda X: X.numpy() > 0, "torch.bool", "dtype|Bool"),
    "int64": (lambda X: X.long(), "torch.int64", "dtype|Long"),
    "complex": (lambda X: X.to(torch.complex128), "complex128", "dtype|Complex"),
    "sparse": (lambda X: X.to_sparse(), "layout", None),
    "quantised": (
        lambda X: torch.quantize_per_tensor(X.float(), 0.1, 0, torch.quint8),
        "quint8",
        ".",
    ),
    "on meta": (lambda X: X.to("meta"), "meta", "."),
    "nested": (lambda X: torch.nested.nested_tensor(list(X)), "nested tensor", "nested tensor"),
    "objects": (lambda X: X.numpy().astype(object), "object_", "object_"),
    "text": (lambda X: X.numpy().astype(str), "str_", "str_"),
    "at an odd address": (lambda X: torch.from_numpy(_misaligned(X.numpy())), "aligned", None),
    "one number": (lambda X: X[0, 0], "at least one row", "at least one row"),
    "no rows": (lambda X: X[:0], "at least one row", "at least one row"),
}


def _in_inference(tensor):
    with torch.inference_mode():
        return tensor.clone()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:.*quantiz", "ignore:the matrix")
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("name", X_KINDS)
def test_examples_of_every_kind_are_right_or_refused(name, compiled, seed):
    make, *messages = X_KINDS[name]
    problem, twin = classes(seed), classes(seed)
    X = make(problem.X.clone())
    problem.X = X
    if messages[not compiled] is None:
        problem.fit(compiled=compiled)
        twin.loop()
        assert_trained_alike(problem, twin)
        return
    before = problem.state()
    with pytest.raises((TypeError, ValueError, RuntimeError), match=messages[not compiled]):
        fastdl.fit(
            problem.net, problem.loss, problem.optimizer, X, problem.y, epochs=1, batch_size=8,
            shuffle=False, progress=False, compiled=compiled,
        )  # fmt: skip
    assert problem.state()[:5] == before[:5]


def test_the_loop_gives_X_its_gradient_as_torch_does(seed):
    problem, twin = classes(seed), classes(seed)
    for each in (problem, twin):
        each.X.requires_grad_()
    problem.fit(compiled=False)
    twin.loop()
    torch.testing.assert_close(problem.X.grad, twin.X.grad)


Y_KINDS = {
    "int32": (lambda y: y.int(), None),
    "uint8": (lambda y: y.numpy().astype(np.uint8), None),
    "uint16": (lambda y: y.numpy().astype(np.uint16), None),
    "other byte order": (lambda y: y.numpy().astype(">i4"), None),
    "read-only": (lambda y: _read_only(y.numpy()), None),
    "every second": (lambda y: y.repeat_interleave(2)[::2], None),
    "backwards": (lambda y: y.numpy()[::-1].copy()[::-1], None),
    "a subclass": (lambda y: y.as_subclass(_Tensor), "y.*_Tensor"),
    "masked": (lambda y: np.ma.masked_equal(y.numpy(), 1), "masked array"),
    "complex": (lambda y: y.to(torch.complex64), "complex64"),
    "probabilities": (lambda y: nn.functional.one_hot(y, 3).double(), "one class for each example"),
    "a column": (lambda y: y[:, None], "one class for each example"),
    "float32": (lambda y: y.float(), "y is torch.float32"),
    "short": (lambda y: y[:-1], "one row for each example"),
    "one": (lambda y: y[0], "one row for each example"),
    "out of range": (lambda y: y.index_fill(0, torch.tensor(7), 3), "Target 3 is out of bounds: row 7"),
    "negative": (lambda y: y.index_fill(0, torch.tensor(7), -1), "Target -1 is out of bounds: row 7"),
    "on meta": (lambda y: y.to("meta"), "meta"),
}


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("name", Y_KINDS)
def test_labels_of_every_kind_are_right_or_refused(name, part, seed):
    make, message = Y_KINDS[name]
    problem, twin = classes(seed), classes(seed)
    y = make(problem.y.clone())
    test = (problem.X.clone(), problem.y.clone() if part == "train" else y)
    if part == "train":
        problem.y = y
    if message is not None:
        assert_refused(problem, message, (TypeError, ValueError, IndexError), test=test)
        return
    history = problem.fit(test=test)
    twin.loop()
    assert_trained_alike(problem, twin)
    expected = fastdl.evaluate(twin.net, twin.X, twin.y)
    assert history.test_loss[-1] == pytest.approx(expected.loss, rel=1e-10)


def test_a_file_in_memory_trains_without_a_copy_and_without_a_warning(tmp_path, seed):
    problem, twin = classes(seed), classes(seed)
    np.save(tmp_path / "X.npy", problem.X.numpy())
    problem.X = np.load(tmp_path / "X.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        X, _ = checked(next(problem.net.parameters()), problem.X, problem.y)
    assert X.data_ptr() == problem.X.ctypes.data
    problem.fit(test=(problem.X, problem.y))
    twin.loop()
    assert_trained_alike(problem, twin)
    # nobody else holds the memory
    del problem.X
    assert X.sum().isfinite()


def test_a_net_that_works_in_place_leaves_the_data_alone(tmp_path, seed):
    np.save(tmp_path / "X.npy", np.float64(np.random.default_rng(seed).normal(size=(20, 6))))
    X, y = np.load(tmp_path / "X.npy", mmap_mode="r"), torch.zeros(20, dtype=torch.long)
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 3)).double()
    before = X.copy()
    expected = net[1](torch.from_numpy(before).relu())
    torch.testing.assert_close(fastdl.predict(net, X), expected.detach())
    loss = nn.CrossEntropyLoss()
    assert fastdl.evaluate(net, X, y).loss == pytest.approx(loss(expected, y).item())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    Problem(net, loss, optimizer, X, y).fit(compiled=False, test=(X, y))
    assert (before == X).all()


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("scale", [None, 0.01])
@pytest.mark.parametrize("kinds", [("uint8", "float"), ("float", "uint8"), ("uint8", "uint8")], ids=str)
def test_each_set_is_read_as_its_own_dtype_says(kinds, scale, compiled, seed):
    problem, twin = classes(seed, rows=300), classes(seed, rows=300)
    pixels = (problem.X.abs() * 60).to(torch.uint8)
    scaled = pixels.double() * (1 / 255 if scale is None else scale)
    train, test = (pixels if kind == "uint8" else scaled for kind in kinds)
    problem.X = train
    history = problem.fit(
        epochs=1, batch_size=100, test=(test, problem.y), input_scale=scale, compiled=compiled
    )
    twin.X = scaled
    twin.loop(1, batch_size=100)
    assert_trained_alike(problem, twin)
    expected = fastdl.evaluate(twin.net, scaled, twin.y)
    # sums of other order
    assert history.test_loss == pytest.approx([expected.loss], rel=1e-10)
    assert history.test_accuracy == [expected.accuracy]


@pytest.mark.parametrize("compiled", [True, False])
def test_targets_of_a_test_set_must_fit_too(compiled, seed):
    problem = regression(seed)
    test = (problem.X, problem.y[:, 0])
    assert_refused(problem, r"gives \(1,\) for an example, but test y has \(\)", test=test, compiled=compiled)
    test = (problem.X, problem.y.repeat(1, 2))
    assert_refused(problem, r"test y has \(2,\)", test=test, compiled=compiled)
