"""The choice of data by name, which is never silent."""

from __future__ import annotations

import importlib

import pytest

from fastdl import data

load_module = importlib.import_module("fastdl.data.load")


@pytest.fixture
def stand_ins(monkeypatch):
    """Replace both sources, so that a test sees which was asked for."""
    monkeypatch.setattr(load_module, "garments", lambda: "the garments")
    monkeypatch.setattr(load_module, "fashion_mnist", lambda root, **_: f"Fashion-MNIST in {root}")


def _unavailable(root, **_):
    raise data.DataUnavailableError("no network")


@pytest.mark.parametrize("name", ["auto", "fashion-mnist"])
def test_fashion_mnist_is_taken_where_it_is(stand_ins, name):
    said = []
    assert data.load(name, "here", notify=said.append) == "Fashion-MNIST in here"
    assert said == []


def test_garments_are_taken_by_name_without_a_word(stand_ins):
    said = []
    assert data.load("garments", notify=said.append) == "the garments"
    assert said == []


def test_auto_says_in_one_line_that_it_uses_garments_and_why(stand_ins, monkeypatch):
    monkeypatch.setattr(load_module, "fashion_mnist", _unavailable)
    said = []
    assert data.load(notify=said.append) == "the garments"
    (line,) = said
    assert "garments" in line
    assert "no network" in line
    assert "\n" not in line


def test_auto_prints_unless_told_otherwise(stand_ins, monkeypatch, capsys):
    monkeypatch.setattr(load_module, "fashion_mnist", _unavailable)
    data.load()
    assert "no network" in capsys.readouterr().out


def test_fashion_mnist_by_name_never_turns_into_garments(stand_ins, monkeypatch):
    monkeypatch.setattr(load_module, "fashion_mnist", _unavailable)
    with pytest.raises(data.DataUnavailableError, match="no network"):
        data.load("fashion-mnist")


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"'mnist'.*'auto', 'fashion-mnist' or 'garments'"):
        data.load("mnist")
