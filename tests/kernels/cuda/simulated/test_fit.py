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
from fastdl.training import cuda_examples, cuda_program, engines, evaluation, program
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
    monkeypatch.setattr(program, "Program", cuda_program.CudaProgram)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(_Event, "interrupt", False)
    # every example on the stand-in is a copy, as those on a GPU are
    monkeypatch.setattr(cuda_examples, "is_there", lambda tensor, device: False)
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


def _assert_same(results):
    (net, history, optimizer, generator), (loop_net, loop_history, loop_optimizer, loop_generator) = results
    for ours, theirs in zip(net.parameters(), loop_net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **FLOAT64)
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
    staged = []
    stage = cuda_examples.Resident.stage

    def spy(self, order):
        staged.append(order)
        stage(self, order)

    monkeypatch.setattr(cuda_examples.Resident, "stage", spy)
    net = _net(7, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    fastdl.fit(net, nn.CrossEntropyLoss(), optimizer, X, y, epochs=3, batch_size=4, progress=False)
    # the first epoch's own, and one ahead in each epoch but the last
    assert len(staged) == 3


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
    before = [own.clone() for _, own in stopped._copies]
    gpu.graphs[0].replay()
    assert all(torch.equal(own, kept) for (_, own), kept in zip(stopped._copies, before, strict=True))


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
