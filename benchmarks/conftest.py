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
from benchmarks.setup import Setup
from benchmarks.turns import Variants, Work, in_turn

ROOT = Path(__file__).resolve().parent.parent
SETUP = pytest.StashKey[Setup]()
LOG = pytest.StashKey["Log"]()
# for each group its programs, or what was raised in their stead
MEASURED = pytest.StashKey[dict[tuple[Any, ...], dict[str, Any]]]()
# JAX, scikit-learn and the like need not be installed: only the tests that use them import these
collect_ignore_glob = ["peers/*"]

Make = Callable[[str], Work | Variants]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what a person may choose."""
    group = parser.getgroup("fastdl")
    group.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="Whose programs to measure.")
    group.addoption("--rehearse", action="store_true", help="Small sizes, the CPU in a GPU's place.")
    group.addoption("--threads", type=int, default=2, help="Of every program.")
    group.addoption("--seconds", type=float, default=1.0, help="For how long a program is timed, about.")
    group.addoption("--data", default="auto", help="The images: auto, fashion-mnist or garments.")
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
    seconds = 0.0 if small else config.getoption("seconds")
    config.stash[SETUP] = Setup(device, rehearse, small, threads, seconds, config.getoption("data"))
    path = config.getoption("jsonl") or ROOT / "runs" / f"benchmarks-{device}{'-rehearsal' * rehearse}.jsonl"
    config.stash[MEASURED] = {}
    config.stash[LOG] = Log(path, config.stash[SETUP] if measures else None, config.getoption("resume"))


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
    items[:] = [item for item in items if stays(item)]


@dataclass
class Log:
    """The lines of a session, if it measures; each is on disk when its test is done."""

    path: Path
    setup: Setup | None
    resumes: bool
    begun: bool = False

    def write(self, line: dict[str, Any]) -> None:
        """Add a line."""
        if self.setup is None:
            return
        if not self.begun:
            self.begun = True
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.resumes:
                self.path.unlink(missing_ok=True)
            self.write(self.setup.as_json())
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def finished(self) -> set[str]:
        """Return the tests that need not be run again."""
        lines = self.path.read_text().splitlines() if self.resumes and self.path.exists() else []
        found = [json.loads(line) for line in lines if line.endswith("}")]
        return {line["id"] for line in found if line["kind"] in ("benchmark", "skipped")}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Keep why a test has no figure."""
    report: Any = yield
    if report.outcome != "passed" and "turns" in getattr(item, "fixturenames", ()):
        crash = getattr(report.longrepr, "reprcrash", None)
        text = (
            report.longrepr[2]
            if isinstance(report.longrepr, tuple)
            else getattr(crash, "message", report.longrepr)
        )
        reason = str(text).removeprefix("Skipped: ").strip().partition("\n")[0][:300]
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


@dataclass
class Turns:
    """Times the program of one test, in turn with the others of its group.

    Tests of one function whose parameters differ in ``program`` alone are a group.
    """

    request: pytest.FixtureRequest
    benchmark: BenchmarkFixture
    setup: Setup
    program: str

    def __call__(self, title: str, make: Make, **limits: Any) -> None:
        """Report the rounds of this test's program, and measure the whole group first if nobody has.

        Parameters
        ----------
        title : str
            Of the group.
        make : callable
            Takes a program's name; holds it to parity and returns what is timed, or its variants.
        limits
            For `in_turn`.
        """
        node, program, measured = self.request.node, self.program, self.request.config.stash[MEASURED]
        key = _key(node)
        self.benchmark.group, self.benchmark.name = title, program
        if self.benchmark.disabled:
            first, *others = _variants(make(program)).values()
            for work in others:
                work.run()
            self.benchmark.pedantic(first.run)
            return
        if key not in measured:
            limits = {"seconds": self.setup.seconds} | limits
            limits = limits | {"least": 2, "most": 2} if self.setup.small else limits
            group = [item for item in self.request.session.items if _key(item) == key]
            names = [item.callspec.params["program"] for item in group]  # type: ignore[attr-defined]
            measured[key] = _measure(names, make, **limits)
        found = measured[key][program]
        error = found.error if isinstance(found, Work) else found
        if error is not None:
            raise error
        self.benchmark._mode = "turns"
        self.benchmark.extra_info.update(found.info)
        stats = self.benchmark._make_stats(1)
        for seconds in found.seconds:
            stats.update(seconds)
        line = {"kind": "benchmark", "test": node.originalname, "id": node.nodeid, "group": title}
        line |= {"program": program, "params": dict(node.callspec.params), "median": found.median}
        line |= {"iqr": stats["iqr"], "rounds": [float(f"{seconds:.6g}") for seconds in found.seconds]}
        self.request.config.stash[LOG].write(line | {"info": found.info})


def _variants(made: Work | Variants) -> Variants:
    return {"": made} if isinstance(made, Work) else made


def _measure(names: list[str], make: Make, **limits: Any) -> dict[str, Any]:
    failed, programs = {}, {}
    for name in names:
        try:
            programs[name] = _variants(make(name))
        # a peer that is missing, fails to start or lacks parity ends its own test and no other
        except (Exception, pytest.skip.Exception) as error:
            failed[name] = error
    return failed | in_turn(programs, **limits)


@pytest.fixture
def program(request: pytest.FixtureRequest) -> str:
    """Return the name of a test's program, which every benchmark is parametrised with."""
    name: str = request.param
    return name


@pytest.fixture
def turns(request: pytest.FixtureRequest, benchmark: BenchmarkFixture, setup: Setup, program: str) -> Turns:
    """Return what times a test's program."""
    return Turns(request, benchmark, setup, program)
