"""Linear regression, softmax regression and the multilayer perceptron on compiled Numba kernels."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdl import data, functional, models, nn, optim, reference
    from fastdl.nn import accelerate
    from fastdl.training.evaluation import evaluate, predict
    from fastdl.training.fit import fit
    from fastdl.training.history import History

__version__ = "0.1.0"
__all__ = [
    "History",
    "accelerate",
    "data",
    "evaluate",
    "fit",
    "functional",
    "models",
    "nn",
    "optim",
    "predict",
    "reference",
]

_HOMES = {
    "History": "fastdl.training",
    "accelerate": "fastdl.nn",
    "evaluate": "fastdl.training",
    "fit": "fastdl.training",
    "predict": "fastdl.training",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fastdl' has no attribute {name!r}; it has {', '.join(__all__)}")
    home = _HOMES.get(name)
    return getattr(import_module(home), name) if home else import_module(f"fastdl.{name}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
