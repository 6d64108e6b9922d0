"""The door to the kernels: imports, threads, forks and the GIL, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest


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


def test_a_forked_child_computes_on_one_thread():
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
seconds = []
def compute():
    started = time.perf_counter()
    functional.linear(x, w)
    seconds.append(time.perf_counter() - started)
thread = threading.Thread(target=compute)
thread.start()
longest, last = 0.0, time.perf_counter()
while thread.is_alive():
    time.sleep(0.001)
    now = time.perf_counter()
    longest, last = max(longest, now - last), now
print("ran on" if longest < seconds[0] / 2 else f"waited {longest} of {seconds[0]} s")
"""
    assert _run(program) == "ran on"
