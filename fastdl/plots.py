"""The pictures: curves over epochs, predictions, speed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastdl.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind can tell apart
_BLUE, _ORANGE, _GREEN, _RED, _GREY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#666666"
_CURVES = {
    "train_loss": ("train loss", _BLUE),
    "test_loss": ("loss over all data", _ORANGE),
    "train_accuracy": ("train accuracy", _ORANGE),
    "test_accuracy": ("test accuracy", _GREEN),
}
# a line first; the runs that should coincide with it as marks on it, one inside the other
_MARKS: Sequence[dict[str, Any]] = (
    {"linestyle": "-", "linewidth": 2},
    {"linestyle": "", "marker": "o", "markersize": 10, "markerfacecolor": "none", "markeredgewidth": 1.2},
    {"linestyle": "", "marker": "x", "markersize": 6, "markeredgewidth": 1.5},
    {"linestyle": "", "marker": "s", "markersize": 14, "markerfacecolor": "none", "markeredgewidth": 0.8},
)
_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
}
_DOTS_PER_INCH = 150


def draw(folder: Path, pictures: Mapping[str, Callable[[Path], None]]) -> dict[str, str]:
    """Draw pictures, by their files' names; return for each that can't be drawn why."""
    failures = {}
    for name, draw_one in pictures.items():
        try:
            draw_one(folder / name)
        except Exception as error:
            failures[name] = str(error) or type(error).__name__
    return failures


@contextmanager
def _picture(
    path: str | os.PathLike[str], width: float, height: float, style: dict[Any, Any] = _STYLE, **options: Any
) -> Iterator[Figure]:
    """Give a figure, of so many inches, which is written when the block ends well; it needs no backend."""
    _import_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(style):
        figure = Figure(figsize=(width, height), **options)
        yield figure
        with replacing(path) as temporary:
            # told the format, matplotlib appends no suffix to the name
            figure.savefig(temporary, format=temporary.suffix[1:] or "png", dpi=_DOTS_PER_INCH)


def _import_matplotlib() -> None:
    """Import matplotlib, which raises where MPLBACKEND names a backend that it doesn't know."""
    if "matplotlib" in sys.modules or not os.environ.get("MPLBACKEND"):
        return
    backend = os.environ.pop("MPLBACKEND")
    try:
        import matplotlib
    finally:
        os.environ["MPLBACKEND"] = backend
    with suppress(ValueError):
        matplotlib.rcParams["backend"] = backend


def curves(histories: Mapping[str, Any], path: str | os.PathLike[str], *, title: str = "") -> None:
    """Draw train loss, train accuracy and test accuracy over epochs; of a regression the losses.

    Parameters
    ----------
    histories : mapping of str to History
        By the run's name, up to four: what has `figures`; the first is drawn as lines, the others as marks.
    path : path
        Its suffix chooses the format, PNG without one.
    title : str
        Above the picture.

    Raises
    ------
    ValueError
        If no epoch is finished.
    """
    measured = [history.figures() for history in histories.values()]
    if not any(measured):
        raise ValueError("there is no finished epoch to draw")
    with _picture(path, 7, 4.2, layout="constrained") as figure:
        from matplotlib.lines import Line2D
        from matplotlib.ticker import MaxNLocator

        axes = figure.add_subplot()
        classifies = any("train_accuracy" in figures for figures in measured)
        names = ["train_loss", *(["train_accuracy", "test_accuracy"] if classifies else ["test_loss"])]
        drawn = [name for name in names if any(name in figures for figures in measured)]
        for figures, marks in zip(measured, _MARKS, strict=False):
            for name in drawn:
                # a run has no epoch to show, or no test data, where another has
                values = figures.get(name, [])
                axes.plot(range(1, len(values) + 1), values, color=_CURVES[name][1], **marks)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if classifies:
            axes.set_ylabel("loss (nats), accuracy")
            axes.set_ylim(bottom=0)
        else:
            axes.set_ylabel("loss (log scale)")
            axes.set_yscale("log")
        axes.set_title(title)
        keys = [Line2D([], [], color=_CURVES[name][1], linewidth=2) for name in drawn]
        figure.legend(keys, [_CURVES[name][0] for name in drawn], loc="outside lower center", ncols=3)
        if len(histories) > 1:
            keys = [Line2D([], [], color="black", **marks) for marks in _MARKS[: len(histories)]]
            axes.legend(keys, list(histories), loc="best")


