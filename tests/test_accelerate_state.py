"""A module of tests finds Accelerate as in a new process, whatever another one left behind."""

import pytest

from accelerate_state import forget_accelerate


def test_an_accelerator_leaves_nothing():
    accelerate = pytest.importorskip("accelerate")
    states = accelerate.state
    accelerate.Accelerator(cpu=True)
    assert states.GradientState._shared_state
    assert states.PartialState._shared_state
    forget_accelerate()
    for state in (states.GradientState, states.PartialState, states.AcceleratorState):
        assert not state._shared_state
