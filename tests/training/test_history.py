"""History: what it shows and what it writes."""

from __future__ import annotations

import json
import math

import pytest

from fastdl.training import History, Scores


def classifier_history():
    history = History()
    history.append(0.5, Scores(0.75, 0.5), Scores(0.8, 0.4))
    history.append(0.25, Scores(0.000123456, 0.9), Scores(0.7, 0.6))
    return history


def test_table_has_a_line_for_each_epoch_and_a_column_for_each_figure():
    assert classifier_history().table().splitlines() == [
        "epoch  train loss  train accuracy  test loss  test accuracy  seconds",
        "    1        0.75          0.5000        0.8         0.4000      0.5",
        "    2   0.0001235          0.9000        0.7         0.6000     0.25",
    ]


def test_figures_that_were_not_measured_are_left_out():
    history = History()
    history.append(0.5, Scores(0.75))
    assert history.figures() == {"train_loss": [0.75], "seconds": [0.5]}
    assert History().table() == "epoch"


def test_a_notebook_shows_a_table():
    html = classifier_history()._repr_html_()
    assert html.count("<tr>") == 3
    assert "<th>train loss</th>" in html
    assert "<td>0.9000</td>" in html


class _Reluctant(list):
    """A list to which nothing can be appended."""

    def append(self, value):
        raise self.error


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt()])
@pytest.mark.parametrize("name", ["train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds"])
def test_an_epoch_that_cannot_be_appended_leaves_no_trace(name, error):
    history = classifier_history()
    before = history.figures()
    reluctant = _Reluctant(getattr(history, name))
    reluctant.error = error
    setattr(history, name, reluctant)
    with pytest.raises(type(error)):
        history.append(1.0, Scores(0.1, 0.9), Scores(0.2, 0.8))
    assert history.figures() == before
    assert len(history) == 2


@pytest.mark.parametrize(
    ("train", "test"),
    [
        (Scores(0.1), Scores(0.2, 0.3)),
        (Scores(0.1, 0.2), Scores(0.2)),
        (Scores(0.1), Scores(0.2)),
        (Scores(0.1, 0.2), None),
        (None, Scores(0.1, 0.2)),
        (Scores(0.1, 0.2), (0.1, 0.2)),
    ],
)
def test_an_epoch_with_other_figures_than_the_first_is_refused(train, test):
    history = classifier_history()
    before = json.dumps(history.figures())
    with pytest.raises((ValueError, AttributeError)):
        history.append(1.0, train, test)
    assert json.dumps(history.figures()) == before
    assert len(history.rows()) == 3


def test_figures_that_come_later_are_refused_by_name():
    history = History()
    history.append(0.5, Scores(0.75))
    with pytest.raises(ValueError, match=r"the first, train_loss, seconds, but this one has .*test_accuracy"):
        history.append(0.5, Scores(0.75), Scores(0.5, 0.5))
    assert history.figures() == {"train_loss": [0.75], "seconds": [0.5]}


def test_save_writes_json_with_settings_first(tmp_path):
    path = tmp_path / "new" / "history.json"
    classifier_history().save(path, {"lr": 0.1})
    saved = json.loads(path.read_text())
    assert list(saved) == [
        "settings",
        "train_loss",
        "train_accuracy",
        "test_loss",
        "test_accuracy",
        "seconds",
    ]
    assert saved["settings"] == {"lr": 0.1}
    assert saved["train_loss"] == [0.75, 0.000123456]


def test_a_figure_that_is_not_finite_is_written_as_null(tmp_path):
    history = History()
    history.append(0.5, Scores(math.nan))
    history.append(0.5, Scores(math.inf))
    history.save(tmp_path / "history.json")
    assert json.loads((tmp_path / "history.json").read_text())["train_loss"] == [None, None]


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "history.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        classifier_history().save(path, {"lr": object()})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_scaled_multiplies_losses_alone():
    scaled = classifier_history().scaled(2.0)
    assert scaled.train_loss[0] == 1.5
    assert scaled.test_loss[0] == 1.6
    assert scaled.train_accuracy == [0.5, 0.9]
    assert classifier_history().train_loss[0] == 0.75


def test_scaled_shares_no_list_with_the_history():
    history = classifier_history()
    history.scaled(2.0).append(1.0, Scores(1.0, 0.5), Scores(1.0, 0.5))
    assert history == classifier_history()


def test_a_picture_without_a_suffix_is_a_png(tmp_path):
    classifier_history().plot(tmp_path / "curves")
    assert [path.name for path in tmp_path.iterdir()] == ["curves"]
    assert (tmp_path / "curves").read_bytes().startswith(b"\x89PNG")


def test_plot_writes_a_picture(tmp_path):
    classifier_history().plot(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
