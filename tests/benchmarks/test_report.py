"""The report as a user runs it, and what it shows where parity fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import pictures
from benchmarks.peers import roster
from benchmarks.peers.torch_epochs import EagerTrainer
from benchmarks.report import main
from benchmarks.sections import epochs, grid, products
from benchmarks.sections.settings import Settings
from fastdl import data

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = ["epochs", "products", "steps", "threads", "memory", "startup", "grid"]


def run(*arguments):
    command = [sys.executable, "benchmarks/report.py", *map(str, arguments)]
    # as in a process that nobody has told where the project is
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def test_a_quick_run_measures_every_section_and_writes_everything(tmp_path):
    output = tmp_path / "out" / "report.json"
    result = run("--quick", "--output", output)
    assert result.returncode == 0, result.stderr
    report = json.loads(output.read_text())
    assert list(report["sections"]) == SECTIONS
    for name, section in report["sections"].items():
        assert section["failures"] == [], name
    assert report["quick"] is True
    assert report["threads"] == len(report["cpus"]) >= 1
    for key in ("cpu", "vector bits", "torch", "numba"):
        assert report["machine"][key]
    assert "jax" in report["versions"]
    for model in ("linear", "softmax", "mlp"):
        found = report["sections"]["epochs"]["figures"][model]
        assert found["floor_s"] > 0
        for name, program in found["programs"].items():
            assert program["epoch"]["median_s"] > 0, name
            assert program["parity"] == ("SGDClassifier" not in name), name
    what = " ".join(goal["what"] for goal in report["goals"])
    for words in (
        *(
            "Linear regression: the compiled epoch alone",
            "fit over torch eager",
            "fit over the best in-memory peer",
        ),
        *("fit over the textbook loop", "GEMM 256x784x256 on one core", "Drop-in step, linear", "Memory"),
        *("1 -> 2 threads", "an empty cache", "a filled cache", "worst cell"),
    ):
        assert words in what
    for goal in report["goals"]:
        assert goal["met"] in (True, False, None)
        assert (goal["figure"] is None) == (goal["met"] is None)
        # what the tables show, which break lines
        assert goal["what"].split()[0] in result.stdout
    for picture in ("epochs.png", "products.png"):
        assert (output.parent / picture).read_bytes().startswith(b"\x89PNG")


def test_one_section_alone(tmp_path):
    output = tmp_path / "report.json"
    result = run("--quick", "--only", "products", "--output", output)
    assert result.returncode == 0, result.stderr
    report = json.loads(output.read_text())
    assert list(report["sections"]) == ["products"]
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "products.png"}
    for item in report["sections"]["products"]["figures"]["products"]:
        assert item["fastdl"] > 0
        assert item["torch"] > 0
        assert item["peak"] > 0


@pytest.mark.parametrize("arguments", [["--only", "magic"], ["--threads", "0"]])
def test_wrong_usage_exits_with_two(arguments):
    app = typer.Typer()
    app.command()(main)
    assert CliRunner().invoke(app, ["--quick", *arguments]).exit_code == 2


class Wrong(EagerTrainer):
    """Learns a little faster than it should."""

    def __init__(self, problem, dtype, **options):
        super().__init__(problem, dtype)
        self.optimizer.param_groups[0]["lr"] *= 1.01


@pytest.fixture
def settings():
    images = data.garments()
    threads = torch.get_num_threads()
    yield Settings(threads, images, seconds=0.0, quick=True, say=lambda line: None)
    torch.set_num_threads(threads)


def test_no_speed_is_shown_for_a_model_whose_fit_has_no_parity(settings, monkeypatch, seed):
    monkeypatch.setattr(roster, "FitTrainer", Wrong)
    monkeypatch.setattr(epochs, "_GOALS", {"softmax": epochs._GOALS["softmax"]})
    section = epochs.measure(settings)
    assert any("fastdl fit: float64" in failure for failure in section.failures)
    assert section.goals == []
    assert not any("epoch" in item for item in section.figures["softmax"]["programs"].values())
    assert all(row[1] == "" for row in section.tables[0].rows if row[0] != "arithmetic floor")
    figures = {"sections": {"epochs": section.as_json()}}
    assert pictures.draw(header() | figures, Path("nowhere")) == []


def test_a_peer_without_parity_is_no_peer(settings, monkeypatch, seed):
    monkeypatch.setattr(roster, "EagerTrainer", Wrong)
    monkeypatch.setattr(roster, "find_spec", lambda name: None)
    monkeypatch.setattr(epochs, "_GOALS", {"softmax": epochs._GOALS["softmax"]})
    section = epochs.measure(settings)
    programs = section.figures["softmax"]["programs"]
    assert "epoch" not in programs[roster.EAGER]
    assert "epoch" in programs[roster.FIT]
    best, textbook = section.goals
    assert best.met is None
    assert textbook.met is not None


def test_a_cell_without_parity_shows_no_speed(settings, monkeypatch, seed):
    class Lost(EagerTrainer):
        def train(self, num_epochs):
            return [loss + 0.01 for loss in super().train(num_epochs)]

    monkeypatch.setattr(grid, "FitTrainer", Lost)
    section = grid.measure(settings)
    assert {cell["parity"] for cell in section.figures["cells"]} == {False}
    assert len(section.failures) == len(section.figures["cells"])
    assert section.goals[0].met is None


def test_an_inaccurate_product_shows_no_speed(settings, monkeypatch, seed):
    right = products._products

    def wrong(*sizes):
        forward, *others = right(*sizes)
        kernel = forward.ours

        def ours(count):
            kernel(count)
            forward.results()[0].mul_(1.0001)

        results = forward.results
        broken = products._Product(
            forward.name, ours, forward.torchs, lambda: (results()[0] * 1.0001, results()[1]), forward.truth
        )
        return [broken, *others]

    monkeypatch.setattr(products, "_products", wrong)
    monkeypatch.setattr(products, "_QUICK_SHAPES", ((256, 64, 64),))
    section = products.measure(settings)
    assert section.failures == ["256 x 64 x 64, forward: less accurate than torch"]
    assert {item["product"] for item in section.figures["products"]} == {"grad_input", "grad_weight"}


def header():
    return {
        "machine": {"cpu": "a CPU", "vector bits": 512, "torch": "2", "numba": "0"},
        "versions": {"jax": "0"},
        "threads": 2,
        "images": "garments",
        "date": "2030-01-01T00:00:00",
    }


def test_the_pictures_are_drawn_of_the_json(tmp_path):
    def program(seconds):
        return {"epoch": {"median_s": seconds}}

    programs = {roster.FIT: program(1e-4), roster.EAGER: program(0.02), "lost": {"error": "it"}}
    figures = {"linear": {"floor_s": 1e-8, "programs": programs}}
    shape = {"product": "forward", "fastdl": 50.0, "torch": 40.0, "peak": 60.0}
    items = [
        shape | {"shape": [products.BATCH, width, width], "threads": threads}
        for width in products.WIDTHS
        for threads in (1, 2)
    ]
    content = header() | {
        "sections": {"epochs": {"figures": figures}, "products": {"figures": {"products": items}}}
    }
    drawn = pictures.draw(content, tmp_path)
    assert drawn == [tmp_path / "epochs.png", tmp_path / "products.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
