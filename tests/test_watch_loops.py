"""Correct loops under a watch: no finding, and the same weights and random numbers as without."""

import warnings

import pytest
import torch

import lamina as lm
from correct_loops import LOOPS

pytestmark = pytest.mark.usefixtures("little_to_search")


def train(function):
    """The trained tensors, and a random number drawn afterwards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        trained = function()
    return [*trained.state_dict().values(), torch.rand(1)]


@pytest.mark.parametrize("name", LOOPS)
def test_nothing_is_found_and_nothing_changes(name):
    expected = train(LOOPS[name])
    with lm.watch() as seen:
        given = train(LOOPS[name])
    assert seen.failure is None
    assert seen.steps > 0
    assert [str(each) for each in seen.findings] == []
    assert len(given) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))
