"""Each kernel's time on the device beside its floor: at the models' sizes, and where memory decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import floors
from benchmarks.gpu.device import Device, Program, kernel_times_of, times_of
from benchmarks.gpu.floors import Work
from benchmarks.gpu.precision import FLOAT32
from benchmarks.gpu.sections import parity
from benchmarks.gpu.settings import Settings, attempt
from benchmarks.results import Section, Table, duration, number
from fastdl import functional, optim
from fastdl.ops.cross_entropy import cross_entropy_forward
from fastdl.ops.linear import linear_forward, linear_grad_input, linear_grad_weight

# float32 numbers of an array that no cache holds
_LARGE, _QUICK_LARGE = 1 << 28, 1 << 12
_BATCH, _NUM_INPUTS, _NUM_HIDDENS, _NUM_CLASSES = 256, 784, 256, 10
_LARGE_CLASSES, _QUICK_CLASSES = (10, 1000, 4096), (10,)
_NUM_PARAMETERS = 8


@dataclass(frozen=True)
class _Kernel:
    """A call to time: what it is, its op, its floor, and torch's way to the same result."""

    name: str
    op: str
    work: Work
    ours: Program
    torchs: Program | None = None


def copy_bandwidth(device: Device, num_elements: int, budget: float) -> float:
    """Return the bytes a second, read and written together, of torch's copy from an array to another."""
    source = torch.randn(num_elements, device=device.name)
    target = torch.empty_like(source)
    program = partial(target.copy_, source)
    program()
    return 2 * source.nbytes / times_of(device, {"copy": program}, budget=budget)["copy"].median


def measure(settings: Settings) -> Section:
    """Measure the copy, then time kernels."""
    large = _QUICK_LARGE if settings.quick else _LARGE
    bandwidth = copy_bandwidth(settings.device, large, settings.budget)
    section = Section(
        "Kernels beside their floors",
        f"Device time of a call in float32, many in one CUDA graph. A copy of {large * 4 / 2**20:.0f} MiB "
        f"moved {bandwidth / 1e9:.0f} GB/s here, read and written together; the peak by the clock is "
        + (f"{settings.flops / 1e12:.1f} TFLOP/s" if settings.flops else "unknown")
        + ". The floor is the larger of bytes by that and FLOPs by that. Small arrays lie in the GPU's cache "
        "and can be read faster than a copy, and a kernel's own start is more than their floor.",
    )
    section.figures |= {"copy, bytes a second": bandwidth, "peak, FLOP/s": settings.flops}
    settings.save(section)
    with FLOAT32.active(), torch.no_grad():
        _block("at the models' sizes", _small(settings.device.name), settings, section, bandwidth)
        _block("at large sizes", _large(settings, large), settings, section, bandwidth)
    return section


def _block(
    title: str, kernels: Iterator[_Kernel], settings: Settings, section: Section, bandwidth: float
) -> None:
    rows: list[list[str]] = []
    figures: dict[str, dict[str, object]] = {}
    section.figures[title] = figures
    section.tables.append(Table(title, ["kernel", "time", "floor", "floor / time", "torch"], rows))
    for kernel in kernels:
        if settings.lacks_parity(FLOAT32, kernel.op):
            section.failures.append(f"{kernel.name}: no time, as {kernel.op} has no parity")
            continue
        with attempt(section.failures, kernel.name):
            programs = {"fastdl": kernel.ours} | ({"torch": kernel.torchs} if kernel.torchs else {})
            for program in programs.values():
                program()
            times = kernel_times_of(settings.device, programs, budget=settings.budget / 3)
            floor, ours = kernel.work.floor(bandwidth, settings.flops), times["fastdl"].median
            figures[kernel.name] = {
                "op": kernel.op,
                "floor_s": floor,
                "share": floor / ours,
                "share of the copy": kernel.work.num_bytes / bandwidth / ours,
                "times": {name: timing.as_json() for name, timing in times.items()},
            }
            torchs = duration(times["torch"].median) if "torch" in times else ""
            share = f"{number(100 * floor / ours)} %"
            rows.append([kernel.name, duration(ours), duration(floor), share, torchs])
        settings.save(section)


