"""The door for CUDA tensors, as far as it goes without a GPU."""

from __future__ import annotations

import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdl import cuda_arrays, functional, machine, optim
from fastdl.arrays import accepts


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that there is a GPU that everything is right with, and forget it afterwards."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    kernels = SimpleNamespace(launch=SimpleNamespace(architecture=lambda capability: "sm_90a"))
    monkeypatch.setattr(cuda_arrays, "cuda_kernels", lambda: kernels)
    cuda_arrays._usable.cache_clear()
    yield kernels
    cuda_arrays._usable.cache_clear()


def test_nothing_is_missing_where_all_links_hold(gpu):
    assert cuda_arrays.missing_link(0) is None
    with warnings.catch_warnings(action="error"):
        assert cuda_arrays.usable(0)


def test_a_torch_without_cuda_is_named(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda_arrays.missing_link(0) == (
        f"torch {torch.__version__} is built without CUDA: install torch's build for CUDA 12 or 13"
    )


def test_a_missing_driver_is_named(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch finds no NVIDIA GPU" in cuda_arrays.missing_link(0)


def test_the_kernels_own_reasons_are_passed_on(gpu, monkeypatch):
    def older(capability):
        raise RuntimeError("the CUDA kernels need a GPU of compute capability 8.0 or newer")

    gpu.launch.architecture = older
    assert cuda_arrays.missing_link(0) == "the CUDA kernels need a GPU of compute capability 8.0 or newer"

    def not_installed():
        raise ImportError("the CUDA kernels need numba-cuda: install fastdl[cu13]")

    monkeypatch.setattr(cuda_arrays, "cuda_kernels", not_installed)
    assert cuda_arrays.missing_link(0) == "the CUDA kernels need numba-cuda: install fastdl[cu13]"


def test_the_description_of_the_machine_says_what_is_missing(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert machine.gpu() == "a GPU"
    gpu.launch.architecture = lambda capability: (_ for _ in ()).throw(RuntimeError("it is too old"))
    assert machine.gpu() == "a GPU (it is too old)"


def test_torch_computes_with_one_warning_where_a_link_is_missing(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.warns(
        RuntimeWarning, match="torch computes on CUDA in fastdl's place: torch .* without CUDA"
    ):
        assert not cuda_arrays.usable(0)
    with warnings.catch_warnings(action="error"):
        assert not cuda_arrays.usable(0)


def test_a_device_is_found_by_name(gpu, monkeypatch):
    lines = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert cuda_arrays.find_device("cpu", lines.append) == torch.device("cpu")
    for name in ("cuda", "auto"):
        assert cuda_arrays.find_device(name, lines.append) == torch.device("cuda", 1)
    assert not lines
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(cuda_arrays.DeviceUnavailableError, match="built without CUDA"):
        cuda_arrays.find_device("cuda", lines.append)
    assert not lines
    assert cuda_arrays.find_device("auto", lines.append) == torch.device("cpu")
    assert lines == [f"Training on the CPU: {cuda_arrays.missing_link(0)}"]


def test_a_compiler_takes_the_answer_for_a_constant(monkeypatch):
    monkeypatch.setattr(cuda_arrays, "_usable", lambda device: device == 0)

    @torch.compile(fullgraph=True, backend="eager")
    def function(x):
        return x + 1 if cuda_arrays.usable(0) else x - 1

    assert function(torch.zeros(1)).item() == 1
    assert cuda_arrays.usable(0)
    assert not cuda_arrays.usable(1)


def test_a_tensor_subclass_on_a_gpu_is_torchs():
    with FakeTensorMode():
        fake = torch.empty(2, 3, device="cuda")
    assert fake.is_cuda
    assert not accepts(fake)
    with fake.fake_mode:
        assert functional.relu(fake).device == fake.device


def test_every_op_has_a_cuda_implementation_and_a_fake_that_keeps_the_device():
    ops = torch.ops.fastdl
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastdl::")]
    assert len(names) == 10, f"{optim.__name__} and functional register ten ops"
    assert all(torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA") for name in names)
    with FakeTensorMode():
        input, weight, bias = (torch.empty(shape, device="cuda") for shape in ((4, 3), (2, 3), (2,)))
        target = torch.empty(4, dtype=torch.int64, device="cuda")
        output = ops.linear_forward(input, weight, bias, True)
        loss, grad_logits = ops.cross_entropy_forward(output, target, None, -100, 0.0, "mean", True)
        results = [
            output,
            loss,
            ops.cross_entropy_backward(loss, grad_logits, target, -100),
            ops.linear_grad_input(output, output, weight),
            *ops.linear_grad_weight(output, output, input, True, True),
            ops.relu_backward(ops.relu_forward(input), input),
            ops.mse_loss_backward(ops.mse_loss_forward(input, input, "mean"), input, input, "mean"),
        ]
    assert {result.device for result in results} == {torch.device("cuda", 0)}


@pytest.mark.slow
def test_importing_fastdl_and_using_it_on_the_cpu_touches_no_cuda():
    program = """
import sys, torch, fastdl, fastdl.nn, fastdl.optim, fastdl.models
from fastdl import functional
x = torch.randn(4, 3, requires_grad=True)
functional.mse_loss(functional.relu(x), x.detach()).backward()
fastdl.optim.SGD([x], lr=0.1).step()
print(torch.cuda.is_initialized(), [name for name in ("numba.cuda", "cuda.core") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False []"
