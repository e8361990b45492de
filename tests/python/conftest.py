"""Fixtures and the hypothesis profile. One body of tests runs on every device that this machine has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

# The suite runs on shared machines: torch's own threads only get in the way of what is tested.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings
from support import ALL_BACKENDS, BACKENDS, TYPED, Backend, Typed

if TYPE_CHECKING:
    from ranks import Ranks  # of torch, which not every test has

settings.register_profile(
    "octavo",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=int(os.environ.get("OCTAVO_TEST_EXAMPLES", "40")),  # fewer on the emulated GPU (dev.py)
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("octavo")


def pytest_configure(config: pytest.Config) -> None:
    if "s" not in config.option.reportchars:
        config.option.reportchars += "s"  # no skip without its reason in the summary


def pytest_report_header() -> list[str]:
    """The tests have parameters for the devices that are there; here is why the others are not."""
    return [f"left out: {backend.name}: {backend.missing}" for backend in ALL_BACKENDS if backend.missing]


@pytest.fixture(scope="session", params=BACKENDS, ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each framework and device of this machine: numpy, torch-cpu, torch-cuda, cupy-cuda."""
    result: Backend = request.param
    return result


@pytest.fixture(scope="session", params=TYPED, ids=lambda typed: typed.name)
def typed(request: pytest.FixtureRequest) -> Typed:
    """Each kernel of this machine: a backend with a float dtype it has."""
    result: Typed = request.param
    return result


@pytest.fixture(scope="module")
def rank_pools() -> Iterator[dict[tuple[int, str], Ranks]]:
    """Processes by their number and device, kept for the tests of a module (`ranks.pool` fills it)."""
    pools: dict[tuple[int, str], Ranks] = {}
    yield pools
    for ranks in pools.values():
        ranks.stop()
