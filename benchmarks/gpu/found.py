"""What a machine has of all that a visit uses, and what follows from what is missing.

Everything is asked of a process of its own or of files on disk, so that a broken driver or package is a
finding and not the end of the visit.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.gpu.floors import peak_flops

# the packages without which fastdl's kernels can't run on a GPU, by the name that they are installed under
NEEDED = ("torch", "numpy", "numba", "numba-cuda", "cuda-core", "platformdirs")
# and those that a part of the visit needs, with what is left out without them
USEFUL: Mapping[str, str] = {
    "pytest": "the tests",
    "jax": "JAX as a peer",
    "triton": "torch.compile as a peer",
    "matplotlib": "the pictures",
}
_SECONDS = 60.0
_SANITIZERS = ("/usr/local/cuda/bin/compute-sanitizer", "/usr/local/cuda/compute-sanitizer/compute-sanitizer")
_SMI_FIELDS = ("driver_version", "clocks.max.sm", "power.limit")

# what torch and fastdl say of the GPU
_PROBE = """
import json, torch
found = {"torch's CUDA": torch.version.cuda, "gpu": None}
if torch.cuda.is_available():
    device = torch.cuda.get_device_properties(0)
    found["gpu"] = device.name
    found["count"] = torch.cuda.device_count()
    found["capability"] = [device.major, device.minor]
    found["multiprocessors"] = device.multi_processor_count
    found["memory"] = device.total_memory
    found["L2"] = device.L2_cache_size
from fastdl.cuda_arrays import missing_link
found["missing link"] = missing_link(0)
print(json.dumps(found))
"""
_JAX_PROBE = "import jax; print(jax.default_backend())"


@dataclass
class Found:
    """What is there.

    Attributes
    ----------
    versions : dict of str to str
        Of Python and the packages, with "missing" for what is not installed.
    gpu : dict
        Name, driver, compute capability and so on; empty without a GPU.
    sanitizer : str or None
        The path of compute-sanitizer.
    jax : str
        JAX's backend, or "".
    missing : list of str
        In a sentence each, what keeps the kernels from running on a GPU here.
    left_out : list of str
        In a sentence each, what a visit does without here.
    """

    versions: dict[str, str] = field(default_factory=dict)
    gpu: dict[str, Any] = field(default_factory=dict)
    sanitizer: str | None = None
    jax: str = ""
    missing: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def has_gpu(self) -> bool:
        """Whether torch finds a GPU."""
        return bool(self.gpu.get("name"))

    @property
    def has_packages(self) -> bool:
        """Whether every package that the kernels can't do without is installed."""
        return not any(self.versions.get(name) == "missing" for name in NEEDED)

    @property
    def flops(self) -> float | None:
        """The float32 FLOPs a second that the GPU can do by its clock, where that is known."""
        if not self.gpu.get("clock"):
            return None
        major, minor = self.gpu["capability"]
        return peak_flops(self.gpu["multiprocessors"], (major, minor), self.gpu["clock"])

    @property
    def title(self) -> str:
        """The GPU, its driver and the versions, for tables and pictures."""
        name = self.gpu.get("name") or "no GPU"
        driver = f", driver {self.gpu['driver']}" if self.gpu.get("driver") else ""
        names = ("torch", "numba", "numba-cuda", "cuda-core", "jax")
        kept = [
            f"{key} {self.versions[key]}" for key in names if self.versions.get(key, "missing") != "missing"
        ]
        return f"{name}{driver}; Python {self.versions.get('Python', '')}, {', '.join(kept)}"

    def lines(self) -> list[str]:
        """Return what a visit prints at its start."""
        packages = ", ".join(f"{name} {number}" for name, number in self.versions.items() if name != "Python")
        lines = [f"GPU: {self._gpu_line()}", f"Python {self.versions.get('Python', '')}: {packages}"]
        lines.append(f"JAX's backend: {self.jax or 'none'}; compute-sanitizer: {self.sanitizer or 'missing'}")
        lines += [f"Can't do without: {sentence}" for sentence in self.missing]
        lines += [f"Does without: {sentence}" for sentence in self.left_out]
        return lines

    def _gpu_line(self) -> str:
        if not self.has_gpu:
            return "none"
        major, minor = self.gpu["capability"]
        return (
            f"{self.gpu['name']}, compute capability {major}.{minor}, {self.gpu['multiprocessors']} "
            f"multiprocessors, {self.gpu['memory'] / 2**30:.0f} GiB, "
            f"{self.gpu.get('clock', 0) / 1e6:.0f} MHz at most, driver {self.gpu.get('driver', 'unknown')}"
        )

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        return asdict(self)


