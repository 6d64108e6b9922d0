"""What the compiler makes of every CUDA kernel: registers, shared memory, instructions. It needs no GPU.

``python -m tests.compile_report`` writes the table to ``benchmarks/results/cuda-kernels.json`` and
``.md``, so that a change of a kernel shows in its review. ``tests/kernels/cuda/test_compile.py`` holds every
kernel to its limits.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from fastdl.cores import num_cores

ARCHITECTURES = ("sm_80", "sm_90a")
# each imports Numba, and a kernel takes about as long
_MOST_PROCESSES = 16
RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
_TOOLS = ("numba", "numba-cuda", "cuda-core", "nvidia-nvvm", "nvidia-nvjitlink")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")


@dataclass(frozen=True)
class Compiled:
    """One kernel's machine code for one architecture, in numbers."""

    kernel: str
    architecture: str
    threads: int
    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int
    instructions: int
    wide_loads: int
    wide_stores: int
    fused_multiply_adds: int
    float64_instructions: int
    local_memory_instructions: int


@dataclass(frozen=True)
class Built:
    """What a kernel becomes: its PTX, and on each architecture its machine code."""

    ptx: str
    machine_code: dict[str, Compiled]


@cache
def disassembler() -> str | None:
    """Return the path of ``nvdisasm``: on the path, in NVIDIA's package, or in Triton's; None without one."""
    candidates = [shutil.which("nvdisasm")]
    candidates += [str(path) for path in Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/nvdisasm")]
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        candidates.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"))
    return next((path for path in candidates if path and Path(path).exists()), None)


def _disassemble(code: bytes) -> Counter[str]:
    tool = disassembler()
    if tool is None:
        raise RuntimeError("nvdisasm is missing: install the package nvidia-cuda-nvdisasm, or triton")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    return Counter(_INSTRUCTION.findall(text))


def _is_float64(instruction: str) -> bool:
    return instruction.startswith(("DADD", "DMUL", "DFMA", "DSETP", "DMNMX")) or "F64" in instruction


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0


def build(kernel: str) -> Built:
    """Return what a kernel becomes."""
    from fastdl.kernels.cuda.launch import KERNELS

    ptx = KERNELS[kernel].ptx()
    return Built(ptx, {architecture: _compiled(kernel, ptx, architecture) for architecture in ARCHITECTURES})


def num_processes() -> int:
    """Return how many processes compile at once."""
    return min(num_cores(), _MOST_PROCESSES)


def _compiled(kernel: str, ptx: str, architecture: str) -> Compiled:
    from fastdl.kernels.cuda.launch import KERNELS, link

    code, log = link(ptx, architecture)
    count = _disassemble(code)

    def total(*prefixes: str) -> int:
        return sum(number for name, number in count.items() if name.startswith(prefixes))

    def wide(instruction: str, ptx_name: str) -> int:
        # 4 numbers of 2 bytes are moved by the instruction that moves a label, which only the PTX tells apart
        if kernel.endswith("float16"):
            return len(re.findall(rf"\b{ptx_name}\.global\.v(?:2\.\w32|4\.\w16)", ptx))
        return sum(n for name, n in count.items() if name.startswith(instruction) and ".128" in name)

    return Compiled(
        kernel=kernel,
        architecture=architecture,
        threads=KERNELS[kernel].threads,
        registers=_number(r"Used (\d+) registers", log),
        stack_bytes=_number(r"(\d+) bytes stack frame", log),
        spill_bytes=_number(r"(\d+) bytes spill stores", log) + _number(r"(\d+) bytes spill loads", log),
        # the linker's report leaves shared memory out
        shared_bytes=sum(int(size) for size in re.findall(r"\.shared .*\[(\d+)\];", ptx)),
        instructions=sum(count.values()) - count["NOP"],
        wide_loads=wide("LDG", "ld"),
        wide_stores=wide("STG", "st"),
        fused_multiply_adds=total("FFMA", "DFMA"),
        float64_instructions=sum(n for name, n in count.items() if _is_float64(name)),
        local_memory_instructions=total("LDL", "STL"),
    )


def tools() -> dict[str, str]:
    """Return the versions of what makes the machine code."""
    versions = {}
    for name in _TOOLS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    return versions


def _table(rows: list[Compiled]) -> str:
    lines = [
        "# The CUDA kernels, compiled",
        "",
        "Made by `python -m tests.compile_report` without a GPU, with "
        + ", ".join(f"{name} {number}" for name, number in tools().items())
        + ". Registers are those of a thread, shared memory that of a block. A wide access is 16 bytes, or 8 "
        "for four numbers of 2 bytes. No kernel has a stack frame or spills a register.",
        "",
        "| kernel | architecture | threads | registers | shared bytes | instructions | wide loads "
        "| wide stores |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row.kernel} | {row.architecture} | {row.threads} | {row.registers} | {row.shared_bytes} "
        f"| {row.instructions} | {row.wide_loads} | {row.wide_stores} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compile every kernel and write the table."""
    from fastdl.kernels.cuda.launch import KERNELS

    with ProcessPoolExecutor(num_processes(), multiprocessing.get_context("spawn")) as pool:
        rows = [row for built in pool.map(build, KERNELS) for row in built.machine_code.values()]
    content = {"tools": tools(), "kernels": [asdict(row) for row in rows]}
    (RESULTS / "cuda-kernels.json").write_text(json.dumps(content, indent=1) + "\n")
    (RESULTS / "cuda-kernels.md").write_text(_table(rows))
    sys.stdout.write(f"{len(rows)} kernels written to {RESULTS}/cuda-kernels.json and .md\n")


if __name__ == "__main__":
    main()
