"""What the host does for a call: a launch, an op, an op with its gradient, an optimizer's step."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.device import Program, host_time_of, repeat
from benchmarks.gpu.precision import FLOAT32
from benchmarks.gpu.sections import parity
from benchmarks.gpu.settings import Settings, attempt
from benchmarks.measuring import Timing
from benchmarks.results import Section, Table, duration
from fastdl import cuda_arrays, functional, models, optim

_CALLS, _QUICK_CALLS = 400, 3
_WARM_UP_CALLS = 20


def measure(settings: Settings) -> Section:
    """Time the host at calls whose device work is next to nothing."""
    section = Section(
        "Host time of a call",
        f"Time to issue one of {_CALLS} calls in a row that nobody waits for, float32; medians. The arrays "
        "are so small that the GPU keeps up.",
    )
    rows = []
    with FLOAT32.active():
        for what, (ops, ours, torchs) in _programs(settings).items():
            if settings.lacks_parity(FLOAT32, *ops):
                section.failures.append(f"{what}: no time, as {', '.join(ops)} has no parity")
                continue
            with attempt(section.failures, what):
                times = {"fastdl": _time(settings, ours)} | (
                    {"torch": _time(settings, torchs)} if torchs is not None else {}
                )
                section.figures[what] = {name: timing.as_json() for name, timing in times.items()}
                cells = [
                    duration(times[name].median) if name in times else "" for name in ("fastdl", "torch")
                ]
                rows.append([what, *cells])
    section.tables.append(Table("", ["call", "fastdl", "torch"], rows))
    return section


def _time(settings: Settings, program: Program) -> Timing:
    calls = _QUICK_CALLS if settings.quick else _CALLS
    repeat(program, min(calls, _WARM_UP_CALLS))
    return host_time_of(settings.device, program, calls=calls, rounds=2 if settings.quick else 7)


def _programs(settings: Settings) -> dict[str, tuple[tuple[str, ...], Program, Program | None]]:
    """Return for each call the ops that it is made of, fastdl's program and torch's."""
    name = settings.device.name
    x = torch.randn(16, 16, device=name)
    layer = [torch.randn(16, 16, device=name), torch.randn(16, device=name)]
    leaves = [tensor.clone().requires_grad_() for tensor in (x, *layer)]
    upstream = torch.ones(16, 16, device=name)

    def without_grad(function: Callable[..., Tensor], *inputs: Tensor) -> Program:
        def program() -> None:
            with torch.no_grad():
                function(*inputs)

        return program

    def with_grad(function: Callable[..., Tensor]) -> Program:
        return lambda: torch.autograd.grad(function(*leaves), leaves, upstream)

    def linear_relu(*layer: Tensor) -> Tensor:
        return F.relu(F.linear(*layer))

    update = (parity.SGD,)
    programs: dict[str, tuple[tuple[str, ...], Program, Program | None]] = {
        "relu": ((parity.RELU,), without_grad(functional.relu, x), without_grad(F.relu, x)),
        "linear + relu": (
            (parity.LINEAR,),
            without_grad(functional.linear_relu, x, *layer),
            without_grad(linear_relu, x, *layer),
        ),
        "linear + relu, forward and backward": (
            (parity.LINEAR,),
            with_grad(functional.linear_relu),
            with_grad(linear_relu),
        ),
        "SGD.step of the MLP": (update, _update(name, optim.SGD), _update(name, torch.optim.SGD)),
        "SGD.step of the MLP, beside torch's fused": (
            update,
            _update(name, optim.SGD),
            _update(name, torch.optim.SGD, fused=True),
        ),
    }
    if name == "cuda":
        programs = {"a kernel's launch, memory there": ((parity.RELU,), launch(x), None)} | programs
    return programs


def launch(x: Tensor) -> Program:
    """Return what launches the ReLU's kernel on memory that is there, with no op around it."""
    output = torch.empty_like(x)
    kernel = cuda_arrays.cuda_kernels().relu_forward
    return lambda: cuda_arrays.run(x, kernel, x, output)


def _update(device: str, optimizer: Callable[..., torch.optim.Optimizer], **options: bool) -> Program:
    net = models.MLP().to(device)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return optimizer(net.parameters(), lr=0.1, **options).step
