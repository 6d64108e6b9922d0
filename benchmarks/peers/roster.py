"""Which programs train a problem for whole epochs, by name, in variants of which the fastest counts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product

import pytest
import torch

from benchmarks.peers import names
from benchmarks.peers.fastdl_epochs import DropInTrainer, FitTrainer, ProgramTrainer
from benchmarks.peers.problem import Make, Problem
from benchmarks.peers.torch_epochs import (
    CompiledStepTrainer,
    EagerTrainer,
    GraphTrainer,
    MediumTrainer,
    TextbookTrainer,
)
from benchmarks.setup import REDUCED_PRECISION, Setup, cpu_features

_INSTALL = "isn't installed: pip install -e '.[bench]'"


@dataclass(frozen=True)
class Peer:
    """A way to train a problem: what makes its Trainer, in variants, and how it is held to parity.

    Without parity it rounds more than the others, and is shown for the sense of it.
    """

    variants: Mapping[str, Make]
    has_float64: bool = True
    has_parity: bool = True
    gate_epochs: int | None = None


def programs(model: str, setup: Setup) -> list[str]:
    """Return the names of the programs of one of the three models."""
    images = model != "linear"
    found = [names.FIT, names.DROP_IN, names.SCRATCH, names.CONCISE, names.EAGER, names.JAX]
    reduces = setup.cuda or any(name in cpu_features() for name in REDUCED_PRECISION)
    found += [names.MEDIUM] * (images and reduces)
    if setup.cuda:
        return [*found, names.GRAPH_STEP, names.GRAPH_EPOCH, names.COMPILE]
    # compiling takes long
    return found + [names.COMPILE] * (not setup.small or not images) + [names.SKLEARN, names.TEXTBOOK]


def peer(name: str, problem: Problem, setup: Setup) -> Peer:
    """Return a program by its name; where its package is missing the test is skipped."""
    makes: dict[str, Callable[[], Peer]] = {
        names.FIT: lambda: Peer({"": FitTrainer}),
        names.DROP_IN: lambda: Peer(drop_in_variants(setup)),
        names.SCRATCH: lambda: Peer({"": partial(ProgramTrainer, impl="scratch")}),
        names.CONCISE: lambda: Peer({"": partial(ProgramTrainer, impl="concise")}),
        names.EAGER: lambda: Peer(eager_variants(setup)),
        names.MEDIUM: lambda: Peer({"": MediumTrainer}, has_parity=False),
        names.JAX: lambda: Peer(jax_variants(problem, setup)),
        names.COMPILE: lambda: Peer(_compiled_variants(problem, setup), has_float64=False),
        names.GRAPH_STEP: lambda: Peer(graph_variants(setup, whole_epoch=False), has_float64=False),
        names.GRAPH_EPOCH: lambda: Peer(graph_variants(setup, whole_epoch=True), has_float64=False),
        names.SKLEARN: lambda: Peer(_sklearn_variants()),
        names.TEXTBOOK: lambda: Peer({"": TextbookTrainer}, has_float64=False, gate_epochs=1),
    }
    return makes[name]()


def _first(variants: Mapping[str, Make], setup: Setup) -> dict[str, Make]:
    """Return the variants, or the first alone at small sizes."""
    return dict(list(variants.items())[: 1 if setup.small else None])


def drop_in_variants(setup: Setup) -> dict[str, Make]:
    """Return a loop with fastdl's modules in torch's net, and with a net of fastdl's own."""
    return _first({"fastdl.models": partial(DropInTrainer, own_net=True), "accelerate": DropInTrainer}, setup)


def eager_variants(setup: Setup) -> dict[str, Make]:
    """Return torch eager with each of SGD's implementations."""
    foreach, fused = partial(EagerTrainer, foreach=True), partial(EagerTrainer, fused=True)
    return _first({"SGD": EagerTrainer, "SGD(foreach=True)": foreach, "SGD(fused=True)": fused}, setup)


def graph_variants(setup: Setup, *, whole_epoch: bool) -> dict[str, Make]:
    """Return CUDA graphs of torch eager."""
    make = partial(GraphTrainer, device=setup.device, whole_epoch=whole_epoch)
    return _first({"fused SGD": partial(make, fused=True), "SGD": make}, setup)


def jax_variants(problem: Problem, setup: Setup, unrolls: tuple[int, ...] = (1, 2)) -> dict[str, Make]:
    """Return JAX's scan with the gather in and before it, on uint8 images and on floats, and unrolled."""
    jax = pytest.importorskip("jax", reason=f"jax {_INSTALL}")
    if setup.cuda and not setup.rehearse and jax.default_backend() != "gpu":
        pytest.skip(f"JAX's backend is {jax.default_backend()}, not gpu")
    from benchmarks.peers.jax_epochs import JaxTrainer

    variants: dict[str, Make] = {}
    kinds = (False, True) if problem.X.dtype == torch.uint8 else (False,)
    for gather_first, pixels, unroll in product((False, True), kinds, unrolls):
        name = f"gather {'before' if gather_first else 'in'} the scan{', uint8' * pixels}, unroll {unroll}"
        variants[name] = partial(JaxTrainer, gather_first=gather_first, pixels=pixels, unroll=unroll)
    return _first(variants, setup)


def _compiled_variants(problem: Problem, setup: Setup) -> dict[str, Make]:
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("there is no C++ compiler")
    if setup.cuda:
        modes = ("reduce-overhead", "max-autotune")
        return _first({mode: partial(CompiledStepTrainer, mode=mode) for mode in modes}, setup)
    count = 2 if setup.small else 5 if problem.classifies else 20
    variants: dict[str, Make] = {f"{count} steps unrolled": partial(CompiledStepTrainer, unrolled=count)}
    variants["step by step"] = CompiledStepTrainer
    if problem.classifies:
        variants["max-autotune"] = partial(CompiledStepTrainer, mode="max-autotune")
    return _first(variants, setup)


def _sklearn_variants() -> dict[str, Make]:
    pytest.importorskip("sklearn", reason=f"scikit-learn {_INSTALL}")
    from benchmarks.peers.sklearn_epochs import MLPTrainer

    return {"": MLPTrainer}
