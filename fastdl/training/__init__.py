"""Training: one way in, `fit`, and one result, `History`."""

from fastdl.training.fit import evaluate, fit, predict
from fastdl.training.history import History
from fastdl.training.loop import Scores

__all__ = ["History", "Scores", "evaluate", "fit", "predict"]
