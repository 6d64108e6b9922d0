"""Training: one way in, `fit`, and one result, `History`."""

from fastdl.training.evaluation import evaluate, predict
from fastdl.training.fit import fit
from fastdl.training.history import History
from fastdl.training.loop import Scores

__all__ = ["History", "Scores", "evaluate", "fit", "predict"]
