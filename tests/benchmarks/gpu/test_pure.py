"""What a visit works out without measuring: floors, goals, what is there, what tools print, pictures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import child, floors, found
from benchmarks.gpu.goals import best_peer, goals
from benchmarks.gpu.pictures import draw
from benchmarks.gpu.precision import BFLOAT16, FLOAT32, TF32
from benchmarks.gpu.processes import ROOT, run
from benchmarks.gpu.sections import grid, parity, products
from benchmarks.gpu.sections.sanitizer import num_errors_in
from benchmarks.gpu.sections.tests import marked_files, outcomes_of
from benchmarks.results import Goal, Section, Table, goals_table, markdown


def test_a_floor_is_the_larger_of_bytes_and_arithmetic():
    work = floors.product(2, 3, 5)
    assert (work.num_bytes, work.num_flops) == (4 * (6 + 15 + 10), 2 * 30)
    assert work.floor(bandwidth=124.0, flops=6.0) == 10.0
    assert work.floor(bandwidth=12.4, flops=60.0) == 10.0
    assert work.floor(bandwidth=124.0, flops=None) == 1.0
    assert floors.floor_of_products(30, 6.0) == 10.0


def test_the_bytes_of_each_kernel():
    assert floors.cross_entropy(7, 10).num_bytes == 2 * 4 * 70 + 8 * 7
    assert floors.sgd(100, momentum=False).num_bytes == 12 * 100
    assert floors.sgd(100, momentum=True).num_bytes == 20 * 100
    assert floors.elementwise(100, 3, item_bytes=2).num_bytes == 600


def test_the_peak_of_an_h200_and_of_an_a100():
    # NVIDIA's data sheets: 67 and 19.5 TFLOP/s in float32
    assert floors.peak_flops(132, (9, 0), 1.98e9) == pytest.approx(67e12, rel=0.01)
    assert floors.peak_flops(108, (8, 0), 1.41e9) == pytest.approx(19.5e12, rel=0.01)


def epoch(seconds):
    return {"median_s": seconds}


def full_figures():
    """Return figures that meet every goal by a little."""
    large = {
        "cross entropy 10": {"op": "cross_entropy", "share of the copy": 0.95},
        "cross entropy 4096": {"op": "cross_entropy", "share of the copy": 0.86},
        "SGD": {"op": "sgd", "share of the copy": 0.87},
        "relu": {"op": "relu", "share of the copy": 0.1},
    }
    cell = {"precision": "float32", "width": 4096, "batch": 65536}
    return {
        "epochs": {
            "float32": {
                "mlp": {
                    "steps": 200,
                    "title": "MLP",
                    "fit": {"epoch": epoch(0.0028)},
                    "peers": {"torch eager, SGD": epoch(0.04), "fastdl drop-in loop": epoch(0.001)},
                },
                "softmax": {
                    "steps": 200,
                    "title": "softmax",
                    "fit": {"epoch": epoch(0.0014)},
                    "peers": {"JAX": epoch(0.0036)},
                },
                "linear": {
                    "steps": 100,
                    "title": "linear",
                    "fit": {"epoch": epoch(5e-5)},
                    "peers": {"JAX": epoch(0.0011)},
                    "kernel, seconds a step": 2.9e-7,
                },
            }
        },
        "compiled": {"float32": {"mlp": {"peers": {"torch.compile max-autotune": epoch(0.0058)}}}},
        "steps": {
            "float32": {
                "mlp": {
                    "fastdl": epoch(1e-4),
                    "torch_eager": epoch(1.6e-4),
                    "torch_eager_fused_sgd": epoch(1.51e-4),
                    "torch in a CUDA graph": epoch(1e-5),
                },
                "softmax": {"fastdl": epoch(1e-4), "torch_eager": epoch(1e-4)},
                "linear": {"fastdl": epoch(1e-4), "torch_eager": epoch(1.1e-4)},
            }
        },
        "products": {
            "cells": [
                cell | {"product": "forward", "share": 0.9},
                cell | {"product": "grad_weight", "share": 0.61},
                cell | {"product": "grad_input", "share": 0.1, "width": 64},
                cell | {"product": "grad_input", "share": 0.1, "precision": "TF32"},
            ]
        },
        "kernels": {"at large sizes": large},
    }


def test_every_goal_is_met_by_figures_that_reach_it():
    found = {goal.what: goal for goal in goals(full_figures())}
    assert len(found) == 12
    assert [goal.what for goal in found.values() if goal.met is not True] == []
    assert found["MLP: epoch of fit over the best peer's"].figure == pytest.approx(0.0058 / 0.0028)
    assert found["MLP: a step of fit"].figure == pytest.approx(14.0)
    assert found["linear regression: a step of fit's kernel"].figure == pytest.approx(0.29)
    assert found["MLP: drop-in step over torch eager's"].figure == pytest.approx(1.51)
    (product,) = (goal for what, goal in found.items() if "cuBLAS" in what)
    assert (product.figure, product.note) == (pytest.approx(61.0), "grad_weight")


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        (lambda f: f["epochs"]["float32"]["mlp"]["fit"]["epoch"].update(median_s=0.0031), 2),
        (lambda f: f["epochs"]["float32"]["linear"].update({"kernel, seconds a step": 3.1e-7}), 1),
        (lambda f: f["steps"]["float32"]["softmax"]["fastdl"].update(median_s=1.01e-4), 1),
        (lambda f: f["products"]["cells"][0].update(share=0.59), 1),
        (lambda f: f["kernels"]["at large sizes"]["SGD"].update({"share of the copy": 0.84}), 1),
    ],
)
def test_a_goal_is_missed_by_a_figure_that_does_not_reach_it(change, missed):
    figures = full_figures()
    change(figures)
    assert sum(goal.met is False for goal in goals(figures)) == missed


def test_what_was_not_measured_is_neither_met_nor_missed():
    assert {goal.verdict for goal in goals({})} == {"not measured"}
    figures = full_figures()
    del figures["epochs"]["float32"]["mlp"]["fit"]
    unmeasured = [goal for goal in goals(figures) if goal.met is None]
    assert len(unmeasured) == 2
    assert "fit has no time here" in unmeasured[0].note


def test_fastdls_own_programs_are_no_peers():
    name, seconds = best_peer(full_figures(), "mlp")
    assert (name, seconds) == ("torch.compile max-autotune", 0.0058)
    assert best_peer({}, "mlp") is None


def test_tables_in_markdown():
    table = Table("Title", ["what", "a|b"], [["x", "1"]])
    assert markdown(table) == "**Title**\n\n| what | a\\|b |\n| --- | --: |\n| x | 1 |\n"
    goal = Goal("a figure", 2.0, 1.0)
    assert "| a figure | 2.00 x | >= 1 x | met |  |" in markdown(goals_table([goal], colors={}))
    assert "[green]met[/]" in markdown(goals_table([goal]))


def test_a_section_comes_back_from_its_file_as_it_was(tmp_path):
    section = Section("Title", "conditions")
    section.tables.append(Table("t", ["a"], [["b"]]))
    section.goals.append(Goal("g", 1.0, 2.0))
    section.figures["x"] = [1.5, None, {"y": float("inf")}]
    section.failures.append("one")
    child.write(section, tmp_path / "section.json")
    assert child.read(tmp_path / "section.json") == section
    assert [path.name for path in tmp_path.iterdir()] == ["section.json"]


def test_a_precision_is_set_and_set_back():
    before = torch.get_float32_matmul_precision()
    with TF32.active():
        assert torch.get_float32_matmul_precision() == "high"
        with FLOAT32.active():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before


def test_what_an_error_may_be():
    eps = torch.finfo(torch.float32).eps
    assert parity.allowed(1e-7, FLOAT32) == pytest.approx(4e-7 + eps)
    assert parity.allowed(1e-5, FLOAT32) == FLOAT32.error
    assert parity.allowed(0.0, TF32) == TF32.error
    assert parity.allowed(1e-3, BFLOAT16) == BFLOAT16.error
    truth = torch.tensor([3.0, 4.0])
    assert parity.relative_error(torch.tensor([3.0, 4.5]), truth) == pytest.approx(0.1)
    assert parity.relative_error(torch.tensor([0.0, 2.0]), torch.zeros(2)) == 2.0
    assert not parity.relative_error(torch.tensor([3.0, torch.nan]), truth) <= 1.0


def test_outcomes_are_read_from_what_pytest_has_printed_so_far():
    output = (
        "collected 4 items\n\n"
        "tests/test_gpu.py::test_a[(1, 2)-torch.float32] PASSED          [ 25%]\n"
        "tests/test_gpu.py::test_b FAILED          [ 50%]\n"
        "tests/test_gpu.py::test_c SKIPPED (one CUDA device)    [ 75%]\n"
        "tests/test_gpu.py::test_d "
    )
    assert outcomes_of(output) == {
        "tests/test_gpu.py::test_a[(1, 2)-torch.float32]": "PASSED",
        "tests/test_gpu.py::test_b": "FAILED",
        "tests/test_gpu.py::test_c": "SKIPPED",
    }


def test_the_files_with_gpu_tests_are_found():
    files = marked_files(ROOT / "tests")
    assert ROOT / "tests" / "test_gpu.py" in files
    assert ROOT / "tests" / "test_arrays.py" not in files


def test_a_process_that_takes_too_long_leaves_what_it_has_printed():
    program = "import time; print('so far', flush=True); time.sleep(60)"
    output, code = run([sys.executable, "-c", program], 3.0)
    assert output.splitlines() == ["so far", "", "not finished after 3 s"]
    assert code is None
    assert run([sys.executable, "-c", "print('all'); raise SystemExit(4)"], 30.0) == ("all\n", 4)


@pytest.mark.parametrize(
    ("output", "errors"),
    [
        ("========= ERROR SUMMARY: 0 errors\n", 0),
        ("========= Invalid __global__ read\n========= ERROR SUMMARY: 3 errors\n", 3),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n", 1),
        ("========= Error: Device not supported. Please refer to the documentation\n", None),
        ("", None),
    ],
)
def test_errors_are_read_from_what_the_sanitizer_has_printed(output, errors):
    assert num_errors_in(output) == errors


def test_the_op_that_takes_the_slower_way_is_named():
    times = {products.KERNEL: 1.0, products.HANDED_OVER: 2.0, products.OP: 2.0, products.CUBLAS: 1.0}
    cell = {"precision": "float32", "product": "forward", "width": 64, "batch": 32, "times": times}
    assert products.slower_choices([cell]) == [
        "float32, forward 32 x 64: kernel is 2.00 x faster than the op"
    ]
    assert products.slower_choices([cell | {"times": times | {products.OP: 1.05}}]) == []


def answer(**changes):
    probe = {
        "torch's CUDA": "13.0",
        "gpu": "NVIDIA H200",
        "count": 1,
        "capability": [9, 0],
        "multiprocessors": 132,
        "memory": 141 * 2**30,
        "L2": 60 * 2**20,
        "missing link": None,
    } | changes

    def ask(command, root):
        if command[0] == "nvidia-smi":
            return subprocess.CompletedProcess(command, 0, "580.159.04, 1980, 700.00\n", "")
        output = "gpu\n" if "jax" in command[-1] else f"a warning\n{json.dumps(probe)}\n"
        return subprocess.CompletedProcess(command, 0, output, "")

    return ask


def test_a_gpu_is_named_with_its_driver_and_its_peak(monkeypatch):
    monkeypatch.setattr(found, "sanitizer", lambda: "/usr/bin/compute-sanitizer")
    # JAX need not be installed here
    monkeypatch.setattr(found, "_installed", lambda name: "1")
    seen = found.find(Path(), answer())
    assert seen.has_gpu
    assert (seen.missing, seen.left_out, seen.jax) == ([], [], "gpu")
    assert seen.title.startswith("NVIDIA H200, driver 580.159.04; Python 3.")
    assert seen.flops == pytest.approx(67e12, rel=0.01)
    assert "132 multiprocessors, 141 GiB, 1980 MHz at most, driver 580.159.04" in seen.lines()[0]
    json.dumps(seen.as_json())


def test_what_is_missing_is_said_in_a_sentence(monkeypatch):
    monkeypatch.setattr(found, "sanitizer", lambda: None)
    monkeypatch.setattr(
        found, "_installed", lambda name: "missing" if name in ("pytest", "numba-cuda") else "1"
    )

    def ask(command, root):
        return None if command[0] == "nvidia-smi" else answer(gpu=None)(command, root)

    seen = found.find(Path(), ask)
    assert seen.missing == ["the package numba-cuda isn't installed, which fastdl[cu13] brings"]
    assert seen.left_out == [
        "the tests: the package pytest isn't installed",
        "memcheck and racecheck: compute-sanitizer isn't there",
    ]
    assert not seen.has_gpu
    assert seen.flops is None
    assert seen.lines()[0] == "GPU: none"


def test_a_broken_torch_or_driver_is_a_finding():
    def ask(command, root):
        if command[0] == "nvidia-smi":
            return subprocess.CompletedProcess(command, 9, "", "no driver")
        return subprocess.CompletedProcess(
            command, 1, "", "Traceback\nImportError: libcuda.so.1 is missing\n"
        )

    seen = found.find(Path(), ask)
    assert seen.missing == ["torch and fastdl can't be imported: ImportError: libcuda.so.1 is missing"]
    seen = found.find(Path(), lambda command, root: None)
    assert seen.missing == ["torch and fastdl can't be imported: no answer in time"]


def test_a_driver_that_keeps_its_clock_to_itself_leaves_the_floor_out():
    def ask(command, root):
        if command[0] == "nvidia-smi":
            return subprocess.CompletedProcess(command, 0, "580.1, [N/A], [N/A]\n", "")
        return answer()(command, root)

    seen = found.find(Path(), ask)
    assert seen.gpu["driver"] == "580.1"
    assert seen.flops is None


def test_the_pictures_are_drawn_of_made_up_results(tmp_path):
    figures = full_figures()
    times = {"fastdl fit": 1e-5, "torch eager": 2e-5}
    figures["grid"] = {
        "cells": [
            {"width": width, "batch": batch, "seconds of a step": times}
            for width in grid.WIDTHS
            for batch in grid.BATCHES
        ]
    }
    content = {
        "title": "NVIDIA H200",
        "date": "2030-01-01T00:00:00",
        "rehearsal": False,
        "quick": False,
        "sections": {name: {"figures": found} for name, found in figures.items()},
    }
    drawn = draw(content, tmp_path / "gpu.json")
    assert [path.name for path in drawn] == ["gpu-epochs.png", "gpu-products.png", "gpu-grid.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert draw(content | {"sections": {}}, tmp_path / "none.json") == []
    assert draw(content | {"sections": {"epochs": {}}}, tmp_path / "none.json") == []
