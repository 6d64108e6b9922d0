"""The compile gate: every CUDA kernel that ships becomes machine code within its limits. It needs no GPU."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed: no CUDA kernel was compiled")

from fastdl.kernels.cuda.launch import KERNELS
from tests import compile_report

if compile_report.disassembler() is None:
    pytest.skip("nvdisasm is not installed: no CUDA kernel was disassembled", allow_module_level=True)

STATIC_SHARED_BYTES = 48 << 10
REGISTERS_OF_A_MULTIPROCESSOR = 1 << 16
# sums over a whole array of labels or of partial sums, squares that nobody reduces, and rows that lanes share
WITHOUT_WIDE_LOADS = ("add_partial_sums", "cross_entropy_total_weight", "mse_loss_elements", "loss", "small")
WITHOUT_WIDE_STORES = (*WITHOUT_WIDE_LOADS, "linear", "dense", "mse_loss_block_sums")


@pytest.mark.ahead(compile_report.build, "kernel")
@pytest.mark.parametrize("architecture", compile_report.ARCHITECTURES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_keeps_its_limits(kernel, architecture, ahead):
    result = ahead(compile_report.build, kernel).result().machine_code[architecture]
    assert 0 < result.registers * result.threads <= REGISTERS_OF_A_MULTIPROCESSOR
    assert result.stack_bytes == result.spill_bytes == result.local_memory_instructions == 0
    assert result.shared_bytes <= STATIC_SHARED_BYTES
    if kernel.endswith("float64"):
        assert result.float64_instructions > 0, "the pattern for float64 instructions finds none"
    else:
        assert result.float64_instructions == 0
    assert (result.wide_loads > 0) == (not kernel.startswith(WITHOUT_WIDE_LOADS))
    assert (result.wide_stores > 0) == (not kernel.startswith(WITHOUT_WIDE_STORES))
    if kernel.startswith(("linear", "dense", "head")):
        # the square of sums that a thread holds is computed without a loop around it
        assert result.fused_multiply_adds >= 32


def test_the_table_of_the_results_is_that_of_these_kernels(ahead):
    table = json.loads((compile_report.RESULTS / "cuda-kernels.json").read_text())
    names = {(row["kernel"], row["architecture"]) for row in table["kernels"]}
    remedy = "run python -m tests.compile_report"
    assert names == {(name, arch) for name in KERNELS for arch in compile_report.ARCHITECTURES}, remedy
    if table["tools"] == compile_report.tools():
        built = {kernel: ahead(compile_report.build, kernel) for kernel in KERNELS}
        for row in table["kernels"]:
            result = built[row["kernel"]].result().machine_code[row["architecture"]]
            assert row == vars(result), remedy
