"""What training returns: loss, accuracy and time of each epoch."""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

from fastdl.files import replacing
from fastdl.training.loop import Scores


def _text(name: str, value: float) -> str:
    if name.endswith("accuracy"):
        return f"{value:.4f}"
    return f"{value:.3g}" if name == "seconds" else f"{value:.4g}"


@dataclass
class History:
    """The figures of each finished epoch.

    A list is empty where the figure was not measured: accuracies of a regression, test figures without test
    data. A notebook shows a History as a table.

    Attributes
    ----------
    train_loss, train_accuracy : list of float
        Met on the way, before each update, as means over the examples.
    test_loss, test_accuracy : list of float
        After the epoch.
    seconds : list of float
        Wall-clock time of each epoch's training, evaluation not counted.

    Examples
    --------
    >>> history = History()
    >>> history.append(0.5, Scores(1.25, 0.75))
    >>> print(history.table())
    epoch  train loss  train accuracy  seconds
        1        1.25          0.7500      0.5
    """

    train_loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        """Return how many epochs are finished."""
        return len(self.seconds)

    def append(self, seconds: float, train: Scores, test: Scores | None = None) -> None:
        """Add a finished epoch.

        Parameters
        ----------
        seconds : float
            Time of its training.
        train : Scores
            Met on the way.
        test : Scores, optional
            After the epoch.

        Raises
        ------
        ValueError
            If the epoch has a figure that those before it don't have, or the other way round.
        """
        values = {"train_loss": train.loss, "train_accuracy": train.accuracy, "seconds": seconds}
        if test is not None:
            values |= {"test_loss": test.loss, "test_accuracy": test.accuracy}
        measured = {name: value for name, value in values.items() if value is not None}
        before = self.figures()
        if before and before.keys() != measured.keys():
            raise ValueError(
                f"each epoch must have the figures of the first, {', '.join(before)}, but this one has "
                f"{', '.join(sorted(measured))}"
            )
        num_epochs = len(self)
        try:
            for name, value in measured.items():
                getattr(self, name).append(value)
        # Ctrl-C too
        except BaseException:
            for name in measured:
                del getattr(self, name)[num_epochs:]
            raise

    def figures(self) -> dict[str, list[float]]:
        """Return the figures that were measured, by name, each a list with one value for each epoch."""
        return {name: values for name in self.__dataclass_fields__ if (values := getattr(self, name))}

    def scaled(self, factor: float) -> History:
        """Return a copy whose losses are multiplied by `factor`."""
        losses = ("train_loss", "test_loss")
        scaled = {name: [factor * loss for loss in getattr(self, name)] for name in losses}
        return replace(deepcopy(self), **scaled)

    def rows(self) -> list[list[str]]:
        """Return the table as text: a row of headings, then a row for each epoch."""
        figures = self.figures()
        headings = ["epoch", *(name.replace("_", " ") for name in figures)]
        cells = [[_text(name, value) for value in values] for name, values in figures.items()]
        return [headings, *([str(epoch + 1), *row] for epoch, row in enumerate(zip(*cells, strict=True)))]

    def last(self) -> dict[str, str]:
        """Return the last epoch's figures as text, by name."""
        return {name.replace("_", " "): _text(name, values[-1]) for name, values in self.figures().items()}

    def table(self) -> str:
        """Return the figures as a plain table, one line for each epoch."""
        rows = self.rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.rjust, row, widths)) for row in rows)
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        tags = ["th", *["td"] * len(self)]
        rows = (
            "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
            for tag, row in zip(tags, self.rows(), strict=True)
        )
        return f"<table>{''.join(rows)}</table>"

    def plot(self, path: str | os.PathLike[str], title: str = "") -> None:
        """Draw the curves over epochs and write them as a picture.

        Parameters
        ----------
        path : path
            Its suffix chooses the format: .png, .svg, .pdf.
        title : str
            Above the picture.

        Raises
        ------
        ValueError
            If no epoch is finished, or matplotlib does not know the format.
        """
        from fastdl import plots

        plots.curves({"": self}, path, title=title)

    def save(self, path: str | os.PathLike[str], settings: Mapping[str, Any] | None = None) -> None:
        """Write the figures as JSON: ``{"settings": {...}, "train_loss": [...], ...}``.

        JSON has no NaN or infinity: such a figure is written as null. The file is written beside and renamed.

        Parameters
        ----------
        path : path
        settings : mapping, optional
            What else belongs to the run, such as its hyperparameters; of JSON's types.
        """
        figures: dict[str, Any] = {
            name: [value if math.isfinite(value) else None for value in values]
            for name, values in self.figures().items()
        }
        content = ({"settings": dict(settings)} if settings is not None else {}) | figures
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
