"""Which programs train a problem, each in the variants of which the report keeps the fastest."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec

import torch

from benchmarks.peers.fastdl_epochs import FitTrainer
from benchmarks.peers.problem import Problem, Trainer
from benchmarks.peers.torch_epochs import CompiledStepTrainer, EagerTrainer, TextbookTrainer

Make = Callable[[Problem, torch.dtype], Trainer]

FIT = "fastdl fit"
EAGER = "torch eager"
COMPILE = "torch.compile"
JAX = "JAX jit + scan"
TEXTBOOK = "textbook loop"


@dataclass(frozen=True)
class Program:
    """A way to train a problem.

    Attributes
    ----------
    name : str
    variants : mapping of str to callable
        Makes its Trainer from a problem and a dtype. Where there are several the fastest is kept.
    is_peer : bool
        Whether it is one of the in-memory peers that a goal is measured by.
    has_float64 : bool
    has_parity : bool
        False for another algorithm, which is shown for the sense of it.
    """

    name: str
    variants: Mapping[str, Make]
    is_peer: bool = False
    has_float64: bool = True
    has_parity: bool = True


@dataclass(frozen=True)
class Roster:
    """The programs that are there, and why the others aren't."""

    programs: list[Program] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)


def roster(problem: Problem, *, quick: bool = False) -> Roster:
    """Return the programs that train one of the three models.

    Parameters
    ----------
    problem : Problem
    quick : bool
        Leave out what takes long to start: torch.compile, loader processes, most variants of JAX's scan.
    """
    found = Roster()
    programs = found.programs
    programs.append(Program(FIT, {"": FitTrainer}))
    if problem.X.dtype == torch.uint8:
        programs.append(Program(f"{FIT}, float32 images", {"": partial(FitTrainer, floats=True)}))
    programs.append(Program(f"{FIT}, compiled=False", {"": partial(FitTrainer, compiled=False)}))
    programs.append(eager_program())
    if quick:
        found.missing[COMPILE] = "left out of a quick run"
    elif shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"):
        programs.append(Program(COMPILE, _compiled_steps(), is_peer=True))
    else:
        found.missing[COMPILE] = "there is no C++ compiler"
    if find_spec("jax"):
        programs.append(jax_program(problem, most=not quick))
    else:
        found.missing[JAX] = "jax isn't installed: pip install -e '.[bench]'"
    programs.append(Program(TEXTBOOK, {"": TextbookTrainer}, has_float64=False))
    if not quick and problem.X.dtype == torch.uint8:
        workers = partial(TextbookTrainer, num_workers=2)
        programs.append(Program(f"{TEXTBOOK}, 2 loader processes", {"": workers}, has_float64=False))
    if problem.classifies:
        if find_spec("sklearn"):
            programs.extend(_sklearn_programs(problem))
        else:
            found.missing["scikit-learn"] = "scikit-learn isn't installed: pip install -e '.[bench]'"
    return found


def eager_program() -> Program:
    """Return torch eager with each of SGD's implementations."""
    variants: dict[str, Make] = {
        "SGD": partial(EagerTrainer, foreach=False),
        "SGD(foreach=True)": partial(EagerTrainer, foreach=True),
        "SGD(fused=True)": partial(EagerTrainer, fused=True),
    }
    return Program(EAGER, variants, is_peer=True)


def _compiled_steps() -> dict[str, Make]:
    return {
        "functional step": partial(CompiledStepTrainer, functional=True),
        "functional step, max-autotune": partial(CompiledStepTrainer, functional=True, mode="max-autotune"),
        "modules and optimizer": partial(CompiledStepTrainer, functional=False),
    }


def jax_program(problem: Problem, *, most: bool = True) -> Program:
    """Return JAX's scan with the gather in and before it; with most, also uint8 images and an unrolled loop.

    Raises
    ------
    ImportError
        If jax isn't installed.
    """
    from benchmarks.peers.jax_epochs import JaxTrainer

    variants: dict[str, Make] = {}
    for gather_first in (False, True):
        for pixels in (False, True) if most and problem.X.dtype == torch.uint8 else (False,):
            for unroll in (1, 2) if most else (1,):
                words = ["gather before the scan" if gather_first else "gather in the scan"]
                words += ["uint8"] * pixels + [f"unroll {unroll}"] * (unroll > 1)
                variants[", ".join(words)] = partial(
                    JaxTrainer, gather_first=gather_first, pixels=pixels, unroll=unroll
                )
    return Program(JAX, variants, is_peer=True)


def _sklearn_programs(problem: Problem) -> list[Program]:
    from benchmarks.peers.sklearn_epochs import MLPClassifierTrainer, SGDClassifierTrainer

    programs = [Program("sklearn MLPClassifier", {"": MLPClassifierTrainer})]
    if len(problem.widths) == 2:
        variants: dict[str, Make] = {"one class against the rest, by example": SGDClassifierTrainer}
        programs.append(Program("sklearn SGDClassifier", variants, has_float64=False, has_parity=False))
    return programs
