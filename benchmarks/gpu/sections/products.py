"""The three products of a linear layer at many sizes: fastdl's kernel, what the op does, and cuBLAS alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import precision
from benchmarks.gpu.device import Program, kernel_times_of
from benchmarks.gpu.precision import Precision
from benchmarks.gpu.sections import parity
from benchmarks.gpu.settings import Settings, attempt
from benchmarks.results import Section, Table, duration, number
from fastdl.ops import _cuda
from fastdl.ops.linear import linear_forward, linear_grad_input, linear_grad_weight

WIDTHS = (64, 256, 1024, 4096)
BATCHES = (32, 256, 2048, 16384, 65536)
KERNEL, HANDED_OVER, OP, CUBLAS = "kernel", "cuBLAS + epilogue", "op", "cuBLAS"
_QUICK_WIDTHS, _QUICK_BATCHES = (64,), (32,)
# A sum of 65,536 products rounds more often than those that the parity section looks at.
_TIMES_ERROR = 5.0
# the op chose well if it is as fast as the faster way, within what a timing varies
_CHOSE_WELL = 1.1
_CELL_SECONDS = 5.0


@contextmanager
def limits(most_products: int) -> Iterator[None]:
    """Let fastdl's kernels compute each product of at most so many multiply-adds; larger ones are torch's."""
    before = _cuda.MOST_PRODUCTS, _cuda.MOST_PRODUCTS_BESIDE_TENSOR_CORES
    _cuda.MOST_PRODUCTS = _cuda.MOST_PRODUCTS_BESIDE_TENSOR_CORES = most_products
    try:
        yield
    finally:
        _cuda.MOST_PRODUCTS, _cuda.MOST_PRODUCTS_BESIDE_TENSOR_CORES = before


def measure(settings: Settings) -> Section:
    """Time every product of every size in every precision."""
    section = Section(
        "Products beside cuBLAS",
        "Device time of (batch, width) by (width, width): forward with bias and ReLU, grad_input with the "
        "ReLU's mask, grad_weight with the mask and grad_bias. 'kernel' is fastdl's own at any size, 'cuBLAS "
        "+ epilogue' torch's product with fastdl's kernels around it, 'op' what the op chooses by size, and "
        "'cuBLAS' torch's bare product, which adds at most the bias. The share is cuBLAS's time over the "
        f"op's. A cell's gate: the results are torch's within {_TIMES_ERROR:g} times the precision's bound.",
    )
    # the CPU's kernels, in a rehearsal, have no half precision
    precisions = [
        block for block in precision.TIMED if settings.device.name == "cuda" or block.dtype == torch.float32
    ]
    cells: list[dict[str, Any]] = []
    section.figures |= {"cells": cells, "limits": {name: getattr(_cuda, name) for name in _limit_names()}}
    for block in precisions:
        if settings.lacks_parity(block, parity.LINEAR):
            section.failures.append(f"{block.name}: no time, as linear has no parity")
            continue
        with block.active(), torch.no_grad():
            for width in _QUICK_WIDTHS if settings.quick else WIDTHS:
                for batch in _QUICK_BATCHES if settings.quick else BATCHES:
                    if not settings.has_time(_CELL_SECONDS * (not settings.quick)):
                        section.failures.append(f"{block.name}, {batch} x {width}: no time was left")
                        continue
                    with attempt(section.failures, f"{block.name}, {batch} x {width}"):
                        found = _measure_cell(width, batch, block, settings)
                        section.failures += [cell["failure"] for cell in found if "failure" in cell]
                        cells += [cell for cell in found if "failure" not in cell]
                    section.tables = [_table(cells, name.name) for name in precisions]
                    settings.save(section)
    section.figures["chose the slower way"] = slower_choices(cells)
    return section


def _limit_names() -> tuple[str, str]:
    return "MOST_PRODUCTS", "MOST_PRODUCTS_BESIDE_TENSOR_CORES"


def _measure_cell(width: int, batch: int, block: Precision, settings: Settings) -> list[dict[str, Any]]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=settings.device.name).to(block.dtype)

    x, weight, bias, grad = normal(batch, width), normal(width, width), normal(width), normal(batch, width)
    output = torch.relu(torch.addmm(bias, x, weight.t()))
    masked = torch.where(output > 0, grad, 0.0)
    forward, grad_input = linear_forward, linear_grad_input
    products: dict[str, tuple[Program, Program, Tensor]] = {
        "forward": (
            partial(forward, x, weight, bias, True),
            partial(torch.addmm, bias, x, weight.t()),
            output,
        ),
        "grad_input": (
            partial(grad_input, grad, output, weight),
            partial(torch.mm, grad, weight),
            masked @ weight,
        ),
        "grad_weight": (
            partial(linear_grad_weight, grad, output, x, True, True),
            partial(torch.mm, grad.t(), x),
            masked.t() @ x,
        ),
    }
    return [
        {"precision": block.name, "product": name, "width": width, "batch": batch}
        | _measure_product(ours, cublas, expected, block, settings, f"{block.name}, {name} {batch} x {width}")
        for name, (ours, cublas, expected) in products.items()
    ]


def _measure_product(
    ours: Program, cublas: Program, expected: Tensor, block: Precision, settings: Settings, what: str
) -> dict[str, Any]:
    programs: dict[str, Program] = {
        KERNEL: partial(_limited, sys.maxsize, ours),
        HANDED_OVER: partial(_limited, -1, ours),
        OP: ours,
        CUBLAS: cublas,
    }
    for name, program in programs.items():
        found = program()
        # cuBLAS's bare product has neither the ReLU nor its mask
        if name == CUBLAS:
            continue
        result = found[0] if isinstance(found, tuple) else found
        assert isinstance(result, Tensor)
        error = parity.relative_error(result, expected)
        if not error <= _TIMES_ERROR * block.error:
            return {"failure": f"{what}, {name}: differs from torch's by {error:.1e}"}
    del found, result
    times = kernel_times_of(settings.device, programs, budget=settings.budget / 10, most=5)
    medians = {name: timing.median for name, timing in times.items()}
    return {"share": medians[CUBLAS] / medians[OP], "times": medians}


def _limited(most_products: int, program: Program) -> object:
    with limits(most_products):
        return program()


def slower_choices(cells: list[dict[str, Any]]) -> list[str]:
    """Return the cells in which the op takes the slower of its two ways, and by how much."""
    found = []
    for cell in cells:
        faster = min((KERNEL, HANDED_OVER), key=lambda name: float(cell["times"][name]))
        gain = cell["times"][OP] / cell["times"][faster]
        if gain > _CHOSE_WELL:
            words = f"{cell['precision']}, {cell['product']} {cell['batch']} x {cell['width']}"
            found.append(f"{words}: {faster} is {number(gain)} x faster than the op")
    return found


def _table(cells: list[dict[str, Any]], name: str) -> Table:
    rows = [
        [
            f"{cell['batch']} x {cell['width']}, {cell['product']}",
            *(duration(cell["times"][way]) for way in (KERNEL, HANDED_OVER, OP, CUBLAS)),
            f"{number(100 * cell['share'])} %",
        ]
        for cell in cells
        if cell["precision"] == name
    ]
    headings = ["batch x width", KERNEL, HANDED_OVER, OP, CUBLAS, "share of cuBLAS"]
    return Table(name, headings, rows)
