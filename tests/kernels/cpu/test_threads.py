"""The threads of single ops: every part once, the same bits, nobody waited for who has no core to run on."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from fastdl.kernels import cpu
from fastdl.kernels.cpu import threads
from fastdl.kernels.cpu.atomics import add, load, pause
from fastdl.kernels.cpu.parallel import shared_out
from fastdl.kernels.cpu.sgd import BUFFER, FIRST_STEP, GRAD, NUM_COLUMNS, PARAM, SIZE
from fastdl.kernels.jit import jit
from fastdl.kernels.options import CrossEntropyOptions, SGDOptions
from tests.kernels.cpu.conftest import NUM_WORKERS

# so long a part waits for others before a test fails, in nanoseconds
_PATIENCE = 20 * 10**9
DTYPES = [np.float32, np.float64]


@pytest.fixture(params=["OpenMP", "workers"])
def kind(request):
    """Have jobs done by OpenMP's threads, as long as they have cores, or by workers."""
    words, num_threads = threads._words, torch.get_num_threads()
    before = words[threads.OPENMP]
    words[threads.OPENMP] = threads._openmp if request.param == "OpenMP" else 0
    words[threads.AVOIDED_UNTIL] = 0
    assert (words[threads.OPENMP] != 0) == (request.param == "OpenMP")
    yield request.param
    torch.set_num_threads(num_threads)
    words[threads.OPENMP] = before


def _run(program, timeout=240):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@shared_out
def _count(times, start, stop):
    for i in range(start, stop):
        add(times, i, 1)


@jit
def count(times, num_threads):
    _count((times,), times.size, num_threads)


@shared_out
def _meet(counters, start, stop):
    add(counters, 0, 1)
    since = pause()
    while load(counters, 0) < counters[1] and pause() - since < counters[2]:
        pass
    if load(counters, 0) < counters[1]:
        add(counters, 3, 1)


@jit
def meet(counters, num_threads):
    _meet((counters,), num_threads, num_threads)


@shared_out
def _fail(flags, start, stop):
    for i in range(start, stop):
        if flags[i] > 0:
            raise ValueError("no")


@jit
def fail(flags, num_threads):
    _fail((flags,), flags.size, num_threads)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 8, 9, 100, 100_000])
@pytest.mark.parametrize("length", [0, 1, 2, 7, 1000])
def test_every_element_is_done_once(length, num_threads, kind):
    times = np.zeros(length, np.int64)
    for _ in range(100):
        count(times, num_threads)
    assert (times == 100).all()


@pytest.mark.parametrize("num_threads", [2, 3, NUM_WORKERS + 1])
def test_as_many_threads_work_at_once_as_are_wanted(num_threads, kind):
    torch.set_num_threads(num_threads)
    for _ in range(20):
        # each part waits for all others to begin; then how many waited in vain
        counters = np.array([0, num_threads, _PATIENCE, 0])
        meet(counters, num_threads)
        assert counters[3] == 0
        # they sleep in between, or spin
        time.sleep(1e-3 * (_ % 2))


@pytest.mark.parametrize("num_threads", [1, 2, 8])
@pytest.mark.parametrize("failing", [0, 13, 31, 32])
def test_a_part_that_fails_is_an_error_and_nothing_else_is(failing, num_threads, kind):
    flags = np.zeros(33, np.int64)
    flags[failing] = 1
    for _ in range(50):
        with pytest.raises(MemoryError):
            fail(flags, num_threads)
        fail(flags * 0, num_threads)
    times = np.zeros(100, np.int64)
    count(times, num_threads)
    assert (times == 1).all()


def test_callers_at_once_each_get_all_of_their_work(kind):
    def work(_):
        times = np.zeros(100, np.int64)
        for _ in range(500):
            count(times, 3)
        return times

    with ThreadPoolExecutor(4) as pool:
        for times in pool.map(work, range(16)):
            assert (times == 500).all()


def test_a_caller_never_waits_for_another_one(kind):
    counters = np.array([0, 3, _PATIENCE, 0])
    first = threading.Thread(target=meet, args=(counters, 2))
    first.start()
    while counters[0] < 2:
        time.sleep(1e-4)
    # the first one's parts wait for this thread to add the third
    times = np.zeros(100, np.int64)
    count(times, 8)
    assert (times == 1).all()
    assert first.is_alive()
    counters[0] = 3
    first.join()
    assert counters[3] == 0


def test_threads_without_work_sleep(kind):
    count(np.zeros(100, np.int64), 8)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.5)
    # a fifth of one core; one that spins takes a whole one
    assert time.process_time() - before < 0.1


def _address(array):
    return 0 if array is None else array.ctypes.data


