"""What needs a GPU to be checked: parity, autograd, compilers, streams, graphs. ``pytest -m gpu`` runs it."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from fastdl import functional, models
from fastdl.nn import CrossEntropyLoss
from fastdl.optim import SGD
from tests.ops.test_registration import _samples
from tests.parity import assert_as_accurate_as_torch

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("seed")]

# around the edges of the tiles, skinny products, and products that are torch's own
SIZES = [
    (1, 1, 1),
    (10, 2, 1),
    (256, 784, 10),
    (256, 784, 256),
    (33, 65, 31),
    (1000, 17, 130),
    (0, 5, 3),
    (5, 0, 3),
]
SIZES += [(2048, 300, 260), (512, 1024, 1024)]


@pytest.fixture(autouse=True)
def true_float32():
    """Compare float32 with float32: no TF32."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(precision)


def _layer(n, k, m, dtype):
    return tuple(torch.randn(shape, dtype=dtype, device=DEVICE) for shape in ((n, k), (m, k), (m,)))


def _results(function, inputs, upstream):
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = function(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream.to(output.dtype))]


def _assert_parity(ours, torchs, inputs, names):
    upstream = torch.randn_like(torchs(*inputs))
    results = [_results(function, inputs, upstream) for function in (ours, torchs)]
    truths = _results(torchs, [tensor.double() for tensor in inputs], upstream)
    for name, actual, expected, truth in zip(names, *results, truths, strict=True):
        assert_as_accurate_as_torch(actual, expected, truth, name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.usefixtures("uninitialised_is_nan")
def test_linear_relu_and_its_gradients(sizes, dtype):
    def torchs(*layer):
        return F.relu(F.linear(*layer))

    names = ("output", "grad_input", "grad_weight", "grad_bias")
    _assert_parity(functional.linear_relu, torchs, _layer(*sizes, dtype), names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("sizes", [(1, 1), (256, 10), (1000, 130), (70000, 10), (64, 5000)], ids=str)
@pytest.mark.usefixtures("uninitialised_is_nan")
def test_cross_entropy_and_its_gradient(sizes, reduction, dtype):
    target = torch.randint(sizes[1], sizes[:1], device=DEVICE)
    target[::7] = -100
    weight = torch.rand(sizes[1], dtype=dtype, device=DEVICE)
    logits = (torch.randn(sizes, dtype=dtype, device=DEVICE),)
    for smoothing, chosen in ((0.0, None), (0.1, weight)):

        def call(function, x, smoothing=smoothing, chosen=chosen):
            weight = None if chosen is None else chosen.to(x.dtype)
            return function(x, target, weight, reduction=reduction, label_smoothing=smoothing)

        _assert_parity(
            lambda x, call=call: call(functional.cross_entropy, x),
            lambda x, call=call: call(F.cross_entropy, x),
            logits,
            ("loss", "grad_logits"),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("size", [1, 1001, 5_000_000])
@pytest.mark.usefixtures("uninitialised_is_nan")
def test_mse_loss_and_relu(size, reduction, dtype):
    def ours(x, y):
        return functional.mse_loss(functional.relu(x), y, reduction=reduction)

    def torchs(x, y):
        return F.mse_loss(F.relu(x), y, reduction=reduction)

    inputs = tuple(torch.randn(size, dtype=dtype, device=DEVICE) for _ in range(2))
    _assert_parity(ours, torchs, inputs, ("loss", "grad_input", "grad_target"))


def _double_layer():
    return [tensor.requires_grad_() for tensor in _layer(5, 4, 3, torch.float64)]


def test_gradcheck_and_gradgradcheck():
    target = torch.tensor([0, 2, -100, 1, 1], device=DEVICE)

    def function(x, w, b):
        return functional.cross_entropy(functional.linear_relu(x, w, b), target)

    assert torch.autograd.gradcheck(function, _double_layer())
    assert torch.autograd.gradgradcheck(function, _double_layer())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(dtype):
    def moved(argument):
        if isinstance(argument, list):
            return [moved(each) for each in argument]
        return argument.to(DEVICE) if isinstance(argument, torch.Tensor) else argument

    for name, arguments in _samples(dtype):
        opcheck(getattr(torch.ops.fastdl, name).default, tuple(moved(argument) for argument in arguments))


def _problem(batch=256):
    torch.manual_seed(0)
    net = models.MLP(784, 10, 256).to(DEVICE)
    X, y = torch.rand(batch, 784, device=DEVICE), torch.randint(10, (batch,), device=DEVICE)
    return net, X, y


def _steps(net, X, y, count, **options):
    optimizer, loss = SGD(net.parameters(), **({"lr": 0.1} | options)), CrossEntropyLoss()
    for _ in range(count):
        optimizer.zero_grad()
        loss(net(X), y).backward()
        optimizer.step()
    return [param.detach().clone() for param in net.parameters()]


def test_a_compiled_step_has_no_graph_break_and_the_same_numbers():
    net, X, y = _problem()

    @torch.compile(fullgraph=True)
    def loss(X, y):
        return functional.cross_entropy(net(X), y)

    expected = functional.cross_entropy(net(X), y)
    torch.testing.assert_close(loss(X, y), expected)
    compiled = torch.autograd.grad(loss(X, y), list(net.parameters()))
    eager = torch.autograd.grad(expected, list(net.parameters()))
    torch.testing.assert_close(compiled, eager)


def test_runs_are_bit_identical():
    first, second = (_steps(*_problem(), 5, momentum=0.9, weight_decay=0.01) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_another_stream_and_another_thread_compute_the_same():
    expected = _steps(*_problem(), 3)
    stream, results = torch.cuda.Stream(), []
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results.append(_steps(*_problem(), 3))
    torch.cuda.current_stream().wait_stream(stream)
    thread = threading.Thread(target=lambda: results.append(_steps(*_problem(), 3)))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert len(results) == 2
    for params in results:
        assert all(torch.equal(one, other) for one, other in zip(params, expected, strict=True))


def test_work_waits_for_its_own_stream():
    stream = torch.cuda.Stream()
    x = torch.zeros(1 << 24, device=DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(1.0)
        # on the default stream this would overtake the fill
        y = functional.relu(x)
    torch.cuda.synchronize()
    assert (y == 1).all()


def test_a_whole_training_step_is_captured_in_a_graph():
    expected = _steps(*_problem(), 5, momentum=0.9)
    net, X, y = _problem()
    optimizer, loss = SGD(net.parameters(), lr=0.1, momentum=0.9), CrossEntropyLoss()

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss(net(X), y).backward()
        optimizer.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        loss(net(X), y).backward()
        optimizer.step()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    for actual, wanted in zip(net.parameters(), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_autocast_is_torchs():
    x, w, b = _layer(8, 8, 8, torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert functional.linear(x, w, b).dtype == F.linear(x, w, b).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_zeros_have_the_sign_that_torch_gives_them(dtype):
    x = torch.tensor([-0.0, 0.0, -1.0, 1.0, -0.0], dtype=dtype, device=DEVICE)
    assert torch.equal(functional.relu(x).signbit(), F.relu(x).signbit())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("last", [0.0, 1.0])
@pytest.mark.parametrize("num_rows", [3, 70000])
def test_class_weights_of_zero_give_nan_as_in_torch(num_rows, last, smoothing):
    target = torch.zeros(num_rows, dtype=torch.int64, device=DEVICE)
    # no row of the class that has a weight: the mean divides by 0
    weight = torch.tensor([0.0, 0.0, last], device=DEVICE)
    results = []
    for function in (functional.cross_entropy, F.cross_entropy):
        logits = torch.linspace(-1, 1, 3 * num_rows, device=DEVICE).reshape(num_rows, 3).requires_grad_()
        loss = function(logits, target, weight, label_smoothing=smoothing)
        results.append([loss.detach(), *torch.autograd.grad(loss, logits)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.isnan().all()
        assert theirs.isnan().all()


def test_an_invalid_label_gives_nan_and_a_zero_row_and_leaves_the_gpu_usable():
    logits = torch.randn(4, 10, device=DEVICE, requires_grad=True)
    target = torch.tensor([1, 10, -7, 2**40], device=DEVICE)
    functional.cross_entropy(logits, target, reduction="sum").backward()
    torch.cuda.synchronize()
    assert (logits.grad[1:] == 0).all()
    assert (logits.grad[0] != 0).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.5, "dampening": 0.3, "weight_decay": 0.1, "maximize": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_optimizer_follows_torchs(options, dtype):
    shapes = [(256, 784), (256,), (10, 256), (10,), (3, 5, 7), (0,), *[(33,)] * 70]
    params = [torch.nn.Parameter(torch.randn(shape, dtype=dtype, device=DEVICE)) for shape in shapes]
    twins = [torch.nn.Parameter(param.detach().clone()) for param in params]
    ours, torchs = SGD(params, lr=0.1, **options), torch.optim.SGD(twins, lr=0.1, **options)
    for _ in range(3):
        for param, twin in zip(params, twins, strict=True):
            param.grad = torch.randn_like(param)
            twin.grad = param.grad.clone()
        ours.step()
        torchs.step()
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param, twin)


def test_a_gpu_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device: the tensor's GPU was always the current one")
    x, w, b = (tensor.to("cuda:1") for tensor in _layer(40, 50, 60, torch.float32))
    torch.cuda.set_device(0)
    torch.testing.assert_close(functional.linear_relu(x, w, b), F.relu(F.linear(x, w, b)))
