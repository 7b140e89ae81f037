"""What the kernel tests share: every way to run the native backend, and the comparison with the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashmoe import _native
from flashmoe.kernels.cpu import CpuOps
from flashmoe.kernels.ops import TOLERANCE, Ops
from flashmoe.kernels.reference import ReferenceOps

Arrays = Sequence[NDArray[Any]]
Run = Callable[[Ops], Arrays]  # must make the arrays it changes afresh
THREADS = (1, 2, 3)  # of which one is more than this machine may have cores


@cache
def native_backends(activations: str) -> list[CpuOps]:
    """Every instruction set of this machine with every number of threads."""
    return [CpuOps(n, activations, isa) for isa in _native.supported_isas() for n in THREADS]


@pytest.fixture(scope="session")
def backends() -> list[CpuOps]:
    """For operations that do not look at the activation path."""
    return native_backends("int8")


@pytest.fixture(scope="session")
def same_bits() -> Callable[..., Arrays]:
    """The one result that all native backends give."""

    def check(run: Run, activations: str = "int8") -> Arrays:
        first, *others = native_backends(activations)
        ours = run(first)
        for backend in others:
            for one, other in zip(ours, run(backend), strict=True):
                np.testing.assert_array_equal(one, other, f"{backend.isa}, {backend.threads} threads")
        return ours

    return check


@pytest.fixture(scope="session")
def agrees(same_bits: Callable[..., Arrays]) -> Callable[..., Arrays]:
    """same_bits, and equal to the reference within the tolerance of `op`; returns the native arrays.

    mostly: nine results in ten must keep within that operation's tolerance.
    """

    def check(op: str, run: Run, activations: str = "int8", mostly: str | None = None) -> Arrays:
        ours, tolerance = same_bits(run, activations), TOLERANCE[op]
        for native, reference in zip(ours, run(ReferenceOps(activations)), strict=True):
            assert np.isfinite(native).all()
            np.testing.assert_allclose(native, reference, tolerance.relative, tolerance.absolute)
            if mostly is not None:
                assert np.isclose(native, reference, *TOLERANCE[mostly]).mean() > 0.9
        return ours

    return check


@pytest.fixture
def rng() -> np.random.Generator:
    """The same numbers in every test."""
    return np.random.default_rng(20261123)