def _results(rng, dtype, num_threads):
    """Return what every op's kernel writes."""
    like = np.empty(0, dtype)
    rows, inputs, outputs = 603, 301, 201

    def random(*shape):
        return rng.standard_normal(shape).astype(dtype)

    input, weight, bias, grad = (
        random(rows, inputs), random(outputs, inputs), random(outputs), random(rows, outputs)
    )  # fmt: skip
    output, grad_input, grad_weight, grad_bias = (
        np.full_like(of, np.nan) for of in (grad, input, weight, bias)
    )
    sizes = rows, inputs, outputs
    results = [output, grad_input, grad_weight, grad_bias]
    cpu.linear_forward(
        (*map(_address, (input, weight, bias)), _address(output)), sizes, True, num_threads, like
    )
    cpu.linear_grad_input(tuple(map(_address, (grad, output, weight, grad_input))), sizes, num_threads, like)
    cpu.linear_grad_weight(
        tuple(map(_address, (grad, output, input, grad_weight, grad_bias))), sizes, num_threads, like
    )
    relu, relu_grad, squared, mean, squared_grad = (np.full_like(of, np.nan) for of in (grad, *[grad] * 4))
    size = grad.size
    cpu.relu_forward((_address(grad), _address(relu)), size, num_threads, like)
    cpu.relu_backward(tuple(map(_address, (grad, output, relu_grad))), size, num_threads, like)
    cpu.mse_loss_forward(tuple(map(_address, (grad, output, squared))), size, 0, num_threads, like)
    cpu.mse_loss_forward(tuple(map(_address, (grad, output, mean))), size, 1, num_threads, like)
    cpu.mse_loss_backward(
        tuple(map(_address, (squared, grad, output, squared_grad))), (size, size), 1, num_threads, like
    )
    results += [relu, relu_grad, squared, mean[0, :1], squared_grad]
    target = rng.integers(outputs, size=rows)
    loss, grad_logits, scaled = np.full(rows, np.nan, dtype), np.full_like(grad, np.nan), np.empty_like(grad)
    addresses = (_address(grad), _address(target), 0, _address(loss), _address(grad_logits))
    options = tuple(CrossEntropyOptions(-100, 0.1, 0))
    assert cpu.cross_entropy_forward(addresses, (rows, outputs), options, num_threads, like) == -1
    addresses = tuple(map(_address, (loss, grad_logits, target, scaled)))
    cpu.cross_entropy_backward(addresses, (rows, rows, outputs), -100, num_threads, like)
    results += [loss, grad_logits, scaled]
    buffer = random(*weight.shape)
    table = np.zeros((1, NUM_COLUMNS), np.int64)
    table[0, [PARAM, GRAD, BUFFER]] = _address(weight), _address(grad_weight), _address(buffer)
    table[0, [SIZE, FIRST_STEP]] = weight.size, 0
    cpu.sgd(table, like, tuple(SGDOptions(0.1, 0.9, 0.0, 1e-3, True, False)), num_threads)
    return [*results, weight, buffer]


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_number_of_threads(dtype, kind, seed):
    expected = _results(np.random.default_rng(seed), dtype, 1)
    assert not any(np.isnan(result).any() for result in expected)
    for num_threads in (2, 3, 8):
        for _ in range(3):
            found = _results(np.random.default_rng(seed), dtype, num_threads)
            for index, (one, other) in enumerate(zip(expected, found, strict=True)):
                assert one.tobytes() == other.tobytes(), (index, num_threads)


# OpenMP's threads are not used where torch's count is more than the cores
OP = """
import threading, time, torch
torch.set_num_threads(5)
from fastdl import arrays, functional
from fastdl.kernels import cpu
threads = arrays.cpu_kernels().threads
# workers are few where cores are
arrays.num_cores = lambda: 4
x, w = torch.randn(500, 300), torch.randn(200, 300)
expected = functional.linear_relu(x, w)
def op():
    # not torch.equal, which may wake torch's own threads
    return bool((functional.linear_relu(x, w).numpy() == expected.numpy()).all())
def num_workers():
    return sum(thread.name.startswith("fastdl worker") for thread in threading.enumerate())
"""
OPENMP_OP = OP.replace("set_num_threads(5)", "set_num_threads(4)")
OPS = {"OpenMP": OPENMP_OP, "workers": OP}


def test_the_first_op_that_could_use_workers_asks_for_them():
    small = "functional.relu(torch.ones(10)); "
    assert _run(
        OP.replace("expected", small + "expected", 1) + "print(num_workers(), op(), num_workers())"
    ) == ("0 True 3")


