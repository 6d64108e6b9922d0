"""Where a parallel region of OpenMP may be entered: nowhere that it would never end."""

from __future__ import annotations

import os

import pytest
import torch

from fastdl.kernels.cpu import openmp


def test_a_process_of_its_own_has_torchs_region():
    assert torch.backends.openmp.is_available()
    assert openmp.region_address() > 0


def test_a_forked_process_has_none():
    child = os.fork()
    if child == 0:
        os._exit(0 if openmp.region_address() == 0 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(
    "status", [None, "", "1 (a) S", "1 (a) b) S 0 1 1 0 -1 0 0", "1 (a) S 0 1 1 0 -1 x 0"]
)
def test_where_the_system_says_nothing_of_forks_there_is_none(status, tmp_path, monkeypatch):
    if status is not None:
        (tmp_path / "stat").write_text(status)
    monkeypatch.setattr(openmp, "_STATUS", tmp_path / "stat")
    assert openmp.region_address() == 0
    (tmp_path / "stat").write_text("1 (a) b) S 0 1 1 0 -1 4194304 0")
    assert openmp.region_address() > 0