def predictions(
    images: Tensor, labels: Sequence[str], predicted: Sequence[str], path: str | os.PathLike[str]
) -> None:
    """Draw images in a row, each under its true class over the predicted one.

    Parameters
    ----------
    images : Tensor
        (N, H, W), grey.
    labels, predicted : sequence of str
        The N names of the true and of the predicted classes; a wrong prediction is drawn in red.
    path : path
        Its suffix chooses the format, PNG without one.
    """
    width = 1.4 * len(images) + 1
    with _picture(path, width, 2, _STYLE | {"axes.grid": False}) as figure:
        panels = figure.subplots(1, len(images), squeeze=False)[0]
        figure.subplots_adjust(left=1 / width, right=0.99, bottom=0.03, top=0.72, wspace=0.1)
        for axes, image, label, prediction in zip(panels, images, labels, predicted, strict=True):
            axes.imshow(image.numpy(), cmap="gray_r")
            axes.set_axis_off()
            axes.text(0.5, 1.25, label, transform=axes.transAxes, ha="center")
            color = _GREEN if prediction == label else _RED
            axes.text(0.5, 1.08, prediction, transform=axes.transAxes, ha="center", color=color)
        for height, text in ((1.25, "true"), (1.08, "predicted")):
            panels[0].text(-0.15, height, text, transform=panels[0].transAxes, ha="right", color=_GREY)


def residuals(y: Tensor, y_hat: Tensor, path: str | os.PathLike[str]) -> None:
    """Draw how far a regression's predictions are from the labels.

    Parameters
    ----------
    y, y_hat : Tensor
        Labels and predictions, of one size.
    path : path
        Its suffix chooses the format, PNG without one.
    """
    with _picture(path, 7, 3.5, layout="constrained") as figure:
        axes = figure.add_subplot()
        labels = y.reshape(-1)
        axes.axhline(0, color=_GREY, linewidth=1)
        axes.scatter(labels.numpy(), (y_hat.reshape(-1) - labels).numpy(), s=8, color=_BLUE, alpha=0.6)
        axes.set_xlabel("label y")
        axes.set_ylabel("prediction - label")


def speedup(
    seconds: Mapping[str, Mapping[str, float]], path: str | os.PathLike[str], *, note: str = ""
) -> None:
    """Draw the time of an epoch for each model and program, with its speed-up over the model's first.

    Parameters
    ----------
    seconds : mapping of str to mapping of str to float
        By the model's title and the program's name; a model's first program is the baseline.
    path : path
        Its suffix chooses the format, PNG without one.
    note : str
        Under the picture: what it was measured on.
    """
    colors = (_GREY, _ORANGE, _BLUE, _GREEN, _RED)
    height = 0.5 + 1.9 * len(seconds)
    with _picture(path, 8, height, _STYLE | {"axes.grid.axis": "x"}, layout="constrained") as figure:
        from matplotlib.ticker import FuncFormatter

        panels = figure.subplots(len(seconds), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (title, programs) in zip(panels, seconds.items(), strict=True):
            _bars(axes, title, programs, colors)
        values = [value for programs in seconds.values() for value in programs.values()]
        panels[0].set_xscale("log")
        # space for the numbers on the right; bars on a log axis have no natural start
        panels[0].set_xlim(min(values) / 3, max(values) * (max(values) / min(values) * 3) ** 0.35)
        panels[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: _duration(value)))
        panels[-1].set_xlabel("time of an epoch (log scale); x: times faster than the textbook loop")
        if note:
            figure.supxlabel(note, fontsize=8, color=_GREY)


def _bars(axes: Axes, title: str, programs: Mapping[str, float], colors: Sequence[str]) -> None:
    baseline = next(iter(programs.values()))
    bars = axes.barh(list(programs), list(programs.values()), color=colors[: len(programs)])
    labels = [
        f" {_duration(value)}" + (f", {times(baseline / value)} x" if value != baseline else "")
        for value in programs.values()
    ]
    axes.bar_label(bars, labels, padding=2)
    axes.invert_yaxis()
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")


def _duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= 0.9995 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def times(ratio: float) -> str:
    """Return a ratio in three figures: 1.46, 14.6, 146."""
    return f"{ratio:.{max(0, 2 - (ratio >= 10) - (ratio >= 100))}f}"
