"""What all tests share: how many examples hypothesis draws (in `make soak` all), a fixture."""

import gc

import pytest
from hypothesis import HealthCheck, settings

from lamina.gradients import norms
from lamina.kernels.native import kernel as native_kernel

# Examples take as long as the machine needs, so none has a deadline of its own.
COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("quick", max_examples=30, derandomize=True, **COMMON)
settings.register_profile("full", max_examples=100, **COMMON)
settings.load_profile("quick")  # `--hypothesis-profile=full` replaces it


@pytest.fixture(scope="module")
def little_to_search():
    """What is there before the tests of a module is no model of theirs: a watch need not search it.

    The search is through all objects of the process, of which a test run has a million.
    """
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def without_numba(monkeypatch):
    """Let steps run as they do where Numba is not installed."""
    monkeypatch.setattr(native_kernel, "unavailable", lambda: "Numba is not installed")
    monkeypatch.setattr(norms, "squares_of", lambda tensors: None)
