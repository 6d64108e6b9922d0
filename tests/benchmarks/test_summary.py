"""What the documents get of made-up lines, and that they are what the results give."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks import summary
from benchmarks.goals import Goal, goals
from benchmarks.peers import names
from benchmarks.results import Results, duration, load, number

MACHINE = {"cpu": "a CPU", "vector bits": 512, "threads": 2, "gpu": "a GPU"}
MACHINE |= {"python": "3", "torch": "2", "numba": "0"}
SESSION = {"kind": "session", "device": "cpu", "date": "2030-01-01T00:00:00", "rehearsal": False}
SESSION |= {"machine": MACHINE, "versions": {"jax": "0", "triton": "missing"}, "features": ["avx512_bf16"]}


def line(test, program, median, info=None, **params):
    found = {"kind": "benchmark", "test": test, "id": f"{test} {program} {params}", "group": ""}
    found |= {"program": program, "params": params, "median": median}
    return found | {"info": {"parity": "0"} | (info or {})}


def lines(device="cpu"):
    """Return the lines of a session that has measured something of each test."""
    found = [SESSION | {"device": device}]
    times = {names.FIT: 1e-3, names.EAGER: 0.5, names.JAX: 2e-3, names.TEXTBOOK: 1.0, names.MEDIUM: 0.4}
    errors = {"epochs": 10, "steps": 235, "error": 1e-3, "float32's error": 1e-7}
    for model in ("linear", "softmax", "mlp"):
        for calls in ("1", "recipe", "100"):
            found += [line("test_epoch", n, t, errors, model=model, calls=calls) for n, t in times.items()]
        steps = {names.DROP_IN: 1e-3, names.EAGER: 2e-3}
        found += [line("test_step", name, t, model=model, precision="float32") for name, t in steps.items()]
        told = {"import": 0.1, "torch": 1.0, "data": 47e6, "training": 3e6}
        found.append(line("test_first_call", "filled cache", 0.5, told, call=f"fit {model}"))
    for width in (64, 128, 256):
        for threads, product in ((1, "forward"), (2, "forward"), (1, "grad_input")):
            params = {"threads": threads, "shape": [256, width, width], "product": product}
            rates = {"fastdl": 1e-4, "torch": 2e-4, "peak": 5e-5}
            found += [line("test_product", name, t, {"flops": 1e7}, **params) for name, t in rates.items()]
            params = {"precision": "float32", "size": [width, 32], "product": product}
            times = {"op": 1e-3, "cuBLAS": 6e-4}
            found += [line("test_gpu_product", name, t, **params) for name, t in times.items()]
        for batch in (1, 256):
            info = {"steps": 10, "arithmetic_s": 8e-4, "memory_s": 1e-4, "call_s": 1e-5}
            cell = {"depth": 1, "width": width, "batch": batch}
            found += [line("test_cell", names.FIT, 1e-3, info, **cell)]
            found += [line("test_cell", names.JAX, batch * 1e-5 + 5e-4, **cell)]
    loads = {f"fastdl, beside {count}": 1e-3 * (1 + count) for count in range(3)}
    return found + [line("test_load", name, t, kind="step", model="mlp") for name, t in loads.items()]


@pytest.fixture
def written(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("before\n<!-- figures: headline -->\nold\n<!-- end -->\nafter\n")
    each = (f"{prefix}{name}" for prefix in ("", "gpu-") for name in summary.FIGURES)
    figures = [f"<!-- figures: {name} -->\n<!-- end -->" for name in each]
    (tmp_path / "docs" / "performance.md").write_text("\n".join(figures))
    paths = []
    for device in ("cpu", "cuda"):
        paths.append(tmp_path / f"{device}.jsonl")
        paths[-1].write_text("\n".join(map(json.dumps, lines(device))) + '\n{"kind": "half a li')
    return [*map(str, paths), "--root", str(tmp_path)]


def test_every_figure_is_made_where_it_is_marked_and_check_finds_what_differs(written, tmp_path):
    assert summary.main([*written, "--check"]) == 1
    assert summary.main(written) == 0
    assert summary.main([*written, "--check"]) == 0
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n<!-- figures: headline -->\n| model")
    assert readme.endswith("<!-- end -->\nafter\n")
    # the fastest other program, not the one that rounds more
    assert "JAX jit + scan, 2.00 ms | 2.00 x | 500 x | 1,000 x" in readme
    assert "a CPU, 512-bit vectors, 2 threads; python 3, torch 2, numba 0, jax 0; 2030-01-01." in readme
    page = (tmp_path / "docs" / "performance.md").read_text()
    assert "half a li" not in page
    expected = [
        "2.00 ms, 2.00 x | 3.00 ms, 3.00 x",
        "80 % | 10 % | 1 % | arithmetic",
        "**0.51",
        "adds 3.0 MB",
    ]
    expected += ["GFLOP/s, 50 %", "200 GFLOP/s, 100 % | 2.00 x", "![epochs](images/gpu-epochs.png)"]
    assert [words for words in expected if words not in page] == []
    (tmp_path / "README.md").write_text(readme.replace("500 x", "501 x"))
    assert summary.main([*written, "--check"]) == 1
    pictures = {path.name for path in (tmp_path / "docs" / "images").iterdir()}
    assert pictures == {"epochs.png", "gpu-epochs.png"}


def test_the_documents_of_this_repository_are_what_its_results_give():
    assert summary.main(["--check"]) == 0


def test_nothing_is_measured_without_lines(written):
    assert all(summary.figure(name, {}) == "Not measured yet." for name in summary.FIGURES)
    results = Results()
    results.add(SESSION)
    assert all(summary.figure(name, {"cpu": results}) for name in summary.FIGURES)
    assert {goal.met for goal in goals(results)} == {None}


def test_the_last_line_of_a_test_counts_and_a_failure_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    again = [line("test_step", "fastdl", t, model="mlp", precision="float32") for t in (1.0, 2.0)]
    failed = {"kind": "failed", "id": "benchmarks/x.py::test_epoch[mlp]", "reason": "no parity: it is off"}
    path.write_text("\n".join(map(json.dumps, [SESSION, again[0], failed, SESSION, again[1]])))
    results = load([path])["cpu"]
    assert results.find("test_step", model="mlp")["fastdl"]["median"] == 2.0
    assert summary.without(results) == "- `test_epoch[mlp]`: no parity: it is off"


@pytest.mark.parametrize(("figure", "met"), [(2.0, True), (1.999, False), (None, None), (math.nan, None)])
@pytest.mark.parametrize("at_least", [True, False])
def test_a_goal_is_met_missed_or_not_measured(figure, at_least, met):
    goal = Goal("a figure", figure, 2.0, at_least=at_least)
    met = met if at_least or met is None else not met
    assert goal.met is met
    assert {True: "met", False: "**missed**", None: "not measured"}[met] == goal.cells()[3]


def test_numbers_have_three_figures():
    numbers, times = (0.0, 0.001234, 1.2345, 12.345, 1234.5), (0.0, 2.5e-8, 1.5e-6, 9.9996e-4, 0.25, 90.0)
    assert [*map(number, numbers)] == ["0", "0.00123", "1.23", "12.3", "1,230"]
    assert [*map(duration, times)] == ["0 ns", "25.0 ns", "1.50 us", "1.00 ms", "250 ms", "90.0 s"]
