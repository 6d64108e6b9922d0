"""The pictures: readable files of a sensible size, that show what they were given."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from fastdl import plots
from fastdl.training import History, Scores

ROOT = Path(__file__).parent.parent


def history(num_epochs=3, accuracy=0.5, test=True):
    made = History()
    for epoch in range(num_epochs):
        made.append(1.0, Scores(1 / (epoch + 1), accuracy), Scores(0.5, accuracy) if test else None)
    return made


def width_of(path):
    pixels = imread(path)
    # drawn on, and not in one colour
    assert pixels[..., :3].std() > 0.01
    return pixels.shape[1]


@pytest.mark.parametrize(
    "histories",
    [
        {"": history()},
        {"": history(1)},
        {"": history(accuracy=None)},
        {"": history(test=False)},
        {"fused": history(), "concise": history(), "scratch": history(2)},
    ],
)
def test_curves_of_every_kind_of_history(histories, tmp_path):
    plots.curves(histories, tmp_path / "curves.png", title="Softmax regression")
    assert width_of(tmp_path / "curves.png") >= 1000


def test_curves_need_a_finished_epoch(tmp_path):
    with pytest.raises(ValueError, match="no finished epoch"):
        plots.curves({"": History()}, tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())


def test_a_diverged_run_can_be_drawn(tmp_path):
    diverged = history(2)
    diverged.append(1.0, Scores(float("nan"), 0.1), Scores(float("inf"), 0.1))
    plots.curves({"": diverged}, tmp_path / "curves.png")
    width_of(tmp_path / "curves.png")


def test_predictions_show_a_wrong_name_in_another_colour(tmp_path):
    images = torch.zeros(6, 28, 28, dtype=torch.uint8)
    right = ["ankle boot"] * 6
    plots.predictions(images, right, right, tmp_path / "right.png")
    plots.predictions(images, right, [*right[:5], "sneaker"], tmp_path / "wrong.png")
    red = [
        ((pixels[..., 0] > 0.7) & (pixels[..., 2] < 0.2)).sum()
        for pixels in (imread(tmp_path / "right.png"), imread(tmp_path / "wrong.png"))
    ]
    assert red[0] == 0
    assert red[1] > 50


def test_residuals_and_speedup_are_written(tmp_path):
    plots.residuals(torch.rand(20, 1), torch.rand(20, 1), tmp_path / "residuals.png")
    plots.speedup(
        {"Softmax regression": {"textbook loop": 4.0, "fused": 0.04}, "MLP": {"textbook loop": 5.0}},
        tmp_path / "speedup.png",
        note="a machine",
    )
    assert width_of(tmp_path / "residuals.png") >= 1000
    assert width_of(tmp_path / "speedup.png") >= 1000


def test_an_unknown_format_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="bmpx"):
        history().plot(tmp_path / "curves.bmpx")
    assert not list(tmp_path.iterdir())


_PLOT = """
import sys
import fastdl.plots
print("fastdl.training.history" in sys.modules, "matplotlib" in sys.modules)
from fastdl.training import History, Scores
history = History()
history.append(1.0, Scores(0.5))
for name in sys.argv[1:]:
    history.plot(name)
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["nonsense", "tkagg", "module://nowhere"])
def test_a_picture_needs_no_backend_and_plots_need_no_history(backend, tmp_path):
    paths = [tmp_path / f"curves.{suffix}" for suffix in ("png", "svg", "pdf")]
    environment = os.environ | {"MPLBACKEND": backend, "DISPLAY": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _PLOT, *map(str, paths)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False", "False"], done.stderr
    assert [path.read_bytes()[:4] for path in paths] == [b"\x89PNG", b"<?xm", b"%PDF"]


@pytest.mark.slow
def test_a_backend_that_matplotlib_knows_is_still_the_users():
    program = "from fastdl import plots; plots._import_matplotlib(); import matplotlib as m, os; "
    program += "print(m.rcParams['backend'].lower(), os.environ['MPLBACKEND'])"
    environment = os.environ | {"MPLBACKEND": "svg", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["svg", "svg"], done.stderr


@pytest.mark.parametrize(
    ("ratio", "text"), [(0.834, "0.83"), (1.456, "1.46"), (14.56, "14.6"), (102.4, "102"), (1234.5, "1234")]
)
def test_times_has_three_figures(ratio, text):
    assert plots.times(ratio) == text
