"""The CUDA kernels, built once for all tests here."""

from __future__ import annotations

import pytest

from benchmarks import compile_report
from tests import ahead


@pytest.fixture(scope="package")
def built(request):
    """Build on all cores, what this run selects first; each test waits for its own kernels."""
    if compile_report.disassembler() is None:
        pytest.skip("nvdisasm is not installed: no CUDA kernel was disassembled")
    from fastdl.kernels.cuda.launch import KERNELS

    first = ahead.selected(request, "kernel")
    with compile_report.building(dict.fromkeys((*first, *KERNELS))) as futures:
        yield futures