@pytest.mark.parametrize(("num_threads", "num_workers"), [(1, 0), (2, 1), (4, 3)])
def test_an_op_starts_no_more_workers_than_it_could_use(num_threads, num_workers):
    wish = "cpu.relu_forward((x.data_ptr(), x.data_ptr()), x.numel(), 100, arrays.like(x.dtype))"
    program = OP.replace("lambda: 4", f"lambda: {num_threads}")
    program = program.replace("expected =", f"{wish}\nexpected =", 1)
    assert _run(program + "print(op(), op(), num_workers())") == f"True True {num_workers}"


def test_workers_are_started_where_openmps_threads_are_avoided():
    program = """
right = all(op() for _ in range(100))
is_avoided = threads._words[threads.AVOIDED_UNTIL] > 0
# the first asks for them, the second starts them
right = right and op() and op()
print(right, num_workers() == (3 if is_avoided else 0))
"""
    assert _run(OPENMP_OP + program) == "True True"


def test_openmps_threads_whose_core_is_taken_are_avoided():
    program = (
        OPENMP_OP
        + """
import os, subprocess, sys
others = {int(task) for task in os.listdir("/proc/self/task")} - {os.getpid()}
core = max(os.sched_getaffinity(0))
# it ends with its parent, however that does
is_parent = f"lambda: os.getppid() == {os.getpid()}"
spin = f"import os; os.sched_setaffinity(0, {{{core}}}); any(not here for here in iter({is_parent}, False))"
busy = subprocess.Popen([sys.executable, "-c", spin])
for task in others:
    os.sched_setaffinity(task, {core})
    os.setpriority(os.PRIO_PROCESS, task, 19)
right, end = True, time.monotonic() + 60
while threads._words[threads.AVOIDED_UNTIL] == 0 and time.monotonic() < end:
    right = right and op()
avoided = threads._words[threads.AVOIDED_UNTIL] > time.monotonic_ns()
right = right and op() and op()
print(len(others) >= 3, avoided, num_workers(), right)
busy.kill()
"""
    )
    assert _run(program) == "True True 3 True"


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPS)
@pytest.mark.parametrize("again", [False, True])
def test_a_child_forked_while_others_compute_has_workers_of_its_own(again, kind):
    program = (
        OPS[kind]
        + f"""
import os
op()
stop = False
def compute():
    while not stop:
        assert op()
others = [threading.Thread(target=compute) for _ in range(2)]
for other in others: other.start()
def fork(again):
    child = os.fork()
    if child == 0:
        right = all(op() for _ in range(20)) and num_workers() == 3
        if again:
            right = right and fork(False) == 0
        os._exit(0 if right else 1)
    for _ in range(300):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.1)
    os.kill(child, 9)
    return "hung"
print([fork({again}) for _ in range(10)], all(op() for _ in range(20)))
stop = True
"""
    )
    assert _run(program) == f"{[0] * 10} True"


# the kernel alone: the end of the process unwinds a daemon's stack, which torch's C++ doesn't survive
BUSY_DAEMON = """
def kernels():
    while True: cpu.relu_forward((x.data_ptr(), x.data_ptr()), x.numel(), 4, arrays.like(x.dtype))
threading.Thread(target=kernels, daemon=True).start()
time.sleep(0.1)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "end",
    [
        "op()",
        "op(); sys.exit(0)",
        "op(); time.sleep(0.01)",
        BUSY_DAEMON,
        "import atexit; atexit.register(op)",
    ],
)
@pytest.mark.parametrize("kind", OPS)
def test_a_process_with_threads_ends(end, kind):
    for _ in range(5):
        assert _run(f"import sys{OPS[kind]}op(); op()\nprint('done')\n{end}", timeout=60) == "done"


@pytest.mark.parametrize("kth", [0, 2])
@pytest.mark.parametrize("error", ['RuntimeError("can\'t start new thread")', "MemoryError()"])
def test_without_threads_to_start_ops_run_and_ask_once(kth, error):
    program = (
        OP
        + f"""
started, start = [], threading.Thread.start
def failing(self):
    started.append(self)
    if len(started) > {kth}:
        raise {error}
    start(self)
threading.Thread.start = failing
print(all(op() for _ in range(20)), len(started), num_workers())
"""
    )
    assert _run(program) == f"True {kth + 1} {kth}"


def test_workers_that_never_get_a_core_are_not_waited_for():
    program = (
        OP
        + """
threading.Thread.start = lambda self: None
print(all(op() for _ in range(20)))
print(threads._words[threads.WORKERS])
"""
    )
    assert _run(program, timeout=60).split() == ["True", "3"]


@pytest.mark.parametrize("kind", OPS)
def test_numbas_threads_are_never_started(kind):
    program = (
        OPS[kind]
        + """
import numba
op(); op()
try: print(numba.threading_layer())
except ValueError as error: print("none")
"""
    )
    assert _run(program) == "none"