def _small(device: str) -> Iterator[_Kernel]:
    n, k, m, c = _BATCH, _NUM_INPUTS, _NUM_HIDDENS, _NUM_CLASSES
    x, w, b = (torch.randn(shape, device=device) for shape in ((n, k), (m, k), (m,)))
    output = linear_forward(x, w, b, True)
    grad = torch.randn(n, m, device=device)
    head, logits = torch.randn(c, m, device=device), torch.randn(n, c, device=device)
    softmax = torch.randn(c, k, device=device)
    head_bias, target = torch.randn(c, device=device), torch.randint(c, (n,), device=device)

    def linear(name: str, work: Work, ours: Program, torchs: Program) -> _Kernel:
        return _Kernel(name, parity.LINEAR, work, ours, torchs)

    yield linear(
        f"linear + relu {n} x {k} x {m}",
        floors.product(n, k, m),
        partial(linear_forward, x, w, b, True),
        lambda: F.relu(F.linear(x, w, b)),
    )
    yield linear(
        f"grad_weight and grad_bias {n} x {k} x {m}",
        floors.product(m, n, k),
        partial(linear_grad_weight, grad, output, x, True, True),
        lambda: ((masked := grad * (output > 0)).t() @ x, masked.sum(0)),
    )
    yield linear(
        f"linear {n} x {m} x {c}",
        floors.product(n, m, c),
        partial(linear_forward, output, head, head_bias, False),
        lambda: F.linear(output, head, head_bias),
    )
    yield linear(
        f"grad_input {n} x {m} x {c}",
        floors.product(n, c, m),
        partial(linear_grad_input, logits, None, head),
        lambda: logits @ head,
    )
    yield linear(
        f"grad_weight and grad_bias {n} x {m} x {c}",
        floors.product(c, n, m),
        partial(linear_grad_weight, logits, None, output, True, True),
        lambda: (logits.t() @ output, logits.sum(0)),
    )
    yield linear(
        f"linear {n} x {k} x {c}",
        floors.product(n, k, c),
        partial(linear_forward, x, softmax, head_bias, False),
        lambda: F.linear(x, softmax, head_bias),
    )
    yield _Kernel(
        f"cross entropy and its gradient {n} x {c}",
        parity.CROSS_ENTROPY,
        floors.cross_entropy(n, c),
        _cross_entropy(logits, target),
    )
    yield _Kernel(
        f"relu {n} x {m}",
        parity.RELU,
        floors.elementwise(n * m, 2),
        partial(functional.relu, grad),
        partial(F.relu, grad),
    )
    points = torch.randn(10, 1, device=device), torch.randn(10, 1, device=device)
    yield _Kernel(
        "squared error 10 x 1",
        parity.MSE_LOSS,
        floors.elementwise(10, 2),
        partial(functional.mse_loss, *points),
        partial(F.mse_loss, *points),
    )
    parameters = [w, b, head, head_bias]
    yield from _updates("SGD of the MLP", parameters, momenta=(False,))


def _large(settings: Settings, num_elements: int) -> Iterator[_Kernel]:
    device = settings.device.name
    for c in _QUICK_CLASSES if settings.quick else _LARGE_CLASSES:
        n = num_elements // c
        logits, target = torch.randn(n, c, device=device), torch.randint(c, (n,), device=device)
        yield _Kernel(
            f"cross entropy and its gradient {n} x {c}",
            parity.CROSS_ENTROPY,
            floors.cross_entropy(n, c),
            _cross_entropy(logits, target),
            partial(_torchs_cross_entropy, logits, target),
        )
        del logits, target
    shape = (_NUM_PARAMETERS, num_elements // _NUM_PARAMETERS // 2)
    yield from _updates("SGD", list(torch.randn(shape, device=device)), momenta=(False, True))
    x, y = (torch.randn(num_elements, device=device) for _ in range(2))
    yield _Kernel(
        f"relu {num_elements}",
        parity.RELU,
        floors.elementwise(num_elements, 2),
        partial(functional.relu, x),
        partial(F.relu, x),
    )
    yield _Kernel(
        f"squared error {num_elements}",
        parity.MSE_LOSS,
        floors.elementwise(num_elements, 2),
        partial(functional.mse_loss, x, y),
        partial(F.mse_loss, x, y),
    )


def _cross_entropy(logits: Tensor, target: Tensor) -> Program:
    return partial(cross_entropy_forward, logits, target, None, -100, 0.0, "mean", True)


def _torchs_cross_entropy(logits: Tensor, target: Tensor) -> object:
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(leaf, target), leaf)


def _updates(name: str, parameters: list[Tensor], *, momenta: tuple[bool, ...]) -> Iterator[_Kernel]:
    size = sum(parameter.numel() for parameter in parameters)
    for momentum in momenta:
        yield _Kernel(
            f"{name}, {size} parameters" + ", momentum" * momentum,
            parity.SGD,
            floors.sgd(size, momentum=momentum),
            _update(optim.SGD, parameters, momentum),
            _update(torch.optim.SGD, parameters, momentum, fused=True),
        )


def _update(
    optimizer: Callable[..., torch.optim.Optimizer], tensors: list[Tensor], momentum: bool, **options: bool
) -> Program:
    parameters = [torch.nn.Parameter(tensor.clone()) for tensor in tensors]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    # so slow that a thousand steps leave the numbers ordinary
    return optimizer(parameters, lr=1e-6, momentum=0.9 if momentum else 0.0, **options).step
