"""GFLOP/s of the three products of a linear layer, fastdl's and torch's, beside the core's peak."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measuring import Timing, interleaved, timed
from benchmarks.peak import peak_program
from benchmarks.results import Goal, Section, Table
from benchmarks.sections.settings import Settings
from fastdl import arrays
from fastdl.reference.parity import TIMES_TORCH

Program = Callable[[], object]

BATCH = 256
WIDTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_SHAPES = ((BATCH, 784, 256), (BATCH, 784, 10), (BATCH, 256, 10), (1, 784, 256), (10, 2, 1))
_GOAL_SHAPE, _GOAL = (BATCH, 784, 256), 90.0
_QUICK_SHAPES = (_GOAL_SHAPE, (BATCH, 64, 64), (10, 2, 1))
_FORWARD = "forward"
_TIMED_SECONDS = 0.003
# roundings of the largest number, for a product that torch happens to get exactly
_ROUNDINGS = 8


@dataclass(frozen=True)
class _Product:
    """One product on one set of operands."""

    name: str
    ours: Callable[[int], object]
    torchs: Program
    results: Callable[[], tuple[Tensor, Tensor]]
    truth: Callable[[], Tensor]


def measure(settings: Settings) -> Section:
    """Check and time the products over shapes, on one core and on all threads."""
    section = Section(
        "Matrix products",
        "GFLOP/s in float32 of a linear layer's products: forward (N, K) by (K, M) with its bias, "
        "grad_input, grad_weight with grad_bias; torch.mm writes the product alone. The operands are warm, "
        "medians of rounds in turn. The peak is a loop of nothing but multiply-adds on registers, timed in "
        "the same rounds.",
    )
    shapes = _QUICK_SHAPES if settings.quick else _SHAPES + tuple((BATCH, width, width) for width in WIDTHS)
    counts = sorted({1, settings.threads})
    figures: list[dict[str, Any]] = []
    try:
        for rows, inputs, outputs in shapes:
            settings.say(f"Products of {rows} x {inputs} x {outputs}")
            for product in _products(rows, inputs, outputs):
                figures += _measure_product(product, (rows, inputs, outputs), counts, settings, section)
    finally:
        torch.set_num_threads(settings.threads)
    section.figures["products"] = figures
    for count in counts:
        headings = ["N x K x M", "product", "fastdl", "torch", "peak", "share of the peak", "torch's share"]
        table = Table(f"{count} thread{'s' * (count > 1)}, GFLOP/s", headings, _rows(figures, count))
        section.tables.append(table)
    section.goals += [
        Goal(
            f"GEMM {'x'.join(map(str, _GOAL_SHAPE))} on one core, {found['product']}: share of the peak",
            100 * found["fastdl"] / found["peak"],
            _GOAL,
            unit="%",
            note=f"{100 * found['best'] / found['peak']:.0f} % at its best, torch "
            f"{100 * found['torch'] / found['peak']:.0f} % in the median; of {found['peak']:.0f} GFLOP/s",
        )
        for found in figures
        if tuple(found["shape"]) == _GOAL_SHAPE and found["threads"] == 1
    ]
    return section


def _measure_product(
    product: _Product, shape: tuple[int, int, int], counts: list[int], settings: Settings, section: Section
) -> list[dict[str, Any]]:
    product.ours(1)
    product.torchs()
    if not _is_accurate(product):
        section.failures.append(f"{' x '.join(map(str, shape))}, {product.name}: less accurate than torch")
        return []
    found = []
    num_flops = 2 * math.prod(shape)
    for count in counts:
        torch.set_num_threads(count)
        peak, peak_flops = peak_program(count, _TIMED_SECONDS)
        ours = partial(product.ours, count)
        programs = {"fastdl": _repeated(ours), "torch": _repeated(product.torchs), "peak": (peak, 1)}
        timings = interleaved(
            {name: program for name, (program, _) in programs.items()},
            budget=settings.seconds / 10,
            least=settings.least_rounds,
        )
        each: dict[str, Timing] = {name: timings[name] / times for name, (_, times) in programs.items()}
        found.append(
            {
                "shape": list(shape),
                "product": product.name,
                "threads": count,
                "fastdl": num_flops / each["fastdl"].median / 1e9,
                "torch": num_flops / each["torch"].median / 1e9,
                "peak": peak_flops / each["peak"].median / 1e9,
                "best": num_flops / min(each["fastdl"].seconds) / 1e9,
                "times": {name: timing.as_json() for name, timing in each.items()},
            }
        )
    return found


def _repeated(program: Program) -> tuple[Program, int]:
    """Return a program that calls another as often as takes a few milliseconds, and how often."""
    program()
    times = max(1, round(_TIMED_SECONDS / min(timed(program) for _ in range(3))))

    def repeated() -> None:
        for _ in range(times):
            program()

    return repeated, times


def _is_accurate(product: _Product) -> bool:
    """Return whether our error against float64 is within the rule's multiple of torch's."""
    ours, torchs = product.results()
    truth = product.truth()
    error, own = (float((result.double() - truth).square().mean().sqrt()) for result in (ours, torchs))
    rounding = _ROUNDINGS * torch.finfo(ours.dtype).eps * float(truth.abs().max())
    return error <= TIMES_TORCH * own + rounding


def _products(num_rows: int, num_inputs: int, num_outputs: int) -> list[_Product]:
    """Return the three products of a layer of this size, each writing to memory that is there."""
    kernels = arrays.cpu_kernels()
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    X, weight, bias = normal(num_rows, num_inputs), normal(num_outputs, num_inputs), normal(num_outputs)
    upstream = normal(num_rows, num_outputs)
    x, w, b, g = (tensor.numpy() for tensor in (X, weight, bias, upstream))
    no_gate = np.empty((0, 0), np.float32)
    grad_bias = torch.empty_like(bias).numpy()

    def outputs(like: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(like), torch.empty_like(like)

    forward, torch_forward = outputs(upstream)
    grad_input, torch_grad_input = outputs(X)
    grad_weight, torch_grad_weight = outputs(weight)
    return [
        _Product(
            _FORWARD,
            lambda count: kernels.linear_forward(x, w, b, False, forward.numpy(), count),
            lambda: torch.mm(X, weight.t(), out=torch_forward),
            lambda: (forward - bias, torch_forward),
            lambda: X.double() @ weight.double().t(),
        ),
        _Product(
            "grad_input",
            lambda count: kernels.linear_grad_input(g, no_gate, w, grad_input.numpy(), count),
            lambda: torch.mm(upstream, weight, out=torch_grad_input),
            lambda: (grad_input, torch_grad_input),
            lambda: upstream.double() @ weight.double(),
        ),
        _Product(
            "grad_weight",
            lambda count: kernels.linear_grad_weight(g, no_gate, x, grad_weight.numpy(), grad_bias, count),
            lambda: torch.mm(upstream.t(), X, out=torch_grad_weight),
            lambda: (grad_weight, torch_grad_weight),
            lambda: upstream.double().t() @ X.double(),
        ),
    ]


def _rows(figures: list[dict[str, Any]], threads: int) -> list[list[str]]:
    rows = []
    for found in figures:
        if found["threads"] != threads:
            continue
        ours, torchs, peak = found["fastdl"], found["torch"], found["peak"]
        rates = [f"{rate:.3g}" for rate in (ours, torchs)]
        shares = [f"{100 * rate / peak:.0f} %" for rate in (ours, torchs)]
        shape = " x ".join(map(str, found["shape"]))
        rows.append([shape, found["product"], *rates, f"{peak:.0f}", *shares])
    return rows
