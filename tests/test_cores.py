"""How many cores there are: what the affinity mask and the quotas of both versions of cgroups leave."""

from __future__ import annotations

import os

import pytest
import torch

from fastdl import arrays, cores

needs_two_cores = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores"
)


@pytest.fixture
def cgroups(monkeypatch, tmp_path):
    """Return a function that writes files of cgroups, the process's own first, and reads cores anew."""
    monkeypatch.setattr(cores, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cores, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(cores, "_is_valid_until", float("-inf"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)

    def write(own, **files):
        (tmp_path / "own").write_text(own)
        for name, content in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    yield write
    # the mask of this machine is read anew by whoever comes next
    cores._is_valid_until = float("-inf")


V1 = "cpu.cfs_quota_us", "cpu.cfs_period_us"


@pytest.mark.parametrize(
    ("quota", "count"),
    [
        ("50000 100000\n", 1),
        ("100000 100000", 1),
        ("150000 100000", 2),
        ("20000 10000", 2),
        ("max 100000", 16),
    ],
)
@pytest.mark.parametrize("folder", ["", "unified/"])
def test_a_quota_of_version_2(cgroups, quota, count, folder):
    cgroups("0::/a.slice/b\n", **{f"{folder}a.slice/b/cpu.max": quota})
    assert cores.num_cores() == count


@pytest.mark.parametrize(("quota", "count"), [("50000\n", 1), ("400000\n", 4), ("-1\n", 16)])
@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct"])
def test_a_quota_of_version_1(cgroups, quota, count, controllers):
    files = {f"cpu/own/{V1[0]}": quota, f"cpu/own/{V1[1]}": "100000\n"}
    cgroups(f"9:cpuset:/own\n3:{controllers}:/own\n1:name=systemd:/own\n", **files)
    assert cores.num_cores() == count


def test_the_least_quota_of_a_cgroup_and_those_that_hold_it_counts(cgroups):
    files = {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000", "a/b/c/cpu.max": "500000 100000"}
    cgroups("0::/a/b/c\n", **files)
    assert cores.num_cores() == 3


def test_a_container_that_sees_no_cgroup_above_its_own(cgroups):
    cgroups("0::/../docker/0123\n", **{"cpu.max": "200000 100000"})
    assert cores.num_cores() == 2


@pytest.mark.parametrize("content", ["", "much 100000", "100000", "0 0 0"])
def test_a_file_that_says_nothing_is_left_out(cgroups, content):
    cgroups("0::/\n", **{"cpu.max": content})
    assert cores.num_cores() == 16


def test_a_system_without_cgroups_or_masks(cgroups, monkeypatch):
    assert cores.num_cores() == 16
    monkeypatch.setattr(cores, "_is_valid_until", float("-inf"))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores.num_cores() == (os.cpu_count() or 1)


def test_a_count_is_kept_for_a_second(cgroups, monkeypatch):
    time = [0.0]
    monkeypatch.setattr(cores.time, "monotonic", lambda: time[0])
    cgroups("0::/\n", **{"cpu.max": "200000 100000"})
    counts = []
    for now in (0, 0.9, 1.1):
        time[0] = now
        counts.append(cores.num_cores())
        cgroups("0::/\n", **{"cpu.max": "300000 100000"})
    assert counts == [2, 2, 3]


@pytest.mark.parametrize(("wanted", "count"), [(2, 1), (1, 1)])
def test_kernels_get_no_more_threads_than_cores(cgroups, wanted, count):
    cgroups("0::/\n", **{"cpu.max": "50000 100000"})
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(wanted)
        assert arrays.num_threads() == count
        assert torch.get_num_threads() == wanted
    finally:
        torch.set_num_threads(before)


@needs_two_cores
def test_kernels_follow_the_mask_of_the_process(monkeypatch):
    before, allowed = torch.get_num_threads(), os.sched_getaffinity(0)
    try:
        torch.set_num_threads(2)
        os.sched_setaffinity(0, {min(allowed)})
        monkeypatch.setattr(cores, "_is_valid_until", float("-inf"))
        assert arrays.num_threads() == 1
    finally:
        os.sched_setaffinity(0, allowed)
        torch.set_num_threads(before)
        cores._is_valid_until = float("-inf")
