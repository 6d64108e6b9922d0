"""``fit`` on CUDA in the simulator: CPU tensors stand for the GPU's, torch's streams and graphs are replaced.

What is real: the program, its examples, the launches' arguments, the kernels. A captured graph is a list of
calls. Everything is compared with the Python loop in float64.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import fastdl
from fastdl.training import cuda_examples, cuda_program, engines, evaluation, program, small
from fastdl.training.lower import UnsupportedError, lower
from tests.kernels.cuda.simulated.simulator import LAUNCHES, STREAM, DeviceArray

# sums of other order, over a whole run: the rule of the convergence tests in float64
FLOAT64 = {"rtol": 1e-10, "atol": 1e-10}


def _moved(argument):
    if isinstance(argument, torch.Tensor):
        return DeviceArray.of(argument)
    if isinstance(argument, tuple) and hasattr(argument, "_fields"):
        return type(argument)(*map(_moved, argument))
    return list(map(_moved, argument)) if isinstance(argument, list) else argument


class _Event:
    """An event that is over at once; it keeps what waited for it."""

    interrupt = False

    def __init__(self):
        self.records = 0

    def record(self):
        self.records += 1

    def synchronize(self):
        pass

    def query(self):
        if _Event.interrupt:
            raise KeyboardInterrupt
        return True


class _Resident(cuda_examples.Resident):
    """Examples that were copied to the GPU, as CPU tensors are not copied to the CPU."""

    def __init__(self, X, y, device):
        super().__init__(X.clone(), y.clone(), device)


class _Gpu:
    """What is replaced of torch.cuda, and where kernels go: to the simulator, or into a graph."""

    def __init__(self):
        self.graphs, self.capturing, self.free = [], None, 1 << 30
        self.synchronized = 0
        self.stream_of_waits = []
        self.Event = _Event
        self.device = lambda device: contextlib.nullcontext()
        self.Stream = lambda device: SimpleNamespace(wait_event=self.stream_of_waits.append)
        self.stream = contextlib.nullcontext
        self.current_stream = lambda: SimpleNamespace(wait_event=self.stream_of_waits.append)
        self.mem_get_info = lambda device: (self.free, 1 << 40)
        self.memory_reserved = self.memory_allocated = lambda device: 0

    def synchronize(self):
        self.synchronized += 1

    def CUDAGraph(self):
        graph = SimpleNamespace(calls=[], replays=0)

        def replay():
            graph.replays += 1
            for kernel, arguments in graph.calls:
                kernel(*map(_moved, arguments), STREAM)

        graph.replay = replay
        self.graphs.append(graph)
        return graph

    @contextlib.contextmanager
    def graph(self, graph, stream, capture_error_mode):
        assert LAUNCHES, "the kernels are loaded before a capture"
        self.capturing = graph
        yield
        self.capturing = None

    def run(self, like, kernel, *arguments):
        if self.capturing is not None:
            self.capturing.calls.append((kernel, arguments))
        else:
            kernel(*map(_moved, arguments), STREAM)


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    gpu = _Gpu()
    for module in (cuda_examples, cuda_program):
        monkeypatch.setattr(module, "cuda", gpu)
        monkeypatch.setattr(module, "pinned_memory", lambda shape, dtype: torch.empty(shape, dtype=dtype))
    monkeypatch.setattr(cuda_program, "run", gpu.run)
    monkeypatch.setattr(cuda_program, "_EVALUATION_ROWS", 4)
    for module, name in ((program, "Program"), (small, "SmallProgram")):
        monkeypatch.setattr(module, name, cuda_program.CudaProgram)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(_Event, "interrupt", False)
    # every example on the stand-in is a copy, as those on a GPU are
    monkeypatch.setattr(cuda_examples, "is_there", lambda tensor, device: False)
    monkeypatch.setattr(cuda_examples, "Resident", _Resident)
    LAUNCHES.clear()
    return gpu


def _net(*widths):
    layers = []
    for sizes in itertools.pairwise(widths):
        layers += [nn.Linear(*sizes), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


def _images(num=10, num_inputs=7, num_classes=3):
    return (
        torch.randint(0, 256, (num, num_inputs), dtype=torch.uint8),
        torch.randint(num_classes, (num,)),
    )


def _both(net, X, y, *, loss=None, options=None, scheduler=None, **settings):
    """Train on the stand-in and in the Python loop; return (net, history, optimizer, generator) of each."""
    loss = nn.CrossEntropyLoss() if loss is None else loss
    settings = {"epochs": 2, "batch_size": 4, "progress": False} | settings
    results = []
    for compiled in (True, False):
        twin = copy.deepcopy(net)
        optimizer = torch.optim.SGD(twin.parameters(), **({"lr": 0.1} | (options or {})))
        generator = torch.Generator().manual_seed(0)
        history = fastdl.fit(
            twin, loss, optimizer, X, y, compiled=compiled, generator=generator,
            scheduler=scheduler(optimizer) if scheduler else None, **settings,
        )  # fmt: skip
        results.append((twin, history, optimizer, generator))
    return results


def _assert_same(results, *, equal_nan=False):
    (net, history, optimizer, generator), (loop_net, loop_history, loop_optimizer, loop_generator) = results
    for ours, theirs in zip(net.parameters(), loop_net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **FLOAT64, equal_nan=equal_nan)
        for key, value in loop_optimizer.state[theirs].items():
            if value is not None:
                torch.testing.assert_close(optimizer.state[ours][key], value, **FLOAT64)
    figures, loop_figures = history.figures(), loop_history.figures()
    assert figures.keys() == loop_figures.keys()
    for name in figures.keys() - {"seconds"}:
        np.testing.assert_allclose(figures[name], loop_figures[name], rtol=1e-9, atol=1e-12, err_msg=name)
    assert torch.equal(generator.get_state(), loop_generator.get_state())


@pytest.mark.parametrize("widths", [(7, 3), (7, 5, 3)], ids=str)
def test_classifiers_train_as_in_the_loop_from_one_capture(widths, seed, gpu):
    X, y = _images()
    net = _net(*widths)
    options = {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.01}

    def scheduler(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    _assert_same(_both(net, X, y, options=options, scheduler=scheduler, test=_images(5), epochs=3))
    assert [graph.replays for graph in gpu.graphs] == [3]
    assert len(gpu.graphs[0].calls) == 3, "three steps, the last of two rows"


def test_linear_regression_is_one_launch_an_epoch(seed, gpu):
    X, y = torch.randn(11, 2, dtype=torch.float64), torch.randn(11, 1, dtype=torch.float64)
    net = nn.Linear(2, 1).double()
    options = {"momentum": 0.9, "dampening": 0.1}
    _assert_same(_both(net, X, y, loss=nn.MSELoss(), options=options, epochs=3))
    assert LAUNCHES == ["small_epoch_float64"] * 3
    assert not gpu.graphs
    _assert_same(_both(net, X, y, loss=nn.MSELoss(reduction="sum"), options={"lr": 0.01}, test=(X, y)))


def test_an_epoch_of_many_steps_replays_the_graph_of_some(seed, gpu, monkeypatch):
    monkeypatch.setattr(cuda_program, "MAX_STEPS", 2)
    X, y = _images()
    _assert_same(_both(_net(7, 3), X, y, batch_size=3, options={"momentum": 0.5, "dampening": 0.5}))
    assert [(len(graph.calls), graph.replays) for graph in gpu.graphs] == [(2, 4)]


@pytest.mark.parametrize("drop_last", [False, True])
def test_examples_that_do_not_fit_stream_in_pieces_of_whole_batches(drop_last, seed, gpu, monkeypatch):
    X, y = _images(11)
    # two batches of two rows of 7 + 8 bytes
    monkeypatch.setattr(cuda_examples, "PIECE_BYTES", 75)
    gpu.free = 100
    options = {"momentum": 0.5, "dampening": 0.5}
    test = _images(9)
    results = _both(_net(7, 3), X, y, batch_size=2, options=options, drop_last=drop_last, test=test)
    _assert_same(results)
    assert [(len(graph.calls), graph.replays) for graph in gpu.graphs] == [(2, 6)]


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64), label_smoothing=0.2),
        nn.CrossEntropyLoss(ignore_index=1),
        nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64), reduction="sum"),
    ],
    ids=str,
)
def test_the_mean_over_rows_of_unequal_weight(loss, seed, monkeypatch):
    # evaluation too takes its means over as many rows as the loop does
    for module in (engines, evaluation):
        monkeypatch.setattr(module, "EVALUATION_ROWS", 6)
    X, y = _images()
    _assert_same(_both(_net(7, 3), X, y, loss=loss, test=_images(8), options={"lr": 0.02}, epochs=1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_ignored_row_that_is_not_finite(value, seed):
    X, y = _images(6)
    X = X.double()
    X[2] = value
    results = _both(_net(7, 3), X, torch.full_like(y, -100), shuffle=False, epochs=1)
    assert all(parameter.isnan().all() for net, *_ in results for parameter in net.parameters())


def test_the_examples_lie_as_they_are_and_parameters_in_groups_keep_their_options(seed):
    X, y = _images(6)
    net = _net(7, 4, 3)
    net[2].weight.requires_grad_(False)
    net[0].bias = None
    results = _both(net, X.reshape(6, 7), y, shuffle=False, epochs=1, input_scale=0.5, options={"lr": 0.01})
    _assert_same(results)
    assert torch.equal(results[0][0][2].weight, net[2].weight)


def test_the_next_order_is_copied_while_an_epoch_trains_and_not_again(seed, monkeypatch):
    X, y = _images(6)
    brought = []
    bring = cuda_examples.Resident._bring

    def spy(self, rows):
        brought.append(rows)
        bring(self, rows)

    monkeypatch.setattr(cuda_examples.Resident, "_bring", spy)
    net = _net(7, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    fastdl.fit(net, nn.CrossEntropyLoss(), optimizer, X, y, epochs=3, batch_size=4, progress=False)
    # the first epoch's own, and one ahead in each epoch but the last
    assert len(brought) == 3


def _fit_and_fail(error, X, y, **options):
    net = _net(7, 3)
    before = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(error):
        fastdl.fit(
            net, nn.CrossEntropyLoss(), optimizer, X, y, epochs=2, batch_size=4, progress=False, **options
        )
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not optimizer.state


def test_a_label_that_is_no_class_is_found_at_the_end_of_its_epoch(seed, monkeypatch):
    X, y = _images()
    # labels on a GPU aren't looked at before
    monkeypatch.setattr(engines, "check_labels", lambda *_: None)
    y[3] = 3
    _fit_and_fail(IndexError, X, y)


def test_ctrl_c_stops_the_steps_that_are_queued(seed, gpu, monkeypatch):
    X, y = _images()
    programs = []
    lay_out = cuda_program.CudaProgram._lay_out

    def spy(self, batch_size):
        programs.append(self)
        lay_out(self, batch_size)

    monkeypatch.setattr(cuda_program.CudaProgram, "_lay_out", spy)
    monkeypatch.setattr(_Event, "interrupt", True)
    _fit_and_fail(KeyboardInterrupt, X, y)
    assert gpu.synchronized == 1
    (stopped,) = programs
    before = [copied.own.clone() for copied in stopped._copies]
    gpu.graphs[0].replay()
    assert all(torch.equal(copied.own, kept) for copied, kept in zip(stopped._copies, before, strict=True))


def test_runs_are_bit_identical(seed):
    X, y = _images()
    net = _net(7, 5, 3).float()
    runs = [_both(net, X, y, epochs=1)[0] for _ in range(2)]
    for first, second in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True):
        assert torch.equal(first, second)
    assert runs[0][1].train_loss == runs[1][1].train_loss


def test_version_counters_notice_the_training(seed):
    X, y = _images(4)
    net = _net(7, 4, 3)
    output = net(X.double()).square().sum()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    fastdl.fit(net, nn.CrossEntropyLoss(), optimizer, X, y, epochs=1, batch_size=4, progress=False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def _as_floats(X):
    return X.double() / 255


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("train_is_uint8", [True, False])
@pytest.mark.parametrize("widths", [(7, 3), (7, 4, 35)], ids=str)
def test_train_and_test_sets_are_each_read_as_what_they_are(
    widths, train_is_uint8, streams, seed, gpu, monkeypatch
):
    if streams:
        monkeypatch.setattr(cuda_examples, "PIECE_BYTES", 300)
        gpu.free = 100
    (X, y), (test_X, test_y) = _images(num_classes=widths[-1]), _images(9, num_classes=widths[-1])
    floats = [_as_floats(X), y], [_as_floats(test_X), test_y]
    mixed = ([X, y], floats[1]) if train_is_uint8 else (floats[0], [test_X, test_y])
    net = _net(*widths)
    runs = [_both(net, *train, test=tuple(test))[0] for train, test in (mixed, floats)]
    _assert_same(runs)
    element = "uint8_" if train_is_uint8 else ""
    assert f"dense_backward_weight_16_{element}float64" in LAUNCHES


@pytest.mark.parametrize("train_is_uint8", [True, False])
@pytest.mark.parametrize("num_inputs", [2, 6])
def test_each_set_of_a_regression_has_its_own_scale(num_inputs, train_is_uint8, seed):
    X = torch.randint(0, 256, (11, num_inputs), dtype=torch.uint8)
    y = torch.randn(11, 1, dtype=torch.float64)
    train, test = (X, _as_floats(X)) if train_is_uint8 else (_as_floats(X), X)
    net, settings = nn.Linear(num_inputs, 1).double(), {"loss": nn.MSELoss(), "options": {"lr": 0.01}}
    ours = _both(net, train, y, test=(test, y), **settings)[0]
    _assert_same([ours, _both(net, _as_floats(X), y, test=(_as_floats(X), y), **settings)[0]])


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_prepared_examples_have_the_scale_that_they_were_given(scale, seed):
    X, y = _images()
    net = _net(7, 3)
    lowered = lower(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), lr=0.1), (7,))
    own = cuda_program.CudaProgram(lowered, X, y, 4, 1 / 255, 6)
    own.read()
    with torch.no_grad():
        wanted = nn.CrossEntropyLoss()(net(X.double() * scale), y).item()
    for examples, factor in ((X, scale), (X.double(), scale), (X.double() * scale, 1.0)):
        np.testing.assert_allclose(own.evaluate(own.prepare(examples, y, factor)).loss, wanted, rtol=1e-10)


def _wrong_buffers(weight):
    shape = weight.shape
    yield "shape", torch.zeros(shape[0] + 1, shape[1], dtype=weight.dtype)
    yield "transposed", torch.zeros(*reversed(shape), dtype=weight.dtype)
    yield "flat", torch.zeros(weight.numel(), dtype=weight.dtype)
    yield "broadcastable", torch.zeros(1, dtype=weight.dtype)
    yield "float32", torch.zeros(shape)
    yield "meta", torch.zeros(shape, dtype=weight.dtype, device="meta")


WRONG_BUFFERS = [kind for kind, _ in _wrong_buffers(torch.zeros(3, 7))]


@pytest.mark.parametrize("epochs_before", [0, 1])
@pytest.mark.parametrize("kind", WRONG_BUFFERS)
def test_a_momentum_buffer_that_does_not_fit_is_refused_by_name(kind, epochs_before, seed):
    X, y = _images()
    net = _net(7, 4, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    kept = []

    def spoil(history=None):
        weight = net[2].weight
        optimizer.state[weight]["momentum_buffer"] = dict(_wrong_buffers(weight))[kind]
        kept.append(copy.deepcopy((net.state_dict(), optimizer.state_dict())))

    if epochs_before == 0:
        spoil()
    with pytest.raises(UnsupportedError, match=r"the momentum buffer of 2\.weight, which "):
        fastdl.fit(
            net, nn.CrossEntropyLoss(), optimizer, X, y, epochs=2, batch_size=4, progress=False,
            on_epoch=spoil if epochs_before else None,
        )  # fmt: skip
    (state, _), *_ = kept
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert len(kept) == 1


def test_a_momentum_buffer_with_other_strides_is_read_as_what_it_is(seed):
    X, y = _images()
    net = _net(7, 3)
    runs = []
    for compiled in (True, False):
        twin = copy.deepcopy(net)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
        buffer = torch.arange(21, dtype=torch.float64).reshape(7, 3).t() / 21
        optimizer.state[twin[0].weight]["momentum_buffer"] = buffer
        fastdl.fit(
            twin, nn.CrossEntropyLoss(), optimizer, X, y, epochs=2, batch_size=4, progress=False,
            compiled=compiled, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        runs.append([*twin.parameters(), buffer])
    for ours, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(ours, theirs, **FLOAT64)


def test_an_interrupted_write_leaves_no_buffer_without_numbers(seed, monkeypatch):
    X, y = _images()
    net = _net(7, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    copies = []

    def interrupted(targets, sources):
        copies.append(len(targets))
        # the first copy reads the parameters, the second and that of fit's end write them
        if len(copies) > 1:
            raise KeyboardInterrupt
        torch._foreach_copy_(targets, sources)

    monkeypatch.setattr(cuda_program, "copy_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fastdl.fit(net, nn.CrossEntropyLoss(), optimizer, X, y, epochs=1, batch_size=4, progress=False)
    assert len(copies) > 1
    assert not optimizer.state


def _change_in_epoch(one, change):
    """Return a callback that makes a change after the first epoch."""

    def on_epoch(history):
        if len(history) == one:
            change()

    return on_epoch


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("label", [3, -1, 2**40])
def test_a_label_that_a_callback_made_invalid_ends_its_epoch_by_the_name_of_its_row(
    label, streams, seed, gpu, monkeypatch
):
    if streams:
        monkeypatch.setattr(cuda_examples, "PIECE_BYTES", 75)
        gpu.free = 100
    X, y = _images()
    net = _net(7, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    finished = []

    def change():
        finished.append(copy.deepcopy((net.state_dict(), optimizer.state_dict()["state"])))
        y[5] = label

    with pytest.raises(IndexError, match=rf"Target {label} is out of bounds: row 5"):
        fastdl.fit(
            net, nn.CrossEntropyLoss(), optimizer, X, y, epochs=3, batch_size=4, progress=False,
            on_epoch=_change_in_epoch(1, change),
        )  # fmt: skip
    ((state, buffers),) = finished
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    for key, value in optimizer.state_dict()["state"].items():
        assert torch.equal(value["momentum_buffer"], buffers[key]["momentum_buffer"])


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("what", ["label", "ignored", "example", "test label"])
def test_what_a_callback_writes_to_examples_counts_from_the_next_epoch_on(
    what, streams, seed, gpu, monkeypatch
):
    monkeypatch.setattr(engines, "EVALUATION_ROWS", 6)
    if streams:
        monkeypatch.setattr(cuda_examples, "PIECE_BYTES", 75)
        gpu.free = 100
    results, net = [], _net(7, 3)
    examples, test = _images(), _images(9)
    for compiled in (True, False):
        twin = copy.deepcopy(net)
        X, y, test_X, test_y = (each.clone() for each in (*examples, *test))

        def change(X=X, y=y, test_y=test_y):
            {"label": y, "ignored": y, "example": X, "test label": test_y}[what][:4] = {"ignored": -100}.get(
                what, 1
            )

        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
        generator = torch.Generator().manual_seed(0)
        history = fastdl.fit(
            twin, nn.CrossEntropyLoss(), optimizer, X, y, epochs=3, batch_size=4, progress=False,
            compiled=compiled, generator=generator, test=(test_X, test_y),
            on_epoch=_change_in_epoch(1, change),
        )  # fmt: skip
        results.append((twin, history, optimizer, generator))
    _assert_same(results)


@pytest.mark.parametrize("last", [0.0, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("width", [3, 35])
def test_class_weights_of_zero_give_nan_as_in_torch(width, smoothing, last, seed):
    X, y = _images(num_classes=width - 1)
    weight = torch.zeros(width, dtype=torch.float64)
    # no row of the class that has a weight: the mean divides by 0
    weight[-1] = last
    loss = nn.CrossEntropyLoss(weight, label_smoothing=smoothing)
    results = _both(
        _net(7, width), X, y, loss=loss, epochs=1, batch_size=10, test=_images(5, num_classes=width - 1)
    )
    assert np.isnan(results[0][1].train_loss).all()
    assert results[0][0][0].weight.isnan().all()
    _assert_same(results, equal_nan=True)


@pytest.mark.parametrize("widths", [(7, 3), (7, 5, 3), (7, 4, 35)], ids=str)
def test_a_weight_that_becomes_infinite_gives_nan_as_in_the_loop(widths, seed):
    X, y = _images(num_classes=widths[-1])
    X[:, :4] = 0
    results, net = [], _net(*widths)
    for compiled in (True, False):
        twin = copy.deepcopy(net)

        def change(weight=twin[0].weight):
            with torch.no_grad():
                weight[0, 1] = float("inf")

        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
        generator = torch.Generator().manual_seed(0)
        history = fastdl.fit(
            twin, nn.CrossEntropyLoss(), optimizer, X, y, epochs=2, batch_size=4, progress=False,
            compiled=compiled, generator=generator, on_epoch=_change_in_epoch(1, change),
        )  # fmt: skip
        results.append((twin, history, optimizer, generator))
    assert np.isnan(results[0][1].train_loss[1])
    _assert_same(results, equal_nan=True)
