"""Which programs train a problem for whole epochs, by name; of several variants the fastest is the program."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from benchmarks.peers.fastdl_epochs import DropInTrainer, FitTrainer, ProgramTrainer
from benchmarks.peers.names import (
    COMPILE,
    CONCISE,
    DROP_IN,
    EAGER,
    FIT,
    FIT_FLOATS,
    FIT_LOOP,
    GRAPH_EPOCH,
    GRAPH_STEP,
    JAX,
    MEDIUM,
    SCRATCH,
    SGD_CLASSIFIER,
    SKLEARN,
    TEXTBOOK,
    TEXTBOOK_WORKERS,
)
from benchmarks.peers.problem import Problem, Trainer
from benchmarks.peers.torch_epochs import (
    CompiledStepTrainer,
    EagerTrainer,
    GraphTrainer,
    MediumTrainer,
    TextbookTrainer,
)
from benchmarks.setup import REDUCED_PRECISION, Setup, cpu_features

Make = Callable[[Problem, torch.dtype], Trainer]


@dataclass(frozen=True)
class Peer:
    """A way to train a problem.

    Attributes
    ----------
    variants : mapping of str to callable
        Makes its Trainer from a problem and a dtype.
    has_float64 : bool
        Whether it is held to parity in float64 too.
    has_parity : bool
        False for another algorithm or precision, which is shown for the sense of it.
    gate_epochs : int, optional
        Of the gate's run in float32, where it is slow.
    """

    variants: Mapping[str, Make]
    has_float64: bool = True
    has_parity: bool = True
    gate_epochs: int | None = None


def names(model: str, setup: Setup) -> list[str]:
    """Return the programs of one of the three models."""
    found = [FIT, *[FIT_FLOATS] * (model != "linear"), FIT_LOOP, DROP_IN, SCRATCH, CONCISE, EAGER, JAX]
    if setup.cuda:
        return [*found, GRAPH_STEP, GRAPH_EPOCH, COMPILE, *[MEDIUM] * (model != "linear")]
    # compiling takes long
    found += [COMPILE] * (not setup.small or model == "linear")
    found += [SKLEARN, *[SGD_CLASSIFIER] * (model == "softmax"), TEXTBOOK]
    if model != "linear":
        found += [TEXTBOOK_WORKERS] * (not setup.small)
        found += [MEDIUM] * any(name in cpu_features() for name in REDUCED_PRECISION)
    return found


def peer(name: str, problem: Problem, setup: Setup) -> Peer:
    """Return a program by its name; where its package is missing the test is skipped."""
    makes: dict[str, Callable[[], Peer]] = {
        FIT: lambda: Peer({"": FitTrainer}),
        FIT_FLOATS: lambda: Peer({"": partial(FitTrainer, floats=True)}),
        FIT_LOOP: lambda: Peer({"": partial(FitTrainer, compiled=False)}),
        DROP_IN: lambda: Peer({"": DropInTrainer}),
        SCRATCH: lambda: Peer({"": partial(ProgramTrainer, impl="scratch")}),
        CONCISE: lambda: Peer({"": partial(ProgramTrainer, impl="concise")}),
        EAGER: lambda: Peer(eager_variants(setup)),
        JAX: lambda: _jax(problem, setup),
        COMPILE: lambda: _compiled(problem, setup),
        GRAPH_STEP: lambda: _graphs(setup, whole_epoch=False),
        GRAPH_EPOCH: lambda: _graphs(setup, whole_epoch=True),
        SKLEARN: _sklearn,
        SGD_CLASSIFIER: _sgd_classifier,
        TEXTBOOK: lambda: Peer({"": TextbookTrainer}, has_float64=False, gate_epochs=1),
        TEXTBOOK_WORKERS: lambda: Peer(
            {"": partial(TextbookTrainer, num_workers=2)}, has_float64=False, gate_epochs=1
        ),
        MEDIUM: lambda: Peer({"": MediumTrainer}, has_parity=False),
    }
    return makes[name]()


def eager_variants(setup: Setup) -> dict[str, Make]:
    """Return torch eager with each of SGD's implementations."""
    variants: dict[str, Make] = {
        "SGD": partial(EagerTrainer, foreach=False),
        "SGD(foreach=True)": partial(EagerTrainer, foreach=True),
        "SGD(fused=True)": partial(EagerTrainer, fused=True),
    }
    return _first(variants, setup)


def _first(variants: Mapping[str, Make], setup: Setup) -> dict[str, Make]:
    """Return the variants, or the first alone at small sizes."""
    return dict(list(variants.items())[: 1 if setup.small else None])


def _compiled(problem: Problem, setup: Setup) -> Peer:
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("there is no C++ compiler")
    variants: dict[str, Make] = {}
    if setup.cuda:
        pytest.importorskip("triton", reason="triton is not installed") if not setup.rehearse else None
        for mode in ("reduce-overhead", "max-autotune"):
            variants[mode] = partial(CompiledStepTrainer, mode=mode)
    else:
        unrolled = 2 if setup.small else 5 if problem.classifies else 20
        variants[f"{unrolled} steps unrolled"] = partial(CompiledStepTrainer, unrolled=unrolled)
        variants["step by step"] = CompiledStepTrainer
        if problem.classifies:
            variants["max-autotune"] = partial(CompiledStepTrainer, mode="max-autotune")
    # a second compilation for float64 would take as long again
    return Peer(_first(variants, setup), has_float64=False)


def _graphs(setup: Setup, *, whole_epoch: bool) -> Peer:
    variants: dict[str, Make] = {}
    for name, fused in (("SGD", None), ("fused SGD", True)):
        variants[name] = partial(GraphTrainer, device=setup.device, whole_epoch=whole_epoch, fused=fused)
    return Peer(_first(variants, setup), has_float64=False)


def _jax(problem: Problem, setup: Setup) -> Peer:
    jax = pytest.importorskip("jax", reason="jax is not installed: pip install -e '.[bench]'")
    if setup.cuda and not setup.rehearse and jax.default_backend() != "gpu":
        pytest.skip(f"JAX's backend is {jax.default_backend()}, not gpu")
    return Peer(_first(jax_variants(problem, most=not setup.cuda), setup))


def jax_variants(problem: Problem, *, most: bool = True) -> dict[str, Make]:
    """Return JAX's scan with the gather in and before it; with most, also uint8 images and an unrolled loop."""
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
    return variants


def _sklearn() -> Peer:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install -e '.[bench]'")
    from benchmarks.peers.sklearn_epochs import MLPTrainer

    return Peer({"": MLPTrainer})


def _sgd_classifier() -> Peer:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install -e '.[bench]'")
    from benchmarks.peers.sklearn_epochs import SGDClassifierTrainer

    return Peer({"": SGDClassifierTrainer}, has_parity=False)
