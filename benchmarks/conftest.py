"""The suite's options, the `turns` fixture, and a line of JSON for each test as soon as it is finished."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import setup as setups
from benchmarks.results import read
from benchmarks.setup import Setup
from benchmarks.turns import Variants, Work, in_turn

ROOT = Path(__file__).resolve().parent.parent
SETUP = pytest.StashKey[Setup]()
LOG = pytest.StashKey["Log"]()
# for each group its programs, or what was raised in their stead
MEASURED = pytest.StashKey[dict[tuple[Any, ...], dict[str, Any]]]()
# JAX, scikit-learn and the like need not be installed: only the tests that use them import these
collect_ignore_glob = ["peers/*"]

Turns = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what a person may choose."""
    group = parser.getgroup("fastdl")
    group.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="Whose programs to measure.")
    group.addoption("--rehearse", action="store_true", help="Small sizes, the CPU in a GPU's place.")
    group.addoption("--threads", type=int, default=2, help="Of every program.")
    group.addoption("--seconds", type=float, default=1.0, help="For how long a program is timed, about.")
    group.addoption("--jsonl", type=Path, help="Where each test's line goes; runs/benchmarks-DEVICE.jsonl.")
    group.addoption("--resume", action="store_true", help="Leave out the tests that have a line already.")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Settle how to measure, before any library has counted the CPUs."""
    config.addinivalue_line("markers", "only(device): is measured with --device DEVICE alone")
    # the command line takes no median
    config.option.benchmark_sort = "median"
    measures = config.getoption("benchmark_enable") or not config.getoption("benchmark_disable")
    device, rehearse = config.getoption("device"), config.getoption("rehearse")
    threads = min(config.getoption("threads"), len(os.sched_getaffinity(0)))
    if measures:
        # every library sizes its pool of threads by the CPUs that it finds
        os.sched_setaffinity(0, setups.cpus(threads))
    if device == "cpu" or rehearse:
        # JAX would take a GPU that it finds
        os.environ["JAX_PLATFORMS"] = "cpu"
    # and three quarters of the GPU's memory, while torch is beside it
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    small = rehearse or not measures
    setup = Setup(device, rehearse, small, threads, 0.0 if small else config.getoption("seconds"))
    path = config.getoption("jsonl") or ROOT / "runs" / f"benchmarks-{device}{'-rehearsal' * rehearse}.jsonl"
    config.stash[SETUP], config.stash[MEASURED] = setup, {}
    config.stash[LOG] = Log(path if measures else None, setup, config.getoption("resume"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark all as slow; leave out what is another device's and, where that is wanted, what is finished."""
    for item in items:
        if item.path.is_relative_to(ROOT / "benchmarks"):
            item.add_marker(pytest.mark.slow)
    device, done = config.stash[SETUP].device_name, config.stash[LOG].finished()

    def stays(item: pytest.Item) -> bool:
        return item.nodeid not in done and all(mark.args == (device,) for mark in item.iter_markers("only"))

    config.hook.pytest_deselected(items=[item for item in items if not stays(item)])
    items[:] = filter(stays, items)


@dataclass
class Log:
    """The lines of a session, if it measures; each is on disk when its test is done."""

    path: Path | None
    setup: Setup
    resumes: bool
    begun: bool = False

    def write(self, line: dict[str, Any]) -> None:
        """Add a line."""
        if self.path is None:
            return
        if not self.begun:
            self.begun = True
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a" if self.resumes else "w") as file:
                # what was cut off in the middle of a line
                file.write("\n" * self.resumes)
            self.write(self.setup.as_json())
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def finished(self) -> set[str]:
        """Return the tests that need not be run again."""
        found = read(self.path) if self.resumes and self.path and self.path.exists() else []
        return {line["id"] for line in found if line["kind"] in ("benchmark", "skipped")}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Keep why a test has no figure."""
    report: Any = yield
    if call.excinfo is not None and "turns" in getattr(item, "fixturenames", ()):
        reason = str(call.excinfo.value).strip().partition("\n")[0][:300]
        item.config.stash[LOG].write({"kind": report.outcome, "id": report.nodeid, "reason": reason})
    return report  # type: ignore[no-any-return]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Add what the figures depend on."""
    machine_info.update(config.stash[SETUP].as_json())


@pytest.fixture(scope="session")
def setup(request: pytest.FixtureRequest) -> Iterator[Setup]:
    """Return how to measure, with the threads started."""
    import torch

    found, before = request.config.stash[SETUP], torch.get_num_threads()
    # where no figure counts, threads that wait for a core would take most of the time
    setups.pin_threads(1 if found.small else found.threads)
    yield found
    torch.set_num_threads(before)


def _key(item: Any) -> tuple[Any, ...]:
    """Return what the tests of a group have in common."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    others = sorted((name, value) for name, value in params.items() if name != "program")
    return item.path, getattr(item, "originalname", ""), *others


@pytest.fixture
def turns(request: pytest.FixtureRequest, benchmark: BenchmarkFixture, setup: Setup, program: str) -> Turns:
    """Return what times a test's program, in turn with the others of its group.

    Tests of one function whose parameters differ in ``program`` alone are a group. What is returned takes the
    group's title; what holds a program, given its name, to parity and makes its work, or its variants; and
    limits for `in_turn`.
    """
    node, key, measured = request.node, _key(request.node), request.config.stash[MEASURED]

    def variants(make: Callable[[str], Work | Variants], name: str) -> Variants:
        made = make(name)
        return {"": made} if isinstance(made, Work) else made

    def report(title: str, make: Callable[[str], Work | Variants], **limits: Any) -> None:
        benchmark.group, benchmark.name = title, program
        if benchmark.disabled:
            first, *others = variants(make, program).values()
            for work in others:
                work.run()
            benchmark.pedantic(first.run)
            return
        if key not in measured:
            failed, programs = {}, {}
            group: list[Any] = [item for item in request.session.items if _key(item) == key]
            for name in (item.callspec.params["program"] for item in group):
                try:
                    programs[name] = variants(make, name)
                # a peer that is missing, fails to start or lacks parity ends its own test and no other
                except (Exception, pytest.skip.Exception) as reason:
                    failed[name] = reason
            limits = {"seconds": setup.seconds} | limits | ({"rounds": (2, 2)} if setup.small else {})
            measured[key] = failed | in_turn(programs, **limits)
        found = measured[key][program]
        error = found.error if isinstance(found, Work) else found
        if error is not None:
            raise error
        benchmark._mode = "turns"
        benchmark.extra_info.update(found.info)
        stats = benchmark._make_stats(1)
        for seconds in found.seconds:
            stats.update(seconds)
        line = {"kind": "benchmark", "test": node.originalname, "id": node.nodeid, "group": title}
        line |= {"program": program, "params": dict(node.callspec.params), "median": found.median}
        line |= {"iqr": stats["iqr"], "rounds": [float(f"{seconds:.6g}") for seconds in found.seconds]}
        request.config.stash[LOG].write(line | {"info": found.info})

    return report
