"""The door to the kernels: imports, threads, forks and the GIL, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastdl import functional, optim
from fastdl.arrays import accepts, are_plain


def _run(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_brings_neither_numba_nor_torchvision_nor_plots():
    heavy = "{'numba', 'torchvision', 'matplotlib', 'typer', 'rich', 'safetensors'}"
    assert _run(
        "import sys, torch; before = set(sys.modules); "
        "import fastdl, fastdl.nn, fastdl.optim, fastdl.models, fastdl.data; "
        f"print(sorted({heavy} & (set(sys.modules) - before)))"
    ) == "[]"  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_the_users_thread_count_stays(num_threads):
    program = f"""
import torch, threading
torch.set_num_threads({num_threads})
from fastdl import functional
x = torch.randn(600, 300, requires_grad=True)
w = torch.randn(200, 300, requires_grad=True)
def step():
    functional.linear_cross_entropy(x, w, torch.zeros(600, dtype=torch.int64)).backward()
    functional.mse_loss(functional.relu(x), x).backward()
step()
counts = [torch.get_num_threads()]
thread = threading.Thread(target=step); thread.start(); thread.join()
counts.append(torch.get_num_threads())
print(counts)
"""
    assert _run(program) == str([num_threads] * 2)


def test_results_do_not_depend_on_the_number_of_threads():
    program = """
import torch
from fastdl import functional
torch.manual_seed(0)
x, w = torch.randn(601, 303, requires_grad=True), torch.randn(201, 303, requires_grad=True)
y = torch.randint(201, (601,))
results = []
for count in (1, 2, 4):
    torch.set_num_threads(count)
    loss = functional.linear_cross_entropy(functional.linear_relu(x, w[:, :].repeat(2, 1)[:303]), w, y)
    results.append((loss, *torch.autograd.grad(loss, (x, w))))
    squared = functional.mse_loss(functional.relu(x), x.detach() * 2)
    results[-1] += (squared, *torch.autograd.grad(squared, (x,)))
print(all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other)))
"""
    assert _run(program) == "True"


@pytest.mark.slow
def test_a_forked_child_computes():
    program = """
