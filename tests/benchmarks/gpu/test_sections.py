"""Every section as a visit runs it, the CPU in the GPU's place, at next to no size; and what stops a time."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from benchmarks.gpu import epochs as timed_epochs
from benchmarks.gpu import exercise
from benchmarks.gpu.device import StandIn
from benchmarks.gpu.precision import ALL, FLOAT32, TIMED
from benchmarks.gpu.sections import (
    compile,
    compiled,
    epochs,
    grid,
    kernels,
    launch,
    parity,
    products,
    sanitizer,
    steps,
    tests,
)
from benchmarks.gpu.settings import Settings, key
from benchmarks.peers.fastdl_epochs import DropInTrainer, FitTrainer
from benchmarks.peers.graph_epochs import GraphTrainer
from benchmarks.peers.torch_epochs import EagerTrainer
from fastdl.ops import _cuda
from fastdl.training.lower import UnsupportedError

OPS = (parity.LINEAR, parity.RELU, parity.CROSS_ENTROPY, parity.MSE_LOSS, parity.SGD)


@pytest.fixture
def saved():
    return []


@pytest.fixture
def settings(saved):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    green = frozenset(key(op, block) for op in OPS for block in ALL)
    yield partial(
        Settings,
        StandIn(),
        quick=True,
        deadline=time.monotonic() + 600,
        green=green,
        save=saved.append,
        flops=1e11,
    )
    torch.set_num_threads(threads)


def test_parity_is_looked_at_in_every_precision(settings, saved):
    section = parity.measure(settings())
    assert section.failures == []
    assert section.figures["green"] == [key(op, block) for block in ALL for op in OPS]
    assert len(saved) == len(ALL)


def test_an_op_that_is_off_or_raises_has_no_parity(settings, monkeypatch):
    relu = torch.nn.functional.relu
    monkeypatch.setattr(parity.functional, "relu", lambda x: relu(x) * (1 + 1e-5))

    def broken(*arguments, **options):
        raise RuntimeError("an illegal address")

    monkeypatch.setattr(parity.functional, "mse_loss", broken)
    section = parity.measure(settings())
    green = section.figures["green"]
    assert key(parity.RELU, FLOAT32) not in green
    assert not any(name.startswith(parity.MSE_LOSS) for name in green)
    assert key(parity.LINEAR, FLOAT32) in green
    assert "float32, mse_loss: RuntimeError: an illegal address" in section.failures


def test_every_kernel_gets_a_time_beside_its_floor(settings):
    section = kernels.measure(settings())
    assert section.failures == []
    assert section.figures["copy, bytes a second"] > 0
    for block in ("at the models' sizes", "at large sizes"):
        assert section.figures[block]
        for found in section.figures[block].values():
            assert found["share"] > 0
            assert found["times"]["fastdl"]["median_s"] > 0
    ops = {found["op"] for found in section.figures["at large sizes"].values()}
    assert {parity.SGD, parity.CROSS_ENTROPY} <= ops


def test_the_hosts_time_of_each_call(settings):
    section = launch.measure(settings())
    assert section.failures == []
    assert len(section.figures) == 5
    assert all(found["fastdl"]["median_s"] > 0 for found in section.figures.values())


def test_a_kernel_is_launched_with_no_op_around_it(monkeypatch):
    calls = []
    monkeypatch.setattr(launch.cuda_arrays, "run", lambda *arguments: calls.append(arguments))
    x = torch.ones(2)
    launch.launch(x)()
    ((like, kernel, given, output),) = calls
    assert like is given is x
    assert output.shape == x.shape
    assert kernel.__name__ == "relu_forward"


def test_products_are_timed_each_way_and_the_limits_are_put_back(settings):
    before = _cuda.MOST_PRODUCTS, _cuda.MOST_PRODUCTS_BESIDE_TENSOR_CORES
    section = products.measure(settings())
    assert section.failures == []
    assert before == (_cuda.MOST_PRODUCTS, _cuda.MOST_PRODUCTS_BESIDE_TENSOR_CORES)
    assert [cell["product"] for cell in section.figures["cells"][:3]] == [
        *("forward", "grad_input", "grad_weight")
    ]
    for cell in section.figures["cells"]:
        assert set(cell["times"]) == {products.KERNEL, products.HANDED_OVER, products.OP, products.CUBLAS}
        assert cell["share"] > 0


def test_the_limits_decide_who_computes_a_product():
    half, single = torch.bfloat16, torch.float32
    with products.limits(sys.maxsize):
        assert not _cuda._is_torchs_product(1 << 20, 1 << 12, 1 << 12, half)
    with products.limits(-1):
        assert _cuda._is_torchs_product(1, 1, 1, single)
        assert _cuda._is_torchs_product(1, 1, 1, half)


def test_a_product_that_differs_from_torchs_has_no_time(settings, monkeypatch):
    forward = products.linear_forward
    monkeypatch.setattr(products, "linear_forward", lambda *arguments: forward(*arguments) * 1.1)
    section = products.measure(settings())
    assert {cell["product"] for cell in section.figures["cells"]} == {"grad_input", "grad_weight"}
    assert any("float32, forward 32 x 64, kernel: differs" in failure for failure in section.failures)


def test_a_step_of_each_model_in_each_precision(settings):
    section = steps.measure(settings())
    assert section.failures == []
    assert list(section.figures) == [block.name for block in TIMED]
    for found in section.figures.values():
        assert list(found) == ["linear", "softmax", "mlp"]
        for times in found.values():
            assert set(times) == set(steps._NAMES)


def test_a_step_whose_loss_differs_has_no_time(settings, monkeypatch):
    monkeypatch.setattr(steps, "differing_steps", lambda *arguments: [3])
    section = steps.measure(settings())
    assert section.figures["float32"] == {}
    assert "float32, Multilayer perceptron: the loss of step 3 differs from torch's" in section.failures


@pytest.mark.parametrize("section", [kernels, launch, products, steps])
def test_what_has_no_parity_has_no_time(settings, section):
    found = section.measure(settings(green=frozenset()))
    assert found.failures
    assert all("parity" in failure for failure in found.failures)
    assert "median_s" not in repr(found.figures)


def test_epochs_of_fit_and_of_its_peers(settings):
    section = epochs.measure(settings())
    assert section.failures == []
    linear, softmax = section.figures["float32"]["linear"], section.figures["TF32"]["softmax"]
    for found in (linear, softmax):
        # a difference of two times, which at this size can be below 0
        assert math.isfinite(found["fit"]["epoch"]["median_s"])
        assert found["floor_s"] > 0
        assert {name.partition(",")[0] for name in found["peers"]} >= {
            *("torch eager", "fastdl drop-in loop", "torch graph of a step", "torch graph of an epoch")
        }
    assert math.isfinite(linear["kernel, seconds a step"])
    assert "takes float32 and float64" in section.figures["bfloat16"]


def test_where_fit_is_not_available_its_peers_are_timed(settings, monkeypatch):
    class Refused(FitTrainer):
        def __init__(self, problem, dtype):
            raise UnsupportedError("the compiled engine can't train 0.weight on cuda:0")

    monkeypatch.setattr(epochs, "FitTrainer", Refused)
    monkeypatch.setattr(timed_epochs, "_QUICK_PARTS", timed_epochs._QUICK_PARTS[:1])
    section = epochs.measure(settings())
    found = section.figures["float32"]["linear"]
    assert "fit" not in found
    assert found["peers"]
    assert section.failures == [
        "float32, Linear regression, fastdl fit is not available: UnsupportedError: the compiled engine "
        "can't train 0.weight on cuda:0"
    ]


def test_fit_without_parity_has_no_time(settings, monkeypatch):
    class Wrong(FitTrainer):
        def train(self, num_epochs):
            return [loss + 0.01 for loss in super().train(num_epochs)]

    images = timed_epochs.load(quick=True)
    checks = timed_epochs.gate_checks("linear", images, settings(), Wrong)
    assert any(not check.passes for check in checks)
    assert all(check.passes for check in timed_epochs.gate_checks("linear", images, settings()))


def test_a_peer_with_another_loss_or_an_error_is_left_out(settings):
    class Wrong(EagerTrainer):
        def train(self, num_epochs):
            return [loss + 0.01 for loss in super().train(num_epochs)]

    class Broken(EagerTrainer):
        def __init__(self, problem, dtype):
            raise RuntimeError("out of memory")

    found = timed_epochs.problem("linear", timed_epochs.load(quick=True), settings())
    failures = []
    makes = {"wrong": Wrong, "broken": Broken, "right": DropInTrainer}
    assert list(timed_epochs.made(makes, found, failures, "here")) == ["right"]
    assert failures[0].startswith("here, wrong: a loss of ")
    assert failures[1] == "here, broken: RuntimeError: out of memory"


@pytest.mark.parametrize("whole_epoch", [False, True])
@pytest.mark.parametrize("fused", [None, True])
def test_a_captured_loop_trains_as_the_eager_one(settings, whole_epoch, fused):
    found = timed_epochs.problem("softmax", timed_epochs.load(quick=True), settings())
    # a last batch that is smaller than the others
    found = timed_epochs.replace(found, X=found.X[:300], y=found.y[:300])
    graph = GraphTrainer(found, torch.float64, device=StandIn(), whole_epoch=whole_epoch, fused=fused)
    eager = EagerTrainer(found, torch.float64)
    assert graph.train(2) == pytest.approx(eager.train(2), rel=1e-12)
    assert torch.allclose(graph.parameters(), eager.parameters(), rtol=1e-12, atol=1e-15)


def test_a_cell_of_the_grid(settings):
    section = grid.measure(settings())
    assert section.failures == []
    (cell,) = section.figures["cells"]
    assert set(cell["seconds of a step"]) == {"fastdl fit", *grid._PEERS}


def test_a_compiled_step_trains_to_torchs_loss(settings):
    section = compiled.measure(settings())
    assert section.failures == []
    (name,) = section.figures["TF32"]["softmax"]["peers"]
    assert name == "torch.compile reduce-overhead"


@pytest.mark.parametrize("section", [epochs, products, compiled, grid])
def test_a_section_whose_time_is_over_says_what_it_left_out(settings, section, monkeypatch):
    monkeypatch.setattr(timed_epochs, "load", lambda quick: timed_epochs.points(10))
    monkeypatch.setattr(epochs, "_half", lambda *arguments: None)
    found = section.measure(settings(deadline=time.monotonic() - 1))
    assert found.failures
    assert all(failure.endswith("no time was left") for failure in found.failures)


def test_the_kernels_are_compiled_in_processes(settings):
    pytest.importorskip("numba_cuda", reason="numba-cuda is not installed: no kernel was compiled")
    section = compile.measure(settings())
    assert section.failures == []
    assert section.figures["architecture"] == "sm_90a"
    assert len(section.figures["seconds of each"]) == 3


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="a CUDA device: the tests that need one would run twice"
)
def test_the_tests_that_need_a_gpu_are_counted_without_one(settings):
    section = tests.measure(settings())
    assert section.failures == []
    assert section.figures["exit code"] == 0
    assert set(section.figures["counts"]) == {"SKIPPED"}
    assert section.figures["counts"]["SKIPPED"] > 100


def test_the_sanitizers_program_uses_every_op():
    assert exercise.exercise("cpu") == []


def tool(tmp_path, text):
    path = tmp_path / "compute-sanitizer"
    path.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/arguments\n{text}\n')
    path.chmod(0o755)
    return str(path)


def test_both_tools_of_the_sanitizer_watch_the_program(settings, monkeypatch, tmp_path):
    summary = (
        'case "$2" in memcheck) echo "========= ERROR SUMMARY: 2 errors";; '
        '*) echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)";; esac'
    )
    monkeypatch.setattr(sanitizer, "sanitizer", lambda: tool(tmp_path, summary))
    section = sanitizer.measure(settings())
    assert section.failures == ["memcheck: 2 errors"]
    assert section.tables[0].rows == [["memcheck", "2 errors"], ["racecheck", "no errors"]]
    arguments = sorted((tmp_path / "arguments").read_text().splitlines())
    assert arguments == [
        f"--tool memcheck --report-api-errors no {sys.executable} -m benchmarks.gpu.exercise cpu",
        f"--tool racecheck {sys.executable} -m benchmarks.gpu.exercise cpu",
    ]


def test_a_sanitizer_that_does_not_work_here_is_no_failure(settings, monkeypatch, tmp_path):
    path = tool(tmp_path, 'echo "========= Error: Device not supported"; exit 1')
    monkeypatch.setattr(sanitizer, "sanitizer", lambda: path)
    section = sanitizer.measure(settings())
    assert section.failures == []
    assert section.figures["memcheck"]["did not work"] == "========= Error: Device not supported"


def test_the_sections_need_neither_matplotlib_nor_what_else_a_gpus_machine_may_lack():
    program = """
import sys
MISSING = {"matplotlib", "rich", "typer", "pytest", "jax", "sklearn", "torchvision"}
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
import benchmarks.gpu_report
from benchmarks.gpu.visit import NAMES
for name in NAMES:
    __import__(f"benchmarks.gpu.sections.{name}")
"""
    subprocess.run([sys.executable, "-c", program], cwd=tests.ROOT, check=True)
