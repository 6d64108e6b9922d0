"""The names of the programs, in the tables, the pictures and the goals."""

from __future__ import annotations

FIT, DROP_IN = "fastdl fit", "fastdl ops in a loop"
SCRATCH, CONCISE, TEXTBOOK = "from scratch", "concise (torch.nn)", "textbook loop"
EAGER, COMPILE, JAX, SKLEARN = "torch eager", "torch.compile", "JAX jit + scan", "scikit-learn"
GRAPH = "torch in a CUDA graph of an epoch"
MEDIUM = 'torch eager, precision "medium"'
CAPTURED, TORCH_CAPTURED = "fastdl in a CUDA graph", "torch in a CUDA graph"


def is_peer(name: str) -> bool:
    """Return whether fastdl is compared with a program: every other one that computes the same in memory."""
    return not name.startswith(("fastdl", TEXTBOOK, MEDIUM))