import os, torch
from fastdl import functional
x = torch.randn(3000, 300)
expected = functional.relu(x).numpy()
child = os.fork()
if child == 0:
    os._exit(0 if (functional.relu(x).numpy() == expected).all() else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert _run(program) == "0"


FORKS = {
    "never used": "",
    "fastdl imported": "from fastdl import functional, optim",
    "torch's threads": "torch.randn(3000, 3000).relu().sum()",
    "torch's threads, fastdl imported": "from fastdl import arrays\ntorch.randn(3000, 3000).relu().sum()",
    "Numba's threads": """
import numba, numpy
@numba.njit(parallel=True)
def total(x):
    result = 0.0
    for i in numba.prange(x.size):
        result += x[i]
    return result
total(numpy.ones(100_000))
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("before", FORKS)
def test_a_forked_child_that_never_used_fastdl_computes(before):
    # torch's own ops on many elements may hang in such a child: nothing here is torch's, not even a sum
    program = f"""
import os, time, torch
torch.set_num_threads(4)
x, y = torch.randn(3000, 300, requires_grad=True), torch.zeros(3000, dtype=torch.int64)
w = torch.nn.Parameter(torch.randn(500, 300))
upstream = torch.ones(3000, 500)
{FORKS[before]}
child = os.fork()
if child == 0:
    from fastdl import functional, optim
    output = functional.linear_relu(x, w)
    output.backward(upstream)
    x.grad = w.grad = None
    functional.linear_cross_entropy(x, w, y).backward()
    optimizer = optim.SGD([w], lr=0.1, momentum=0.9)
    optimizer.step()
    optimizer.step()
    os._exit(0)
for _ in range(600):
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        break
    time.sleep(0.1)
else:
    os.kill(child, 9)
print(os.waitstatus_to_exitcode(status) if done else "hung")
"""
    assert _run(program) == "0"


def test_several_python_threads_may_compute_at_once():
    program = """
import torch
from concurrent.futures import ThreadPoolExecutor
from fastdl import functional
x = torch.randn(500, 400)
w = torch.randn(300, 400)
expected = functional.linear_relu(x, w)
with ThreadPoolExecutor(4) as pool:
    results = list(pool.map(lambda _: functional.linear_relu(x, w), range(40)))
print(all(torch.equal(result, expected) for result in results))
"""
    assert _run(program) == "True"


def test_a_kernel_releases_the_gil():
    program = """
import threading, time, torch
torch.set_num_threads(1)
from fastdl import functional
functional.linear(torch.randn(300, 300), torch.randn(300, 300))
x, w = torch.randn(2000, 3000), torch.randn(2000, 3000)
turns, before_and_after = 0, []
def compute():
    before_and_after.append(turns)
    functional.linear(x, w)
    before_and_after.append(turns)
thread = threading.Thread(target=compute)
thread.start()
while thread.is_alive():
    time.sleep(0.001)
    turns += 1
print(before_and_after[1] - before_and_after[0])
"""
    # some 200 turns of this thread on a quiet machine; none while a kernel holds the GIL
    assert int(_run(program)) >= 20


class Subclass(torch.Tensor):
    """A tensor that only has another type."""


def _nested(tensor):
    return torch.nested.nested_tensor([tensor, tensor])


def _freed(tensor):
    copy = tensor.clone()
    copy.untyped_storage().resize_(0)
    return copy


# what the kernels can't read; the rest of a call is plain
UNREADABLE = {
    "subclass": lambda tensor: tensor.as_subclass(Subclass),
    "other dtype": lambda tensor: tensor.half(),
    "wider": lambda tensor: tensor.double(),
    "integer": lambda tensor: tensor.long(),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "other device": lambda tensor: tensor.to("meta"),
    "nothing on another device": lambda tensor: torch.empty(0, device="meta"),
    "negated lazily": lambda tensor: torch.complex(tensor, tensor).conj().imag,
    "nested": _nested,
    "sparse": lambda tensor: tensor.to_sparse(),
    "zeros without memory": lambda tensor: torch._efficientzerotensor(tensor.shape),
    "memory that was freed": _freed,
    "uninitialised": lambda tensor: torch.nn.UninitializedParameter(),
    "number": lambda tensor: 1.0,
    "array": lambda tensor: tensor.numpy(),
}


@pytest.mark.parametrize("name", UNREADABLE)
@pytest.mark.parametrize("position", [0, 1, 2])
def test_what_is_no_plain_tensor_is_refused_in_every_place(name, position):
    plain = torch.randn(2, 3)
    if name == "wider" and position == 0:
        return
    tensors = [plain, plain, plain]
    assert are_plain(*tensors)
    assert accepts(*tensors)
    tensors[position] = UNREADABLE[name](plain)
    assert not are_plain(*tensors)
    assert not accepts(*tensors)


@pytest.mark.parametrize("mode", [BaseTorchFunctionMode, TorchDispatchMode, lambda: torch.device("cpu")])
def test_nothing_is_accepted_while_a_mode_watches(mode):
    plain = torch.randn(2, 3)
    with mode():
        assert are_plain(plain)
        assert not accepts(plain)
    assert accepts(plain)


def test_an_argument_that_is_left_out_is_plain_but_for_the_first():
    plain = torch.randn(2, 3)
    assert are_plain(plain, None, plain)
    assert not are_plain(None, plain)
    assert are_plain(torch.nn.Parameter(plain), torch.empty(0))


@pytest.mark.parametrize("position", range(3))
def test_a_subclass_is_never_read_by_a_kernel(position, monkeypatch):
    """Its memory may hold anything; the type alone says so."""

    class Doubled(torch.Tensor):
        __torch_function__ = torch._C._disabled_torch_function_impl

    tensors = [torch.randn(4, 3), torch.randn(2, 3), torch.randn(2)]
    tensors[position] = tensors[position].as_subclass(Doubled)
    assert not accepts(*tensors)
    monkeypatch.setattr("fastdl.functional.apply_linear", None)
    functional.linear(*tensors)


@pytest.mark.parametrize("place", ["param", "grad", "buffer"])
def test_a_subclass_is_never_updated_by_the_kernel(place, monkeypatch):
    class Doubled(torch.Tensor):
        __torch_function__ = torch._C._disabled_torch_function_impl

    param = torch.ones(3).as_subclass(Doubled) if place == "param" else torch.ones(3)
    param.grad = torch.ones(3).as_subclass(Doubled) if place == "grad" else torch.ones(3)
    optimizer = optim.SGD([param], lr=0.1, momentum=0.9)
    if place == "buffer":
        optimizer.state[param]["momentum_buffer"] = torch.ones(3).as_subclass(Doubled)
    monkeypatch.setattr("fastdl.ops.sgd.cpu_kernels", None)
    optimizer.step()
    assert param[0] < 1


@pytest.mark.slow
def test_a_first_use_under_another_default_device_works():
    program = """
import torch
from fastdl import functional, optim
param = torch.nn.Parameter(torch.ones(3))
param.grad = torch.ones(3)
torch.set_default_device("meta")
from fastdl import arrays
print(arrays.like(torch.float32).dtype)
optim.SGD([param], lr=0.5).step()
print(param.tolist())
"""
    assert _run(program).splitlines() == ["float32", "[0.5, 0.5, 0.5]"]
