"""What all tests share: how many examples hypothesis draws (in `make soak` all), and fixtures."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, settings

from accelerate_state import forget_accelerate
from lamina.gradients import norms
from lamina.kernels.native import kernel as native_kernel

# Examples take as long as the machine needs, so none has a deadline of its own.
COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("quick", max_examples=30, derandomize=True, **COMMON)
settings.register_profile("full", max_examples=100, **COMMON)
settings.load_profile("quick")  # `--hypothesis-profile=full` replaces it


def set_aside():
    """Take all objects that live now out of what `gc` collects and returns.

    A test run has a million objects from its imports and its list of tests, and every full
    collection and every search for optimizers, models or wrappers would visit them all.
    """
    gc.collect()
    gc.freeze()


def pytest_collection_finish():
    set_aside()


@pytest.fixture(autouse=True, scope="module")
def _a_module_begins_without_accelerate():
    forget_accelerate()


@pytest.fixture(scope="module")
def little_to_search():
    """What is there before the tests of a module is no model of theirs: no search visits it."""
    set_aside()


@pytest.fixture
def without_numba(monkeypatch):
    """Let steps run as they do where Numba is not installed."""
    monkeypatch.setattr(native_kernel, "unavailable", lambda: "Numba is not installed")
    monkeypatch.setattr(norms, "squares_of", lambda tensors: None)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def one_thread():
    """Let torch compute on one thread."""
    with _threads(1):
        yield


@pytest.fixture
def two_threads():
    """Let torch compute on two threads."""
    with _threads(2):
        yield
