"""``benchmarks/gpu_report.py`` as a user runs it on a machine without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import gpu_report
from benchmarks.gpu.found import Found
from benchmarks.gpu.processes import ROOT
from benchmarks.gpu.visit import Exit


def run(*arguments):
    command = [sys.executable, "benchmarks/gpu_report.py", *map(str, arguments)]
    # as in a process that nobody has told where the project is
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device: a visit without one was not checked")
def test_without_a_gpu_it_says_so_runs_what_needs_none_and_exits_with_three(tmp_path):
    output = tmp_path / "out" / "gpu.json"
    result = run("--quick", "--output", output)
    assert result.returncode == Exit.NO_GPU == 3, result.stdout + result.stderr
    # the first that is missing, in one sentence
    assert "No visit to a GPU: torch" in result.stdout
    content = json.loads(output.read_text())
    states = {name: section["state"] for name, section in content["sections"].items()}
    assert states["compile"] == states["tests"] == "done"
    assert content["sections"]["tests"]["figures"]["counts"]["SKIPPED"] > 100
    assert all(
        state.startswith("left out: torch")
        for name, state in states.items()
        if name not in ("compile", "tests")
    )
    assert [goal["met"] for goal in content["goals"]] == [None] * 12
    assert "not measured" in output.with_suffix(".md").read_text()
    assert {path.name for path in output.parent.iterdir()} == {"gpu.json", "gpu.md"}


def test_a_rehearsal_of_one_section_checks_parity_first(tmp_path):
    output = tmp_path / "gpu.json"
    result = run("--rehearse", "--only", "products", "--output", output)
    assert result.returncode == 0, result.stdout + result.stderr
    content = json.loads(output.read_text())
    assert list(content["sections"]) == ["parity", "products"]
    assert content["rehearsal"] is True
    assert "No figure here counts" in output.with_suffix(".md").read_text()
    assert (tmp_path / "gpu-products.png").read_bytes().startswith(b"\x89PNG")
    assert "no figure counts" in result.stdout


def test_wrong_usage_exits_with_two():
    with pytest.raises(SystemExit, match=r"^2$"):
        gpu_report.main(["--only", "magic"])


def test_figures_that_count_go_to_the_results_and_no_others_do():
    found = Found({}, {"name": "NVIDIA H200"})
    name = gpu_report._default_output(found, quick=False)
    assert name.parent == ROOT / "benchmarks" / "results"
    assert name.name.endswith("-nvidia-h200.json")
    assert gpu_report._default_output(found, quick=True).parent == ROOT / "runs"
    assert gpu_report._default_output(Found(), quick=False) == ROOT / "runs" / "gpu-none.json"
