"""The names of the programs, in the tables, the pictures and the goals."""

from __future__ import annotations

FIT = "fastdl fit"
FIT_FLOATS = "fastdl fit, float32 images"
FIT_LOOP = "fastdl fit(compiled=False)"
DROP_IN = "fastdl ops in a loop"
SCRATCH, CONCISE = "from scratch", "concise (torch.nn)"
EAGER, COMPILE, JAX = "torch eager", "torch.compile", "JAX jit + scan"
GRAPH_STEP, GRAPH_EPOCH = "torch graph of a step", "torch graph of an epoch"
SKLEARN, SGD_CLASSIFIER = "scikit-learn", "scikit-learn SGDClassifier"
TEXTBOOK, TEXTBOOK_WORKERS = "textbook loop", "textbook loop, 2 loader processes"
MEDIUM = 'torch eager, precision "medium"'
# an epoch without a call's own work: draw the order, look at the net
ALONE = (f"{FIT}, compiled epoch alone", f"{JAX}, scan alone")
# of a step
MODULES, ACCELERATED = "fastdl", "fastdl.accelerate"
FUSED = f"{EAGER}, fused SGD"
CAPTURED, TORCH_CAPTURED = "fastdl in a CUDA graph", "torch in a CUDA graph"


def is_peer(name: str) -> bool:
    """Return whether fastdl is compared with a program: every other one that computes the same in memory."""
    return not name.startswith(("fastdl", TEXTBOOK, SGD_CLASSIFIER, MEDIUM))