def _run(command: list[str], root: Path) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, cwd=root, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else "no output"


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def sanitizer() -> str | None:
    """Return the path of compute-sanitizer, or None without it."""
    candidates = (shutil.which("compute-sanitizer"), *_SANITIZERS)
    return next((path for path in candidates if path and Path(path).exists()), None)


def find(root: Path, run: Callable[[list[str], Path], Any] = _run) -> Found:
    """Look at the machine.

    Parameters
    ----------
    root : Path
        The repository's root, from which processes are started.
    run : callable
        Runs a command in a folder; returns what ``subprocess.run`` does, or None where it can't be started
        or takes too long.

    Returns
    -------
    Found
    """
    found = Found()
    found.versions["Python"] = platform.python_version()
    found.versions |= {name: _installed(name) for name in (*NEEDED, *USEFUL)}
    found.missing += [
        f"the package {name} isn't installed, which fastdl[cu13] brings"
        for name in NEEDED
        if found.versions[name] == "missing"
    ]
    found.left_out += [
        f"{what}: the package {name} isn't installed"
        for name, what in USEFUL.items()
        if found.versions[name] == "missing"
    ]
    if found.versions["torch"] != "missing":
        _ask_torch(found, run([sys.executable, "-c", _PROBE], root))
    _ask_the_driver(found, root, run)
    found.sanitizer = sanitizer()
    if found.sanitizer is None:
        found.left_out.append("memcheck and racecheck: compute-sanitizer isn't there")
    if found.versions["jax"] != "missing":
        outcome = run([sys.executable, "-c", _JAX_PROBE], root)
        found.jax = _last_line(outcome.stdout) if outcome is not None and outcome.returncode == 0 else ""
        if found.jax != "gpu":
            found.left_out.append(f"JAX as a peer: its backend is {found.jax or 'broken'}, not gpu")
    return found


def _ask_torch(found: Found, outcome: Any) -> None:
    if outcome is None or outcome.returncode != 0:
        reason = "no answer in time" if outcome is None else _last_line(outcome.stderr)
        found.missing.append(f"torch and fastdl can't be imported: {reason}")
        return
    answer = json.loads(_last_line(outcome.stdout))
    if answer["missing link"]:
        found.missing.append(answer["missing link"])
    if answer["gpu"]:
        found.gpu = {"name": answer["gpu"]} | {
            name: answer[name] for name in ("count", "capability", "multiprocessors", "memory", "L2")
        }
    found.versions["torch's CUDA"] = str(answer["torch's CUDA"])


def _ask_the_driver(found: Found, root: Path, run: Callable[[list[str], Path], Any]) -> None:
    command = ["nvidia-smi", f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader,nounits"]
    outcome = run(command, root)
    if not found.has_gpu:
        return
    if outcome is None or outcome.returncode != 0:
        found.left_out.append("the driver's version and the arithmetic floor: nvidia-smi doesn't answer")
        return
    # a line for each GPU; the first is the one that is measured
    driver, clock, power = (text.strip() for text in outcome.stdout.splitlines()[0].split(","))
    found.gpu["driver"] = driver
    # "[N/A]" where the driver doesn't tell
    if clock.isdigit():
        found.gpu["clock"] = int(clock) * 1e6
    found.gpu["power limit, W"] = power
